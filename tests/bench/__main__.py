"""What the suite costs, each figure beside its floor in the same run: `make bench`.

    make bench                              everything; about twenty minutes
    make bench ARGS="--only paced"          one measurement; may be repeated
    make bench ARGS=--quick                 all of them, too short for figures: a smoke test

Loads on a floor and on the suite take turns, so that whatever else the machine does meets both;
figures are medians, and shares are what counts. docs/performance.md says how to read them.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from typing import Protocol

from tests.bench import (
    admission,
    cpu_engine,
    memory,
    money_lag,
    money_metering,
    requests,
    settlement,
    streams,
    targets,
)
from tests.bench.targets import BenchError


class Measure(Protocol):
    """Measures something and prints it."""

    def __call__(self, repeats: int, *, is_quick: bool) -> None:
        """Runs everything `repeats` times; briefly if asked to."""
        ...


MEASURES: dict[str, Measure] = {
    "paced": streams.paced,
    "flat": streams.flat_out,
    "logprobs": streams.logprobs,
    "worker": streams.worker,
    "first-token": requests.first_token,
    "single": requests.single,
    "memory": memory.memory,
    "cpu-engine": cpu_engine.cpu_engine,
    "admission": admission.admission,
    "metering": money_metering.metering,
    "settlement": settlement.settlement,
    "lag": money_lag.lag,
}


def main() -> int:
    """Measures what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=MEASURES, action="append", help="may be repeated")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of each")
    parser.add_argument("--quick", action="store_true", help="once each, and short")
    asked = parser.parse_args()
    try:
        guard = targets.alone()
    except BenchError as error:
        sys.stderr.write(f"make bench: {error}\n")
        return 1
    with guard:
        try:
            return measure(asked)
        except KeyboardInterrupt:
            return 130


def measure(asked: argparse.Namespace) -> int:
    """Measures; returns the exit code."""
    started_s = time.perf_counter()
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {_load()} before")
    failed = []
    for name in asked.only or MEASURES:
        try:
            MEASURES[name](1 if asked.quick else asked.repeats, is_quick=asked.quick)
        except BenchError as error:
            failed.append(name)
            sys.stderr.write(f"\n{name}: {error}\n")
    print(f"\n{time.perf_counter() - started_s:.0f} s, {_load()} after")
    if failed:
        sys.stderr.write(f"not measured: {', '.join(failed)}\n")
    return 1 if failed else 0


def _load() -> str:
    return "load average " + ", ".join(f"{value:.2f}" for value in os.getloadavg())


if __name__ == "__main__":
    sys.exit(main())
