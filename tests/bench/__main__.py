"""Bare engine against the whole path, in one run: `make bench`.

For the simulated engine as fast as it can and for the CPU engine, at 1, 8 and 32 streams: tokens
per second bare and through the suite and their ratio, time to the first token added, and CPU
microseconds per token of each process. Runs alternate, so that whatever else the machine does
meets both; figures are medians, and ratios are what counts. Bounded: a few minutes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.bench.measure import Measurement, median_of
from tests.bench.processes import Suite

ROOT = Path(__file__).resolve().parent.parent.parent
OWN_MODEL = ROOT / "services" / "worker" / "models" / "maas-tiny-story.gguf"
CAPACITY = 32
STREAMS = (1, 8, 32)
TOKENS = {
    "sim": {1: 8_000, 8: 5_000, 32: 2_500},
    "llamacpp": {1: 512, 8: 256, 32: 128},
}
FLAGS = {"sim": ["--engine", "sim", "--flat-out"], "llamacpp": []}
PORT_BASE = 53050
TIMEOUT_S = 120


@dataclass(slots=True)
class Row:
    """Results of one engine at one number of streams."""

    bare: list[Measurement] = field(default_factory=list)
    suite: list[Measurement] = field(default_factory=list)
    cpu_us: list[dict[str, float]] = field(default_factory=list)


class LocalSuite:
    """A suite of its own ports and state, for the length of a `with`."""

    def __init__(self, engine: str, state: Path) -> None:
        self._state = state
        self._flags = [
            *FLAGS[engine],
            f"--capacity={CAPACITY}",
            f"--state={state}",
        ]
        self.environment: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._tool("tools.up", *self._flags, "--detach")
        for line in (self._state / "dev.env").read_text().splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            self.environment[name] = shlex.split(value)[0]
        return self

    def __exit__(self, *_: object) -> None:
        self._tool("tools.down", f"--state={self._state}")

    def _tool(self, module: str, *arguments: str) -> None:
        environment = {**os.environ, "MAAS_PORT_BASE": str(PORT_BASE)}  # noqa: TID251 - make's interface
        subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def load(self, streams: int, tokens: int) -> tuple[Measurement, dict[str, float]]:
        """Runs the load once; returns it and CPU microseconds per token by process."""
        env = self.environment
        command = [sys.executable, "-m", "tests.bench.client", env["MAAS_ENDPOINT"]]
        command += [env["MAAS_API_KEY"], env["MAAS_MODEL"], str(streams), str(tokens)]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "warm\n"
            suite = Suite(self._state)
            before = suite.cpu_s()
            process.stdin.write("\n")
            process.stdin.flush()
            result = Measurement.from_json(process.stdout.readline())
            after = suite.cpu_s()
        cpu_us = {name: (after[name] - before[name]) * 1e6 / result.tokens for name in after}
        return result, cpu_us


def bare(engine: str, streams: int, tokens: int) -> Measurement:
    """Runs the load on the engine alone."""
    command = [sys.executable, "-m", "tests.bench.bare", engine, str(OWN_MODEL)]
    command += [str(CAPACITY), str(streams), str(tokens)]
    done = subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S
    )
    return Measurement.from_json(done.stdout)


def measure(engine: str, repeats: int) -> dict[int, Row]:
    """Alternates bare and suite for one engine."""
    rows = {streams: Row() for streams in STREAMS}
    with tempfile.TemporaryDirectory() as folder, LocalSuite(engine, Path(folder)) as suite:
        for _ in range(repeats):
            for streams, row in rows.items():
                tokens = TOKENS[engine][streams]
                row.bare.append(bare(engine, streams, tokens))
                result, cpu_us = suite.load(streams, tokens)
                row.suite.append(result)
                row.cpu_us.append(cpu_us)
    return rows


def report(engine: str, rows: dict[int, Row]) -> None:
    """Prints the tables of one engine."""
    print(f"\n{engine}: medians of {len(next(iter(rows.values())).bare)} alternating runs")
    print("streams  bare tok/s  suite tok/s  ratio  first token added")
    for streams, row in rows.items():
        bare_rate, bare_first = median_of(row.bare)
        rate, first = median_of(row.suite)
        added_ms = (first - bare_first) * 1e3
        print(
            f"{streams:7d}  {bare_rate:10,.0f}  {rate:11,.0f}  {rate / bare_rate:5.2f}"
            f"  {added_ms:14.2f} ms"
        )
    names = sorted({name for row in rows.values() for name in row.cpu_us[0]})
    print("CPU us per token   " + "  ".join(f"{streams:>4d} streams" for streams in rows))
    for name in names:
        values = [statistics.median(item[name] for item in row.cpu_us) for row in rows.values()]
        print(f"  {name:16s} " + "  ".join(f"{value:12.2f}" for value in values))
    totals = [statistics.median(sum(item.values()) for item in row.cpu_us) for row in rows.values()]
    print(f"  {'all':16s} " + "  ".join(f"{value:12.2f}" for value in totals))


def main() -> int:
    """Measures both engines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engine", choices=["sim", "llamacpp"], action="append")
    arguments = parser.parse_args()
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load average before {load}")
    for engine in arguments.engine or ["sim", "llamacpp"]:
        report(engine, measure(engine, arguments.repeats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
