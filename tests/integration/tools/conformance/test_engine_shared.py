"""tools/conformance/engine/shared.py: one engine serves many checks, and none finds another's."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from typing_extensions import override

from services.worker.engine.base import Engine, EngineInfo, EngineStartError, Tell
from tests.integration.tools.conformance.engine_faults import Fault, FaultyEngine
from tools.conformance.engine.harness import ask
from tools.conformance.engine.rows import Row, sim
from tools.conformance.engine.run import run
from tools.conformance.engine.shared import Shared, environment
from tools.conformance.verdict import CannotShow, Kind, Mismatch

ONE = ["nothing_comes_behind_the_end", "a_prompt_of_one_token_is_enough"]


class Unstartable(FaultyEngine):
    """Says what is wrong, and does not start."""

    @override
    async def start(self, tell: Tell | None = None) -> EngineInfo:
        raise EngineStartError("there is no room for it")


def unstartable(folder: Path) -> Row:
    row = sim(folder)
    return replace(row, make=lambda: Unstartable(row.make(), Fault()))


@pytest.fixture
async def shared(tmp_path: Path) -> AsyncIterator[Shared]:
    found = Shared(sim(tmp_path), tmp_path)
    yield found
    await found.stop()


async def engine_of(shared: Shared, problem: Exception | None = None) -> Engine:
    """The engine that a check gets; the check leaves two executions behind."""
    found: Engine | None = None
    try:
        async with shared.lend() as harness:
            found = harness.engine
            assert found.load().running == 0
            harness.submit(1, ask(100))
            harness.submit(2, ask(100))
            if problem is not None:
                raise problem
    except (CannotShow, Mismatch):
        assert problem is not None
    assert found is not None
    return found


async def test_what_a_check_leaves_running_is_ended_for_the_next(shared: Shared) -> None:
    first = await engine_of(shared)
    second = await engine_of(shared, CannotShow("not here"))

    assert first is second
    assert first.load().running == first.load().waiting == 0


async def test_an_engine_that_failed_a_check_serves_no_other(shared: Shared) -> None:
    failed = await engine_of(shared, Mismatch("wrong"))

    assert await engine_of(shared) is not failed


async def test_each_check_has_a_folder_and_a_salt_of_its_own(shared: Shared) -> None:
    async with shared.lend() as harness:
        first = (harness.folder, harness.salt)
    async with shared.lend() as harness:
        second = (harness.folder, harness.salt)

    assert first[0].is_dir()
    assert first[0] != second[0]
    assert first[1] != second[1]


async def test_an_engine_that_does_not_start_is_tried_once(tmp_path: Path) -> None:
    verdicts = await run({"none": unstartable}, ONE, tmp_path, lambda _: None)

    assert [verdict.kind for verdict in verdicts] == [Kind.FAIL, Kind.SKIP]
    assert "there is no room for it" in verdicts[0].text


def test_variables_are_set_for_the_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAAS_TEST_KEPT", "before")
    monkeypatch.delenv("MAAS_TEST_NEW", raising=False)

    with environment({"MAAS_TEST_KEPT": "inside", "MAAS_TEST_NEW": "inside"}):
        assert os.environ["MAAS_TEST_KEPT"] == os.environ["MAAS_TEST_NEW"] == "inside"  # noqa: TID251

    assert os.environ["MAAS_TEST_KEPT"] == "before"  # noqa: TID251
    assert "MAAS_TEST_NEW" not in os.environ  # noqa: TID251
