"""Systematic fault cases on suites of their own: python -m tools.chaos.cases."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.chaos.cases import small, table
from tools.chaos.cases.clocks import flags
from tools.chaos.cases.ground import own_ground
from tools.chaos.cases.table import Case
from tools.conformance import verdict
from tools.conformance.verdict import Kind, Verdict
from tools.local.place import State
from tools.local.temporary import SuiteFailure


def say(text: str) -> None:
    """Prints a line now."""
    print(text, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Shows the cases; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="make chaos ARGS=--cases", description="One thing goes wrong at a time."
    )
    parser.add_argument("--only", default="", help="names of cases, with commas between them")
    parser.add_argument("--small-disk", type=Path, help=argparse.SUPPRESS)
    found = parser.parse_args(arguments)
    only = {name for name in found.only.split(",") if name}
    try:
        if found.small_disk is not None:
            verdicts = _on_the_small_disk(found.small_disk, only)
        else:
            verdicts = _show_all(only)
    except SuiteFailure as error:
        sys.stderr.write(f"cases: {error}\n")
        return 2
    if not verdicts:
        sys.stderr.write(f"cases: there is no {', '.join(sorted(only))}\n")
        return 2
    say(verdict.summary(verdicts))
    return verdict.exit_code(verdicts)


def _show_all(only: set[str]) -> list[Verdict]:
    """Shows what was chosen, on a suite for each kind of case."""
    verdicts = _show(table.QUICK, table.QUICK_SETTINGS, only)
    with tempfile.TemporaryDirectory(prefix="maas-clocks-") as folder:
        clocks = table.clock_cases(Path(folder))
        verdicts += _show(clocks, table.QUICK_SETTINGS, only, flags(Path(folder)))
    on_disk = small.show([case.name for case in _chosen(table.SMALL_DISK, only)])
    for item in on_disk:
        say(item.line)
    verdicts += on_disk
    return verdicts + _show(table.PATIENT, (), only)


def _on_the_small_disk(other: Path, only: set[str]) -> list[Verdict]:
    """Shows cases in a process whose temporary files are on a small disk; `other` is on another."""
    verdicts = _show([table.MACHINE_FULL], table.QUICK_SETTINGS, only)
    settings = [*table.QUICK_SETTINGS, f"gateway.journal_dir={other}"]
    return verdicts + _show([table.DATABASE_FULL], settings, only)


def _chosen(cases: Sequence[Case], only: set[str]) -> list[Case]:
    return [case for case in cases if not only or case.name in only]


def _show(
    cases: Sequence[Case], settings: Sequence[str], only: set[str], more: Sequence[str] = ()
) -> list[Verdict]:
    chosen = _chosen(cases, only)
    if not chosen:
        return []
    with own_ground(*settings, flags=more) as state:
        verdicts = asyncio.run(table.run(state, chosen, say))
        if any(item.kind is Kind.FAIL for item in verdicts):
            say(f"logs: {_keep_logs(state)}")
    return verdicts


def _keep_logs(state: State) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="maas-cases-logs-"))
    shutil.copytree(state.logs, folder, dirs_exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
