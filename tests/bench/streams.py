"""CPU per streamed token: the whole suite beside one grpc.aio server, and that behind Envoy.

CPU is that of all processes of a target, from the first request until everything is settled, and
divided by the tokens that the client received: what requests cost and what idles is in it. The
targets stand side by side and are loaded in turn.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tests.bench.load import Load, Measured, run
from tests.bench.measure import middle, quantile
from tests.bench.report import against, by_process, table
from tests.bench.targets import ROOT, BenchError, Target, floor, suite, through_envoy

STEP_S = 0.02
CAPACITY = 1024
PACED_STREAMS = 64
COLLECTED_S = 0.08
WORKER_AIM_US = 5.0
TOP_LOGPROBS = 5
LOGPROBS_AIM = 3.0


@dataclass(frozen=True, slots=True)
class Case:
    """One row of a table.

    Attributes:
        name: for people.
        target: what is loaded.
        load: with what.
        aim: share of the floor's CPU; None for the floors.
        runs: one for each repeat.
    """

    name: str
    target: Target
    load: Load
    aim: float | None = None
    runs: list[Measured] = field(default_factory=list)

    def cpu_us(self) -> dict[str, float]:
        """CPU microseconds per token by process, of the run in the middle."""
        found = middle(self.runs, lambda item: item.total_s / item.result.tokens)
        return found.us_per(found.result.tokens)

    def total_us(self) -> float:
        """CPU microseconds per token of all processes, of the same run."""
        return sum(self.cpu_us().values())


def measure(cases: Sequence[Case], repeats: int) -> None:
    """Runs all cases in turn, several times."""
    for _ in range(repeats):
        for case in cases:
            case.runs.append(run(case.target, case.load))


def print_cases(title: str, cases: Sequence[Case]) -> None:
    """Prints a table of cases, the first of which is the floor, and the suite's by process."""
    base_us = cases[0].total_us()
    rows = []
    for case in cases:
        share = case.total_us() / base_us
        results = [item.result for item in case.runs]
        rows.append(
            [
                case.name,
                f"{case.total_us():.1f}",
                f"{share:.2f}",
                "" if case.aim is None else against(share, case.aim),
                f"{quantile([item.tokens / item.frames for item in results], 0.5):.2f}",
                f"{quantile([item.tokens / item.seconds for item in results], 0.5):,.0f}",
            ]
        )
    header = ["", "us/token", "share of floor", "aim", "tokens/frame", "tokens/s"]
    table(title, header, rows)
    columns = {case.name: case.cpu_us() for case in cases if case.target.state is not None}
    by_process("CPU us per token by process", columns)


def paced(repeats: int, *, is_quick: bool) -> None:
    """64 streams at 50 tokens/s each, with and without frames that wait."""
    tokens = 50 if is_quick else 350
    plain = Load(kind="streams", count=PACED_STREAMS, tokens=tokens)
    collected = Load(
        kind="streams", count=PACED_STREAMS, tokens=tokens, frame_interval_s=COLLECTED_S
    )
    flags = ["--engine=sim", f"--capacity={CAPACITY}", f"--step={STEP_S * 1000:g}ms"]
    with floor(STEP_S) as bare, through_envoy(bare) as proxied, suite(flags) as whole:
        cases = [
            Case("grpc.aio server", bare, plain),
            Case("the same behind Envoy", proxied, plain),
            Case("suite, a frame at once", whole, plain, 1.0),
            Case("suite, frames of 80 ms", whole, collected, 0.5),
        ]
        measure(cases, repeats)
    print_cases(f"{PACED_STREAMS} streams at {1 / STEP_S:g} tokens/s each", cases)


FLAT_TOKENS = {32: 3000, 256: 400, 1000: 200}
"""Tokens of each stream, the same for floors and suite."""
TOGETHER_TOKENS = 1_000_000
"""More than any stream gets until all have begun and have been watched."""
TOGETHER_CONTEXT = 1 << 20
TOGETHER_S = 5.0


def flat_out(repeats: int, *, is_quick: bool) -> None:
    """As fast as it goes, with 32, 256 and 1000 streams."""
    divisor = 10 if is_quick else 1
    flags = ["--engine=sim", f"--capacity={CAPACITY}", "--flat-out"]
    flags.append(f"--set=worker.context_length={TOGETHER_CONTEXT}")
    together = []
    with floor(0) as bare, through_envoy(bare) as proxied, suite(flags) as whole:
        for count, tokens in FLAT_TOKENS.items():
            load = Load(kind="streams", count=count, tokens=tokens // divisor)
            cases = [
                Case("grpc.aio server", bare, load),
                Case("the same behind Envoy", proxied, load),
                Case("suite", whole, load, 0.4),
            ]
            measure(cases, repeats)
            print_cases(f"{count} streams flat out, {load.tokens} tokens each", cases)
            watched = Load(
                kind="together",
                count=count,
                tokens=TOGETHER_TOKENS,
                seconds=TOGETHER_S / divisor,
            )
            together.append((watched, run(whole, watched)))
    _print_together(together)


def _print_together(together: list[tuple[Load, Measured]]) -> None:
    rows = []
    for load, measured in together:
        fairness = measured.result.fairness
        assert fairness is not None
        rows.append(
            [
                f"{load.count}",
                f"{fairness.begun} in {fairness.begin_s:.1f} s",
                f"{fairness.seconds:.1f} s",
                f"{fairness.least_tokens:,}",
                f"{fairness.most_tokens:,}",
                f"{fairness.longest_s * 1e3:.0f} ms",
                f"{fairness.tokens / fairness.frames:.1f}",
                f"{fairness.tokens / fairness.seconds:,.0f}",
            ]
        )
    header = [
        "streams",
        "begun",
        "watched",
        "least",
        "most",
        "longest wait",
        "tokens/frame",
        "tokens/s",
    ]
    table(
        "No stream starves: tokens of each while all run, flat out, through the suite", header, rows
    )


def logprobs(repeats: int, *, is_quick: bool) -> None:
    """Log-probabilities with five alternatives beside plain text, paced and flat out."""
    divisor = 10 if is_quick else 1
    for title, flags, count, tokens in (
        ("64 streams at 50 tokens/s", f"--step={STEP_S * 1000:g}ms", PACED_STREAMS, 350),
        ("32 streams flat out", "--flat-out", 32, 1000),
    ):
        plain = Load(kind="streams", count=count, tokens=tokens // divisor)
        scored = replace(plain, top_logprobs=TOP_LOGPROBS)
        with suite(["--engine=sim", f"--capacity={CAPACITY}", flags]) as whole:
            cases = [
                Case("plain text", whole, plain),
                Case(f"log-probabilities, top {TOP_LOGPROBS}", whole, scored, LOGPROBS_AIM),
            ]
            measure(cases, repeats)
        print_cases(f"Log-probabilities, {title}; floor: plain text", cases)


def worker(repeats: int, *, is_quick: bool) -> None:
    """The worker process alone, driven over ExecuteMany; see tests/bench/worker.py.

    Raises:
        BenchError: it failed.
    """
    print(f"\nWorker process alone, 256 streams; aim: at most {WORKER_AIM_US:g} us a token")
    for _ in range(repeats):
        command = [sys.executable, "-m", "tests.bench.worker", "--case=paced", "--case=flat"]
        command.append(f"--seconds={1 if is_quick else 5}")
        sys.stdout.flush()
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise BenchError("tests.bench.worker failed")
