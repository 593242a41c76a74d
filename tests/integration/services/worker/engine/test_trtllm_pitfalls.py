"""Every pitfall of TensorRT-LLM: the adapter is past it, and a naive one falls in.

docs/trtllm.md has the pitfalls for operators, each with the names of its checks.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tests.integration.services.worker.engine.naive_trtllm import NaiveAdapter, run_naive
from tests.integration.services.worker.engine.trtllm_call_pitfalls import CALLS
from tests.integration.services.worker.engine.trtllm_engine_pitfalls import ENGINE
from tests.integration.services.worker.engine.trtllm_habits import Habit
from tests.integration.services.worker.engine.trtllm_in_process import AdapterSubject, run_child
from tests.integration.services.worker.engine.trtllm_measure_pitfalls import MEASURES
from tests.integration.services.worker.engine.trtllm_output_pitfalls import OUTPUTS
from tests.integration.services.worker.engine.trtllm_pitfall import HANGS, Pitfall
from tests.integration.services.worker.engine.trtllm_subjects import (
    PATIENCE_S,
    Bench,
    Make,
    Reference,
    Setup,
    Subject,
    forget,
)
from tests.standins.tiny_hf_model import write_model

in_one_loop = pytest.mark.asyncio(loop_scope="module")
"""The engine that all compare with lives as long as the module."""

PITFALLS = [*CALLS, *OUTPUTS, *ENGINE, *MEASURES]
HABITUAL = [pitfall for pitfall in PITFALLS if pitfall.habit is not Habit.NONE]
DOCUMENT = Path(__file__).parents[5] / "docs" / "trtllm.md"
_NUMBERS = itertools.count()
HANGS_AFTER_S = 0.12
"""Then something that never comes counts as not coming."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    model = write_model(tmp_path_factory.mktemp("pitfalls") / "model")
    found = Reference(model)
    yield found
    found.close()
    forget()


def make_naive(setup: Setup) -> Subject:
    return NaiveAdapter(setup, Habit.NONE)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lent(reference: Reference) -> AsyncIterator[Subject]:
    """The adapter around an engine that all checks share who leave it as it was."""
    async with lending(reference, AdapterSubject) as subject:
        yield subject


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lent_naive(reference: Reference) -> AsyncIterator[Subject]:
    """Likewise, the naive adapter without habits."""
    async with lending(reference, make_naive) as subject:
        yield subject


@asynccontextmanager
async def lending(reference: Reference, make: Make) -> AsyncIterator[Subject]:
    with pytest.MonkeyPatch.context() as patch:
        bench = bench_of(reference, make, patch)
        subject = await bench.start()
    yield subject
    await bench.close()


def bench_of(
    reference: Reference,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    patience_s: float = PATIENCE_S,
) -> Bench:
    return Bench(
        model=reference.model,
        folder=reference.model.folder.parent / f"check-{next(_NUMBERS)}",
        patience_s=patience_s,
        sets_environment=monkeypatch.setenv,
        make=make,
        lent=None,
        reference=reference,
        process=run_child if make is AdapterSubject else run_naive,
    )


@in_one_loop
@pytest.mark.parametrize("pitfall", PITFALLS, ids=lambda pitfall: pitfall.name)
async def test_the_adapter_is_past_a_pitfall(
    reference: Reference, lent: Subject, monkeypatch: pytest.MonkeyPatch, pitfall: Pitfall
) -> None:
    bench = bench_of(reference, AdapterSubject, monkeypatch)
    bench.lent = lent

    async with closing(bench):
        await pitfall.check(bench)


@in_one_loop
@pytest.mark.parametrize("pitfall", PITFALLS, ids=lambda pitfall: pitfall.name)
async def test_a_naive_adapter_falls_in(
    reference: Reference, monkeypatch: pytest.MonkeyPatch, pitfall: Pitfall
) -> None:
    def make(setup: Setup) -> Subject:
        return NaiveAdapter(setup, pitfall.habit)

    patience_s = HANGS_AFTER_S if pitfall.fails == HANGS else PATIENCE_S
    async with closing(bench_of(reference, make, monkeypatch, patience_s)) as bench:
        await assert_naive_fails(pitfall, bench)


@asynccontextmanager
async def closing(bench: Bench) -> AsyncIterator[Bench]:
    """Ends all engines behind a check, which itself has to end."""
    try:
        async with asyncio.timeout(2 * PATIENCE_S):
            yield bench
    finally:
        await bench.close()


async def assert_naive_fails(pitfall: Pitfall, bench: Bench) -> None:
    """States that a check fails, and that it fails by what its pitfall is about."""
    try:
        await pitfall.check(bench)
    except Exception as error:  # noqa: BLE001 - whichever it is, it has to be the right one
        said = f"{type(error).__name__}: {error}"
        assert re.search(pitfall.fails, said, re.DOTALL), said
    else:
        raise AssertionError("the naive adapter is past it: the check cannot fail")


@in_one_loop
@pytest.mark.parametrize("pitfall", HABITUAL, ids=lambda pitfall: pitfall.name)
async def test_without_its_habit_the_naive_adapter_does_not(
    reference: Reference,
    lent_naive: Subject,
    monkeypatch: pytest.MonkeyPatch,
    pitfall: Pitfall,
) -> None:
    """So it is the habit that it falls by, and not something that it cannot do anyway."""
    bench = bench_of(reference, make_naive, monkeypatch)
    bench.lent = lent_naive

    async with closing(bench):
        await pitfall.check(bench)


def test_every_habit_is_that_of_a_pitfall() -> None:
    assert {pitfall.habit for pitfall in PITFALLS} == set(Habit)


def test_the_document_names_the_check_of_each_pitfall() -> None:
    """In the last column of its table; other tests have a path there, or are the contract's."""
    table = re.findall(r"^\|.*\|([^|]*)\|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    named = [name for cell in table for name in re.findall(r"`(\w+)`", cell) if "_" in name]

    assert sorted(named) == sorted(pitfall.name for pitfall in PITFALLS)
