"""CPU of a request with one output token, and what the suite adds to the time of a first token."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.bench import bare
from tests.bench.load import Load, run
from tests.bench.measure import added, middle, quantile
from tests.bench.report import against, by_process, table
from tests.bench.targets import floor, suite

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
    with floor(0) as server, suite(flags) as whole:
        runs = [(run(server, load), run(whole, load)) for _ in range(repeats)]
    floor_run = middle([item for item, _ in runs], lambda item: item.total_s)
    suite_run = middle([item for _, item in runs], lambda item: item.total_s)
    floor_us, suite_us = (item.total_s / requests * 1e6 for item in (floor_run, suite_run))
    rate = quantile([requests / item.result.seconds for _, item in runs], 0.5)
    floor_rate = quantile([requests / item.result.seconds for item, _ in runs], 0.5)
    share = suite_us / floor_us
    table(
        f"Requests with one output token, {CALLERS} callers",
        ["", "us/request", "share of floor", "aim", "requests/s"],
        [
            ["grpc.aio server", f"{floor_us:.0f}", "1.00", "", f"{floor_rate:,.0f}"],
            [
                "suite",
                f"{suite_us:.0f}",
                f"{share:.2f}",
                against(share, SINGLE_AIM),
                f"{rate:,.0f}",
            ],
        ],
    )
    by_process("CPU us per request by process", {"suite": suite_run.us_per(requests)})


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
    for situation in situations:
        _measure(situation, repeats, 40 if is_quick else 200)
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


def _added_ms(situation: Situation, share: float) -> float:
    return added(situation.suite_s, situation.bare_s, share) * 1e3


def _measure(situation: Situation, repeats: int, requests: int) -> None:
    flags = ["--engine=sim", f"--capacity={CAPACITY}"]
    if situation.step_s is not None:
        flags.append(f"--step={situation.step_s * 1000:g}ms")
    with suite(flags) as whole:
        for repeat in range(repeats):
            load = Load(
                kind="arrivals",
                count=situation.streams,
                tokens=TOKENS,
                requests=requests,
                per_s=PER_S,
                seed=SEED + repeat,
            )
            spec = bare.Spec(model=None, capacity=CAPACITY, step_s=situation.step_s, load=load)
            situation.bare_s.extend(bare.measure(spec).first_token_s)
            situation.suite_s.extend(run(whole, load).result.first_token_s)
