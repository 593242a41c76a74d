"""CPU of a request with one output token, and what the suite adds to the time of a first token."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.bench import bare
from tests.bench.load import Load, run
from tests.bench.measure import added, middle, quantile
from tests.bench.report import against, by_process, table
from tests.bench.targets import floor, suite, two_hops

CALLERS = 16
SINGLE_AIM = 2.7
PER_S = 20.0
TOKENS = 16
STREAMS = 64
STEP_S = 0.02
CAPACITY = 256
SEED = 3


def single(repeats: int, *, is_quick: bool) -> None:
    """One token for each request, by callers that ask again as soon as they are answered."""
    requests = 200 if is_quick else 2000
    load = Load(kind="callers", count=CALLERS, tokens=1, requests=requests)
    flags = ["--engine=sim", f"--capacity={CAPACITY}", "--flat-out"]
    with floor(0) as server, two_hops() as shape, suite(flags) as whole:
        rounds = [[run(target, load) for target in (server, shape, whole)] for _ in range(repeats)]
    names = ("grpc.aio server", "two bare hops", "suite")
    # By target instead of by round.
    by_target = [[item[place] for item in rounds] for place in range(len(names))]
    middles = [middle(runs, lambda item: item.total_s) for runs in by_target]
    floor_s = middles[0].total_s
    table(
        f"Requests with one output token, {CALLERS} callers",
        ["", "us/request", "share of floor", "aim", "requests/s"],
        [
            [
                name,
                f"{one.total_s / requests * 1e6:.0f}",
                f"{one.total_s / floor_s:.2f}",
                against(one.total_s / floor_s, SINGLE_AIM) if name == "suite" else "",
                f"{quantile([requests / item.result.seconds for item in runs], 0.5):,.0f}",
            ]
            for name, one, runs in zip(names, middles, by_target, strict=True)
        ],
    )
    columns = {name: one.us_per(requests) for name, one in zip(names, middles, strict=True)}
    by_process("CPU us per request by process", columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Requests that arrive at an engine that may have other work.

    Attributes:
        name: for people.
        streams: that go on all the time.
        step_s: of the engine; None for its usual costs.
        aims_ms: most that may be added, milliseconds, by share of requests.
        bare_s: seconds until the first token on the engine alone.
        suite_s: the same through the suite.
    """

    name: str
    streams: int
    step_s: float | None
    aims_ms: dict[float, float]
    bare_s: list[float] = field(default_factory=list)
    suite_s: list[float] = field(default_factory=list)


def first_token(repeats: int, *, is_quick: bool) -> None:
    """What the suite adds to the time until the first token."""
    situations = [
        Situation(
            name=f"{PER_S:g} requests/s",
            streams=0,
            step_s=None,
            aims_ms={0.5: 2.0, 0.99: 8.0},
        ),
        Situation(
            name=f"{PER_S:g} requests/s beside {STREAMS} paced streams",
            streams=STREAMS,
            step_s=STEP_S,
            aims_ms={0.5: 3.0},
        ),
    ]
    requests = 40 if is_quick else 200
    for situation in situations:
        _measure(situation, repeats, requests)
    rows = [
        [
            situation.name,
            f"p{share * 100:g}",
            f"{quantile(situation.bare_s, share) * 1e3:.2f} ms",
            f"{quantile(situation.suite_s, share) * 1e3:.2f} ms",
            f"{_added_ms(situation, share):.2f} ms",
            against(_added_ms(situation, share), situation.aims_ms[share])
            if share in situation.aims_ms
            else "",
        ]
        for situation in situations
        for share in (0.5, 0.99)
    ]
    rows += _shapes(repeats, requests)
    count = len(situations[0].suite_s)
    table(
        f"Time to the first token over the bare engine, {count} requests each",
        ["", "", "bare", "suite", "added", "aim"],
        rows,
    )
    print(
        "  added: quantile through the suite less the same quantile on the bare engine, which has"
    )
    print("  the same costs, the same other work and the same moments of arrival, in turn")


def _shapes(repeats: int, requests: int) -> list[list[str]]:
    """Measures servers without an engine: what transport alone adds, once and in two hops."""
    with floor(0) as server, two_hops() as shape:
        found: dict[str, list[float]] = {"a grpc.aio server": [], "two bare hops": []}
        for repeat in range(repeats):
            for target, first_s in zip((server, shape), found.values(), strict=True):
                first_s.extend(run(target, _arrivals(0, requests, repeat)).result.first_token_s)
    return [
        [f"{name}, {PER_S:g} requests/s", f"p{share * 100:g}", "", "", ms, ""]
        for name, first_s in found.items()
        for share in (0.5, 0.99)
        for ms in [f"{quantile(first_s, share) * 1e3:.2f} ms"]
    ]


def _added_ms(situation: Situation, share: float) -> float:
    return added(situation.suite_s, situation.bare_s, share) * 1e3


def _measure(situation: Situation, repeats: int, requests: int) -> None:
    flags = ["--engine=sim", f"--capacity={CAPACITY}"]
    if situation.step_s is not None:
        flags.append(f"--step={situation.step_s * 1000:g}ms")
    with suite(flags) as whole:
        for repeat in range(repeats):
            load = _arrivals(situation.streams, requests, repeat)
            spec = bare.Spec(model=None, capacity=CAPACITY, step_s=situation.step_s, load=load)
            situation.bare_s.extend(bare.measure(spec).first_token_s)
            situation.suite_s.extend(run(whole, load).result.first_token_s)


def _arrivals(streams: int, requests: int, repeat: int) -> Load:
    return Load(
        kind="arrivals",
        count=streams,
        tokens=TOKENS,
        requests=requests,
        per_s=PER_S,
        seed=SEED + repeat,
    )
