"""WatchKvEvents over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from maas.engine.v1 import engine_pb2
from maas.engine.v1 import engine_service_pb2 as pb
from prometheus_client import REGISTRY

from libs.errors import MaasError, NotImplementedHere, Reason, ResourceExhausted, Unavailable
from libs.testing import eventually
from services.worker.engine.base import EngineDied, StepBatch
from services.worker.engine.kv_events import KvEvent, KvRemoved, KvStored
from services.worker.engine.sim_cache import BLOCK_TOKENS
from services.worker.kv_watch import LIMITS
from tests.integration.services.worker.harness import (
    PATIENCE_S,
    TOKENIZER,
    Worker,
    execution,
    running_worker,
)
from tests.integration.services.worker.scripted import ALL_ABILITIES, ScriptedEngine
from tools.conformance.engine.kv_model import KvModel

ROUND_BLOCKS = LIMITS.pending // 4
# Many times what the transport takes for somebody who does not read.
ROUNDS_MAX = 40


def restarts() -> float:
    """How often a watcher was too slow."""
    labels = {"cause": "slow_watcher"}
    return REGISTRY.get_sample_value("maas_worker_kv_restarts_total", labels) or 0.0


def told(event: engine_pb2.KvEvent) -> list[KvEvent]:
    """An event as the engine would tell it; none for what forgets everything."""
    if event.HasField("stored"):
        return [KvStored(tuple(event.stored.block_hashes), event.stored.parent_hash or None)]
    return [KvRemoved(tuple(event.removed.block_hashes))] if event.HasField("removed") else []


class Watcher:
    """One stream, and what its reader believes."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.model = KvModel(BLOCK_TOKENS)
        self.sequence = 0
        self.listings = 0
        self.cleared = 0

    async def read(self) -> pb.WatchKvEventsResponse:
        async with asyncio.timeout(PATIENCE_S):
            response = await self.call.read()
        assert isinstance(response, pb.WatchKvEventsResponse), "the stream ended"
        self.sequence += 1
        assert response.batch.sequence == self.sequence
        for event in response.batch.events:
            if event.HasField("cleared"):
                self.cleared += 1
                self.model.names.clear()
            self.model.apply(told(event))
        self.listings += response.snapshot_complete
        return response

    async def until(self, names: Iterable[int]) -> None:
        while self.model.names != set(names):
            await self.read()


@asynccontextmanager
async def watching(worker: Worker) -> AsyncIterator[Watcher]:
    """Opens a watch; what is there has not been read."""
    async with worker.peer.stream(worker.stub.WatchKvEvents, pb.WatchKvEventsRequest()) as call:
        yield Watcher(call)


async def end_of_watch(worker: Worker, then: Callable[[Watcher], Awaitable[None]]) -> MaasError:
    """Watches until it is ended.

    Args:
        worker: that is watched.
        then: happens when what is there has been listed.
    """
    try:
        async with watching(worker) as watcher:
            await watcher.read()
            await then(watcher)
            while True:
                await watcher.read()
    except MaasError as error:
        return error


def scripted(*, kv_block_tokens: int = BLOCK_TOKENS) -> ScriptedEngine:
    abilities = replace(ALL_ABILITIES, kv_block_tokens=kv_block_tokens)
    return ScriptedEngine(TOKENIZER.vocabulary_size, abilities=abilities)


def stored(first: int, count: int, parent: int | None = None) -> KvStored:
    return KvStored(tuple(range(first, first + count)), parent)


async def test_watchers_learn_what_prompts_will_find() -> None:
    """Two watchers of the simulated engine; the second comes later and gets the same."""
    prompt = [40 + at % 50 for at in range(3 * BLOCK_TOKENS + 1)]
    async with running_worker() as worker, worker.gateway() as gateway:
        async with watching(worker) as first:
            assert (await first.read()).snapshot_complete
            await gateway.run(execution(1, ids=prompt))
            while first.model.prefix_blocks(prompt) < 3:
                await first.read()

            async with watching(worker) as second:
                assert (await second.read()).snapshot_complete
                assert second.model.names == first.model.names
                longer = [*prompt, *prompt]
                found = await gateway.run(execution(2, ids=longer))
                assert found.cached_tokens == BLOCK_TOKENS * 3
                while second.model.prefix_blocks(longer) < 6:
                    await second.read()
                await first.until(second.model.names)

        assert (first.listings, first.cleared) == (1, 0)
        info = await worker.peer.call(worker.stub.GetEngineInfo, pb.GetEngineInfoRequest())
        assert isinstance(info, pb.GetEngineInfoResponse)
        assert info.info.kv_block_tokens == BLOCK_TOKENS


