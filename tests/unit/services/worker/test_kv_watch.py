"""What watchers of the prefix cache hear, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest
from maas.engine.v1 import engine_pb2
from prometheus_client import REGISTRY

from libs.errors import NotImplementedHere, ResourceExhausted, Unavailable
from libs.testing import FakeClock
from services.worker import runs
from services.worker.engine.kv_events import KvCleared, KvEvent, KvRemoved, KvStored, KvTier
from services.worker.kv_convert import changes_to_pb
from services.worker.kv_watch import GATHER_S, LIMITS, KvChanges, KvLimits, KvLog

WORKER = "workers/w1"
BLOCK_TOKENS = 16
SMALL = KvLimits(blocks=60, watchers=3, pending=24, message=5)
PATIENCE_S = 5.0

Blocks = dict[int, tuple[int | None, KvTier]]


class Reader:
    """A watcher that believes what it reads."""

    def __init__(self) -> None:
        self.blocks: Blocks = {}
        self.sequence = 0
        self.is_complete = False
        self.cleared = 0

    def apply(self, changes: KvChanges, limits: KvLimits = LIMITS) -> None:
        self.sequence += 1
        assert changes.sequence == self.sequence
        told = sum(len(event.hashes) for event in changes.events if hasattr(event, "hashes"))
        assert told <= limits.message
        for event in changes.events:
            if isinstance(event, KvStored):
                before = event.parent
                for name in event.hashes:
                    self.blocks[name] = before, event.tier
                    before = name
            elif isinstance(event, KvRemoved):
                for name in event.hashes:
                    self.blocks.pop(name, None)
            else:
                self.blocks.clear()
                self.cleared += 1
                self.is_complete = False
        if changes.completes_listing:
            assert not self.is_complete, "a listing is completed once"
            self.is_complete = True


class Watching:
    """A watcher in this process, which reads when it is told to."""

    def __init__(self, log: KvLog, clock: FakeClock) -> None:
        self.reader = Reader()
        self.clock = clock
        self.stream = log.watch()

    async def read(self) -> KvChanges:
        """The next message, once the clock has let it be gathered."""
        reading = asyncio.ensure_future(anext(self.stream))
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not reading.done():
                    self.clock.advance(GATHER_S)
                    await asyncio.sleep(0)
                changes = await reading
        finally:
            reading.cancel()
        self.reader.apply(changes)
        return changes


@asynccontextmanager
async def watching(log: KvLog, clock: FakeClock) -> AsyncIterator[Watching]:
    watcher = Watching(log, clock)
    async with aclosing(watcher.stream):
        yield watcher


def make(clock: FakeClock, limits: KvLimits = LIMITS, *, bookmark_s: float = PATIENCE_S) -> KvLog:
    return KvLog(BLOCK_TOKENS, clock=clock, worker=WORKER, limits=limits, bookmark_s=bookmark_s)


def restarts(cause: str) -> float:
    labels = {"cause": cause}
    return REGISTRY.get_sample_value("maas_worker_kv_restarts_total", labels) or 0.0


async def test_an_empty_cache_is_listed_with_one_message() -> None:
    clock = FakeClock()
    async with watching(make(clock), clock) as watcher:
        assert await watcher.read() == KvChanges(1, [], completes_listing=True)


async def test_blocks_that_follow_each_other_are_listed_in_one_event() -> None:
    clock = FakeClock()
    log = make(clock)
    log.add([KvStored((1, 2, 3), None), KvStored((4, 5), 2), KvStored((6,), 5, KvTier.HOST)])
    log.add([KvRemoved((1, 77)), KvStored((3,), 2, KvTier.HOST)])

    async with watching(log, clock) as watcher:
        changes = await watcher.read()

    assert changes.events == [
        KvStored((2,), 1),
        KvStored((3,), 2, KvTier.HOST),
        KvStored((4, 5), 2),
        KvStored((6,), 5, KvTier.HOST),
    ]
    assert changes.completes_listing


async def test_changes_are_gathered_and_then_told_in_order() -> None:
    clock = FakeClock()
    log = make(clock)
    async with watching(log, clock) as watcher:
        await watcher.read()
        reading = asyncio.ensure_future(anext(watcher.stream))
        log.add([KvStored((1,), None)])
        for _ in range(5):
            await asyncio.sleep(0)
        assert not reading.done()
        log.add([KvStored((2,), 1), KvRemoved((9,))])
        log.add([KvRemoved((2,))])

        clock.advance(GATHER_S)
        changes = await reading

    assert changes.events == [KvStored((1,), None), KvStored((2,), 1), KvRemoved((2,))]
    assert (changes.sequence, changes.completes_listing) == (2, False)


async def test_who_hears_nothing_new_gets_signs_of_life() -> None:
    clock = FakeClock()
    async with watching(make(clock, bookmark_s=0.001), clock) as watcher:
        await watcher.read()

        assert await watcher.read() == KvChanges(2, [], completes_listing=False)
        assert await watcher.read() == KvChanges(3, [], completes_listing=False)


async def test_what_the_engine_has_lost_track_of_is_forgotten_and_listed_anew() -> None:
    clock = FakeClock()
    log = make(clock)
    log.add([KvStored((1, 2), None)])
    before = restarts("engine")
    async with watching(log, clock) as watcher:
        await watcher.read()
        log.add([KvStored((3,), 2), KvCleared(), KvStored((4,), None)])

        changes = await watcher.read()

    assert changes.events == [KvCleared(), KvStored((4,), None)]
    assert changes.completes_listing
    assert restarts("engine") == before + 1


async def test_more_blocks_than_are_remembered_are_forgotten() -> None:
    clock = FakeClock()
    log = make(clock, KvLimits(blocks=4))
    before = restarts("full")
    async with watching(log, clock) as watcher:
        await watcher.read()
        log.add([KvStored((1, 2, 3), None)])
        log.add([KvStored((3,), 2, KvTier.HOST), KvStored((4,), 3)])
        assert restarts("full") == before
        log.add([KvStored((5, 6), None)])

        assert (await watcher.read()).events == [KvCleared(), KvStored((5, 6), None)]
        log.add([KvStored((11, 12, 13, 14, 15), None)])
        assert (await watcher.read()).events == [KvCleared()]

    assert log.blocks == 0
    assert restarts("full") == before + 2


async def test_who_reads_too_slowly_starts_anew_and_harms_nobody() -> None:
    clock = FakeClock()
    log = make(clock, KvLimits(pending=10))
    before = restarts("slow_watcher")
    async with watching(log, clock) as slow, watching(log, clock) as quick:
        await slow.read()
        await quick.read()
        for name in range(1, 12):
            log.add([KvStored((name,), name - 1 or None)])
            await quick.read()

        changes = await slow.read()

    assert changes.events == [KvCleared(), KvStored(tuple(range(1, 12)), None)]
    assert changes.completes_listing
    assert quick.reader.blocks == slow.reader.blocks
    assert quick.reader.cleared == 0
    assert restarts("slow_watcher") == before + 1


async def test_watchers_beyond_the_bound_are_refused_until_one_has_gone() -> None:
    clock = FakeClock()
    log = make(clock, SMALL)
    async with watching(log, clock) as first, watching(log, clock) as second:
        async with watching(log, clock) as third, watching(log, clock) as fourth:
            for watcher in (first, second, third):
                await watcher.read()
            with pytest.raises(ResourceExhausted):
                await fourth.read()
        assert log.watchers == 2

        async with watching(log, clock) as later:
            await later.read()
            assert log.watchers == 3
    assert log.watchers == 0


async def test_a_cancelled_watcher_leaves_nothing_behind() -> None:
    clock = FakeClock()
    log = make(clock)
    stream = log.watch()
    await anext(stream)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    assert log.watchers == 1

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert log.watchers == 0
    assert clock.pending == 0


async def test_an_engine_that_tells_nothing_is_not_watched() -> None:
    log = KvLog(0, clock=FakeClock(), worker=WORKER)

    with pytest.raises(NotImplementedHere):
        await anext(log.watch())


async def test_the_end_of_the_worker_ends_all_watches_and_those_that_come_later() -> None:
    clock = FakeClock()
    log = make(clock)
    async with watching(log, clock) as watcher:
        await watcher.read()
        log.close(runs.lost)
        log.close(runs.draining)

        with pytest.raises(Unavailable) as caught:
            await watcher.read()
    assert caught.value.reason is runs.lost(WORKER).reason
    assert log.watchers == 0

    with pytest.raises(Unavailable):
        await anext(log.watch())


@pytest.mark.parametrize("seed", range(8))
async def test_a_listing_is_exact_whatever_changes_while_it_is_read(seed: int) -> None:
    """Watchers of all speeds; whenever one has heard all there is, it knows all there is."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    log, truth = make(FakeClock(), SMALL), Reader()
    readers = [(log._enter(), Reader(), chance.random()) for _ in range(SMALL.watchers)]
    completed = 0
    for number in range(400):
        for event in _change(chance, number, truth.blocks):
            truth.apply(KvChanges(truth.sequence + 1, [event], completes_listing=False))
            if len(truth.blocks) > SMALL.blocks:
                truth.blocks.clear()
                truth.apply(KvChanges(truth.sequence + 1, [event], completes_listing=False))
            log.add([event])
        assert log.blocks == len(truth.blocks)
        assert log._index._tiers.keys() <= truth.blocks.keys(), "nothing is kept of what is gone"
        for watcher, reader, speed in readers:
            if chance.random() > speed:
                continue
            changes = watcher.take()
            reader.apply(changes, SMALL)
            completed += changes.completes_listing
            if reader.is_complete and not watcher.has_more:
                assert reader.blocks == truth.blocks
            if changes.completes_listing:
                assert reader.blocks == truth.blocks

    assert completed > SMALL.watchers
    assert sum(reader.cleared for _, reader, _ in readers) > 0


