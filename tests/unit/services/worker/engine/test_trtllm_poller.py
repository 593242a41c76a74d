"""How statistics and events are fetched, from both kinds of engine, whatever goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import pytest

from services.worker.engine.kv_events import KvEvent, KvStored, chain
from services.worker.engine.trtllm_api import Llm
from services.worker.engine.trtllm_load import KvUse, Measured
from services.worker.engine.trtllm_poller import PATIENCE_S, RECORDS_MAX, Poller, Wanted

Record = Mapping[str, object]
STATS: Record = {
    "iter": 3,
    "kvCacheStats": {"maxNumBlocks": 10, "usedNumBlocks": 2, "tokensPerBlock": 4},
}
STORED: Record = {
    "event_id": 0,
    "window_size": 9,
    "data": {
        "type": "stored",
        "parent_hash": None,
        "blocks": [
            {
                "block_hash": 5,
                "cache_level": 0,
                "tokens": [{"token_id": 1, "token_extra_id": 0}] * 4,
            }
        ],
    },
}


class Queue:
    """One for the engine's whole life; found empty, it is done until it is told otherwise."""

    def __init__(self, records: list[Record], error: Exception | None = None) -> None:
        self.records = records
        self.error = error
        self.is_done = False
        self.undone = 0

    def mark_undone(self) -> None:
        self.undone += 1
        self.is_done = False

    async def __aiter__(self) -> AsyncIterator[Record]:
        while not self.is_done and self.records:
            yield self.records.pop(0)
        self.is_done = True
        if self.error is not None:
            raise self.error


class Fetched:
    """What newer versions have fetched from their process."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records

    async def __aiter__(self) -> AsyncIterator[Record]:
        while self.records:
            yield self.records.pop(0)


@dataclass
class Engine:
    stats: Queue
    events: Queue | Fetched
    asked: list[float] = field(default_factory=list)
    error: Exception | None = None

    def get_stats_async(self, timeout: float) -> Queue:
        self.asked.append(timeout)
        if self.error is not None:
            raise self.error
        return self.stats

    def get_kv_cache_events_async(self, timeout: float) -> Queue | Fetched:
        self.asked.append(timeout)
        return self.events


class World:
    def __init__(self, *, stats: bool = True, block_tokens: int = 4) -> None:
        self.engine = Engine(Queue([]), Queue([]))
        self.told: list[tuple[Measured, list[KvEvent]]] = []
        wanted = Wanted(stats=stats, block_tokens=block_tokens, interval_s=0.001)
        self.poller = Poller(cast("Llm", self.engine), wanted, lambda *told: self.told.append(told))


async def test_what_there_is_is_told_in_our_words() -> None:
    world = World()
    world.engine.stats.records = [STATS]
    world.engine.events.records = [STORED]

    await world.poller.round()

    measured = Measured(iteration=3, kv=KvUse(used_tokens=8, total_tokens=40))
    assert world.told == [(measured, [KvStored((chain(None, [1] * 4),), None)])]
    assert world.engine.asked == [PATIENCE_S, 0.0]


async def test_no_news_is_not_told() -> None:
    world = World()

    await world.poller.round()

    assert world.told == []


async def test_a_queue_that_was_empty_once_is_read_again() -> None:
    world = World()
    await world.poller.round()
    world.engine.stats.records = [STATS]

    await world.poller.round()

    assert len(world.told) == 1
    assert world.engine.stats.undone == 2


@pytest.mark.parametrize(
    "error", [RuntimeError("no process"), AssertionError("not yet"), asyncio.QueueEmpty()]
)
async def test_errors_are_no_news_and_what_came_before_counts(error: Exception) -> None:
    world = World()
    world.engine.error = error
    world.engine.events = Queue([STORED], error)

    await world.poller.round()

    assert [len(events) for _, events in world.told] == [1]


async def test_a_round_takes_only_so_much_from_a_queue_which_keeps_the_rest() -> None:
    world = World()
    world.engine.stats.records = [STATS] * (RECORDS_MAX + 7)

    await world.poller.round()

    assert len(world.engine.stats.records) >= 7


async def test_what_was_fetched_at_once_is_read_to_its_end() -> None:
    """Nobody else has it any more."""
    world = World()
    world.engine.events = Fetched([{**STORED, "event_id": at} for at in range(RECORDS_MAX + 7)])

    await world.poller.round()

    assert world.engine.events.records == []


async def test_what_nobody_wants_is_not_asked_for() -> None:
    world = World(stats=False)
    await world.poller.round()

    assert len(world.engine.asked) == 1


async def test_it_polls_on_a_thread_of_its_own_and_goes_on_after_errors() -> None:
    world = World()
    world.engine.error = RuntimeError("no process")
    world.engine.events.records = [STORED]

    world.poller.start()
    async with asyncio.timeout(5):
        while len(world.told) < 1:  # noqa: ASYNC110 - another thread tells
            await asyncio.sleep(0.002)
        world.engine.error = None
        world.engine.stats.records = [STATS]
        while len(world.told) < 2:  # noqa: ASYNC110 - another thread tells
            await asyncio.sleep(0.002)

    world.poller.stop()
    assert world.told[1][0].iteration == 3
