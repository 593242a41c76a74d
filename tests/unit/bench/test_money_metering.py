"""tests/bench/money_metering.py: the one side counts every token, its floor counts none."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from libs.process import Background
from services.gateway.journal import Journal
from services.gateway.plain import PlainGeneration
from tests.bench.money_metering import Crowd, Uncounted, _check, cost_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def journaled(folder: Path, kind: type[PlainGeneration]) -> list[int]:
    """Counts that are in the journal after four steps of forty generations."""
    journal = Journal(folder)
    async with Background() as background:
        crowd = Crowd(kind, 40, journal, background)
        assert await crowd.run(4) > 0
    journal.close()
    assert {generation.sequence for generation in crowd.generations} == {5}
    later = Journal(folder)
    found = later.recover(NOW).settlements
    later.close()
    return [closing.output_tokens for _, closing in found]


async def test_each_token_is_journaled(tmp_path: Path) -> None:
    assert await journaled(tmp_path, PlainGeneration) == [4] * 40


async def test_the_floor_releases_as_much_and_journals_none_of_it(tmp_path: Path) -> None:
    assert await journaled(tmp_path, Uncounted) == [0] * 40


async def test_a_floor_that_counts_is_noticed(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    async with Background() as background:
        floor = Crowd(PlainGeneration, 2, journal, background)
        counted = Crowd(PlainGeneration, 2, journal, background)
        await floor.run(3)
        await counted.run(3)
    journal.close()

    with pytest.raises(AssertionError):
        _check(floor, counted, 3)


async def test_a_cost_is_that_of_one_token(tmp_path: Path) -> None:
    found = await cost_of(tmp_path, 8, 50, 3)

    assert found.added_ns == found.counted_ns - found.bare_ns
    # Nanoseconds of a token, and not of a step or of a round: no machine is that far off.
    assert 50 < found.journal_ns < 100_000
    assert 100 < found.bare_ns < 1_000_000
