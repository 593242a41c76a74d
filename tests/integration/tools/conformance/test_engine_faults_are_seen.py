"""tools/conformance/engine: the contract holds, and each way to break it is noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.tools.conformance.engine_faults import FAULTS, Fault, FaultyEngine
from tools.conformance.engine.contract import CHECKS
from tools.conformance.engine.rows import sim
from tools.conformance.engine.run import judge, run
from tools.conformance.engine.shared import Shared
from tools.conformance.verdict import CannotShow, Kind, Verdict

CHECK = {check.name: check for check in CHECKS}


async def verdict_on(fault: Fault, name: str, folder: Path) -> Verdict:
    row = sim(folder)
    faulty = replace(row, make=lambda: FaultyEngine(row.make(), fault))
    shared = Shared(faulty, folder)
    try:
        return await judge(shared, CHECK[name], name)
    finally:
        await shared.stop()


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_is_noticed(name: str, tmp_path: Path) -> None:
    fault, check = FAULTS[name]

    verdict = await verdict_on(fault, check, tmp_path)

    assert verdict.kind is Kind.FAIL, verdict.line
    assert "unforeseen" not in verdict.text


async def test_names_of_checks_are_their_own_and_say_something() -> None:
    assert len(CHECK) == len(CHECKS)
    assert [check.name for check in CHECKS if not check.sentence.endswith(".")] == []
    assert [check.name for check in CHECKS if check.ends_engine] == [
        check.name for check in CHECKS if check.group == "ending"
    ]


async def test_a_run_tells_each_verdict_and_goes_on_to_the_next_engine(tmp_path: Path) -> None:
    def missing(_folder: Path) -> None:
        raise CannotShow("needs another machine")

    told: list[str] = []
    only = ["nothing_comes_behind_the_end", "an_engine_that_is_killed_is_dead"]
    verdicts = await run({"none": missing, "sim": sim}, only, tmp_path, told.append)  # type: ignore[dict-item]

    kinds = [(verdict.kind, verdict.feature) for verdict in verdicts]
    assert kinds == [
        (Kind.SKIP, "none/nothing_comes_behind_the_end"),
        (Kind.SKIP, "none/an_engine_that_is_killed_is_dead"),
        (Kind.PASS, "sim/nothing_comes_behind_the_end"),
        (Kind.SKIP, "sim/an_engine_that_is_killed_is_dead"),
    ]
    assert told == [verdict.line for verdict in verdicts]
