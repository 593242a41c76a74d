"""A campaign's outcome for people, as lines of Markdown. Pure."""

from __future__ import annotations

from collections import Counter

from tools.chaos.audit import End, quantile
from tools.chaos.campaign import Outcome
from tools.chaos.plan import TARGETS

_CAUSES_SHOWN = 6


def lines(outcome: Outcome) -> list[str]:
    """Everything that was found, the verdict last."""
    return [*_strikes(outcome), "", *_figures(outcome), "", *_verdict(outcome)]


def _strikes(outcome: Outcome) -> list[str]:
    striker = outcome.striker
    rows = [
        "| struck | SIGKILL | SIGSTOP | back after p50 / max, s |",
        "| --- | ---: | ---: | ---: |",
    ]
    for target in TARGETS:
        took = striker.recoveries_s[target]
        back = f"{quantile(took, 0.5):.1f} / {max(took):.1f}" if took else "-"
        rows.append(f"| {target} | {striker.kills[target]} | {striker.stops[target]} | {back} |")
    rows.append(f"| at fail-points | {len(outcome.points)} | | |")
    rows.append(f"| **all** | {outcome.kills} | {striker.stops.total()} | |")
    return rows


def _figures(outcome: Outcome) -> list[str]:
    found, ends, halted = outcome.audit, outcome.audit.ends, outcome.audit.halted_over
    overs = [quantile(found.over, share) for share in (0.5, 0.99, 1.0)]
    figures = {
        "seconds, seed": f"{outcome.options.seconds:g}, {outcome.options.seed}",
        "generations asked for": str(len(outcome.attempts)),
        "ended cleanly; left by their client; cut; refused": "; ".join(
            str(ends[end]) for end in (End.CLEAN, End.LEFT, End.CUT, End.REFUSED)
        ),
        "interrupted with a record; of them charged": f"{found.interrupted}; {found.charged}",
        "tokens charged": str(found.tokens),
        "charged and not received, a cut stream, tokens p50 / p99 / max": " / ".join(
            f"{over:g}" for over in overs
        ),
        "of them around a halt: streams; tokens; max": "; ".join(
            str(value) for value in (len(halted), sum(halted), max(halted, default=0))
        ),
        "unary answers charged and lost; their tokens": (
            f"{len(found.lost_answers)}; {sum(found.lost_answers)}"
        ),
        "charged and not received by streams, of all tokens": f"{found.over_share:.3%}",
        "all well after the last strike, s": f"{outcome.well_s:.1f}",
        "all settled after the last end, s": f"{outcome.drain_s:.1f}",
    }
    causes = Counter(item.cause for item in outcome.attempts if item.end in {End.CUT, End.REFUSED})
    for cause, count in causes.most_common(_CAUSES_SHOWN):
        figures[f"cut or refused: {cause}"] = str(count)
    rows = ["| | |", "| --- | ---: |"]
    return rows + [f"| {name} | {value} |" for name, value in figures.items()]


def _verdict(outcome: Outcome) -> list[str]:
    if not outcome.faults:
        return ["PASS"]
    asked = outcome.options
    flags = f"--strikes {asked.strikes_max} --pause {asked.pause_s:g} --clients {asked.clients}"
    if not asked.has_points:
        flags += " --no-points"
    again = f'make chaos SECONDS={asked.seconds:g} SEED={asked.seed} ARGS="{flags}"'
    return [*outcome.faults, f"FAIL; again: {again}"]
