"""A campaign's outcome for people, as lines of Markdown. Pure."""

from __future__ import annotations

from collections import Counter

from tools.chaos import plan
from tools.chaos.audit import End, quantile
from tools.chaos.campaign import Outcome
from tools.chaos.network import Trouble

_CAUSES_SHOWN = 12


def lines(outcome: Outcome) -> list[str]:
    """Everything that was found, the verdict last."""
    parts = [_strikes(outcome), _network(outcome), _figures(outcome), _verdict(outcome)]
    return [line for part in parts if part for line in [*part, ""]][:-1]


def _strikes(outcome: Outcome) -> list[str]:
    striker = outcome.striker
    rows = [
        "| struck | SIGKILL | SIGSTOP | of them past a lease | back after p50 / max, s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for target in plan.targets(outcome.options.gateways):
        took = striker.recoveries_s[target]
        back = f"{quantile(took, 0.5):.1f} / {max(took):.1f}" if took else "-"
        counts = [striker.kills[target], striker.stops[target], striker.long_stops[target]]
        rows.append(f"| {target} | {' | '.join(str(count) for count in counts)} | {back} |")
    rows.append(f"| at fail-points | {len(outcome.points)} | | | |")
    totals = [outcome.kills, striker.stops.total(), striker.long_stops.total()]
    rows.append(f"| **all** | {' | '.join(str(total) for total in totals)} | |")
    return rows


def _network(outcome: Outcome) -> list[str]:
    jams = outcome.striker.jams
    between = sorted({ends for ends, _ in jams})
    if not between:
        return []
    rows = [
        f"| network | {' | '.join(between)} |",
        f"| --- |{' ---: |' * len(between)}",
    ]
    for trouble in Trouble:
        counts = [str(jams[ends, trouble]) for ends in between]
        rows.append(f"| {trouble.value} | {' | '.join(counts)} |")
    return rows


def _figures(outcome: Outcome) -> list[str]:
    found, ends = outcome.audit, outcome.audit.ends
    overs = [quantile(found.over, share) for share in (0.5, 0.99, 1.0)]
    figures = {
        "seconds, seed, gateways": (
            f"{outcome.options.seconds:g}, {outcome.options.seed}, {outcome.options.gateways}"
        ),
        "generations asked for": str(len(outcome.attempts)),
        "ended cleanly; left by their client; cut; refused": "; ".join(
            str(ends[end]) for end in (End.CLEAN, End.LEFT, End.CUT, End.REFUSED)
        ),
        "interrupted with a record; of them charged": f"{found.interrupted}; {found.charged}",
        "tokens charged": str(found.tokens),
        "charged and not received, a cut stream, tokens p50 / p99 / max": " / ".join(
            f"{over:g}" for over in overs
        ),
        "of them around a halt: streams; tokens; max": _three(found.halted_over),
        "of clients kept from reading: streams; tokens; max": _three(found.away_over),
        "clients or network stood still by themselves, s in all": f"{outcome.lag_s:.1f}",
        "unary answers charged and lost; their tokens": (
            f"{len(found.lost_answers)}; {sum(found.lost_answers)}"
        ),
        "charged and not received by streams that were read, of all tokens": (
            f"{found.over_share:.3%}"
        ),
        "all well after the last strike, s": f"{outcome.well_s:.1f}",
        "all settled after the last end, s": f"{outcome.drain_s:.1f}",
        "violations": str(len(outcome.faults)),
    }
    causes = Counter(item.cause for item in outcome.attempts if item.end in {End.CUT, End.REFUSED})
    for cause, count in causes.most_common(_CAUSES_SHOWN):
        figures[f"cut or refused: {cause}"] = str(count)
    rows = ["| | |", "| --- | ---: |"]
    return rows + [f"| {name} | {value} |" for name, value in figures.items()]


def _three(over: list[int]) -> str:
    return f"{len(over)}; {sum(over)}; {max(over, default=0)}"


def _verdict(outcome: Outcome) -> list[str]:
    if not outcome.faults:
        return ["PASS"]
    asked = outcome.options
    flags = f"--strikes {asked.strikes_max} --pause {asked.pause_s:g} --clients {asked.clients}"
    flags += f" --gateways {asked.gateways}"
    if asked.kills:
        flags += f" --kills {asked.kills}"
    if not asked.has_network:
        flags += " --no-network"
    if not asked.has_points:
        flags += " --no-points"
    again = f'make chaos SECONDS={asked.seconds:g} SEED={asked.seed} ARGS="{flags}"'
    return [*outcome.faults, f"FAIL; again: {again}"]