def _change(chance: random.Random, number: int, there: Blocks) -> Sequence[KvEvent]:
    kind = chance.random()
    names = sorted(there)
    if kind < 0.01:
        return [KvCleared()]
    if kind < 0.55 or not names:
        start = (number + 1) * 100
        parent = chance.choice([None, *names])
        return [KvStored(tuple(range(start, start + chance.randrange(8))), parent)]
    if kind < 0.7:
        name = chance.choice(names)
        return [KvStored((name,), there[name][0], chance.choice(list(KvTier)))]
    return [KvRemoved(tuple(chance.sample([*names, 1, 2], k=min(len(names), 4))))]


def test_messages_say_what_changed() -> None:
    changes = KvChanges(
        7,
        [
            KvCleared(),
            KvStored((1 << 63, 0), None),
            KvStored((5,), 0, KvTier.HOST),
            KvRemoved((5,)),
        ],
        completes_listing=True,
    )

    response = changes_to_pb(changes)

    assert response.snapshot_complete
    assert response.batch.sequence == 7
    cleared, first, second, removed = response.batch.events
    assert cleared.HasField("cleared")
    assert list(first.stored.block_hashes) == [1 << 63, 0]
    assert not first.stored.HasField("parent_hash")
    assert first.stored.tier == engine_pb2.KV_TIER_DEVICE
    assert second.stored.HasField("parent_hash")
    assert (second.stored.parent_hash, second.stored.tier) == (0, engine_pb2.KV_TIER_HOST)
    assert list(removed.removed.block_hashes) == [5]