async def test_a_large_cache_is_listed_in_several_messages() -> None:
    engine = scripted()
    blocks = 2 * LIMITS.message + 5
    engine.say(StepBatch(kv_events=[stored(1, blocks)]))
    async with running_worker(engine=engine) as worker, watching(worker) as first:
        await first.until(range(1, blocks + 1))

        async with watching(worker) as second:
            sizes = []
            while not second.listings:
                events = (await second.read()).batch.events
                sizes.append(sum(len(event.stored.block_hashes) for event in events))

        assert sizes == [LIMITS.message, LIMITS.message, 5]
        assert second.model.names == first.model.names


async def test_who_does_not_read_starts_anew_and_harms_nobody() -> None:
    """What was on its way is read first; then all is forgotten, and listed as it is now."""
    engine = scripted()
    before = restarts()
    async with running_worker(engine=engine) as worker:
        async with watching(worker) as slow, watching(worker) as quick:
            await slow.read()
            await quick.read()
            rounds = 0
            while restarts() == before:
                rounds += 1
                assert rounds < ROUNDS_MAX, "somebody who does not read gets everything"
                events = stored(1, ROUND_BLOCKS)
                engine.say(StepBatch(kv_events=[events]))
                await quick.until(events.hashes)
                engine.say(StepBatch(kv_events=[KvRemoved(events.hashes)]))
                await quick.until(())
            engine.say(StepBatch(kv_events=[stored(7, 3)]))
            await quick.until((7, 8, 9))

            while slow.listings < 2:
                await slow.read()

        assert slow.cleared == 1
        assert slow.model.names == {7, 8, 9}
        assert (quick.cleared, quick.listings) == (0, 1)


async def test_a_watcher_that_goes_makes_room_for_another() -> None:
    async with running_worker(engine=scripted()) as worker:

        async def has_room() -> bool:
            with suppress(ResourceExhausted):
                async with watching(worker) as watcher:
                    await watcher.read()
                    return True
            return False

        async with AsyncExitStack() as stack:
            for _ in range(LIMITS.watchers):
                watcher = await stack.enter_async_context(watching(worker))
                await watcher.read()
            assert not await has_room()

        await eventually(has_room)


async def test_the_death_of_the_engine_ends_the_watch() -> None:
    engine = scripted()
    died: list[BaseException] = []
    async with running_worker(engine=engine, on_failure=died.append) as worker:

        async def die(_: Watcher) -> None:
            engine.die()

        error = await end_of_watch(worker, die)

    assert (type(error), error.reason) == (Unavailable, Reason.WORKER_LOST)
    assert isinstance(died[0], EngineDied)


async def test_a_drain_ends_the_watch_when_nothing_runs_any_more() -> None:
    engine = scripted()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1))
        await eventually(lambda: bool(engine.running))
        drains = []

        async def drain(watcher: Watcher) -> None:
            drains.append(asyncio.create_task(worker.executions.drain()))
            engine.say(StepBatch(kv_events=[stored(1, 2)]))
            await watcher.until((1, 2))
            engine.end(1)

        error = await end_of_watch(worker, drain)
        await drains[0]

    assert (type(error), error.reason) == (Unavailable, Reason.WORKER_DRAINING)


async def test_an_engine_that_tells_nothing_cannot_be_watched() -> None:
    """As llama.cpp's."""

    async def nothing(_: Watcher) -> None:
        return

    async with running_worker(engine=scripted(kv_block_tokens=0)) as worker:
        error = await end_of_watch(worker, nothing)

    assert (type(error), error.reason) == (NotImplementedHere, Reason.NOT_IMPLEMENTED)
