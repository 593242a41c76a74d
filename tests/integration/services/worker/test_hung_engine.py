"""What gateways and the scheduler see of a worker whose engine hangs, or is watched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from maas.engine.v1 import engine_service_pb2 as pb
from maas.inference.v1 import embedding_service_pb2

from libs.errors import Reason, Unavailable
from libs.testing import FakeClock
from services.worker import metrics
from services.worker.engine.base import EndReason, EngineDied, StepBatch
from services.worker.watchdog import CANARY, TICK_S, Patience
from tests.integration.services.worker.harness import (
    MODEL_VERSION,
    PATIENCE_S,
    TOKENIZER,
    Worker,
    execution,
    running_worker,
)
from tests.integration.services.worker.scripted import ScriptedEngine

PATIENCE = Patience(
    canary_after_s=4.0, silent_within_s=9.0, abort_within_s=20.0, adapter_within_s=30.0
)


@dataclass
class World:
    clock: FakeClock
    engine: ScriptedEngine
    worker: Worker
    failures: list[BaseException] = field(default_factory=list)

    async def elapse_until(self, condition: Callable[[], bool]) -> float:
        """Lets time pass; returns how much of it."""
        start_s = self.clock.monotonic_s()
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.clock.advance(TICK_S)
                await asyncio.sleep(0.001)
        return self.clock.monotonic_s() - start_s


@asynccontextmanager
async def watched() -> AsyncIterator[World]:
    clock = FakeClock()
    engine = ScriptedEngine(TOKENIZER.vocabulary_size)
    failures: list[BaseException] = []
    async with running_worker(
        clock=clock, engine=engine, on_failure=failures.append, patience=PATIENCE
    ) as worker:
        yield World(clock, engine, worker, failures)


async def test_executions_of_a_hung_engine_are_told_and_the_process_fails() -> None:
    async with watched() as world, world.worker.gateway() as gateway:
        await gateway.send(execution(1), execution(2))
        while len(world.engine.running) < 2:
            await gateway.read()
        world.engine.say(StepBatch(lanes=[1, 2], token_ids=[65, 66]))
        await gateway.read()

        noticed_s = await world.elapse_until(lambda: bool(world.failures))

        assert noticed_s <= 10.0
        await gateway.until_ended(1, 2)
        assert [told.reason for told in gateway.told.values()] == ["WORKER_LOST", "WORKER_LOST"]
        assert await gateway.call.code() is grpc.StatusCode.UNAVAILABLE
        assert [type(failure) for failure in world.failures] == [EngineDied]
        assert world.worker.executions.count == 0


async def test_a_call_of_embed_into_a_hung_engine_is_told() -> None:
    async with watched() as world:
        world.engine.may_embed.clear()
        request = pb.EmbedRequest(
            execution_id="embed-1",
            model_version=MODEL_VERSION,
            inputs=[embedding_service_pb2.EmbedInput(text="a")],
        )
        call = asyncio.create_task(world.worker.peer.call(world.worker.stub.Embed, request))
        await world.elapse_until(lambda: bool(world.engine.embedding))

        await world.elapse_until(call.done)

        error = call.exception()
        assert isinstance(error, Unavailable)
        assert error.reason is Reason.WORKER_LOST


async def test_canaries_are_seen_by_nobody() -> None:
    async with watched() as world:
        world.worker.reports.take(9)
        before = metrics.STEPS._value.get()

        await world.elapse_until(lambda: CANARY in world.engine.running)
        world.engine.say(StepBatch(lanes=[CANARY], token_ids=[65]))
        world.engine.end(CANARY, EndReason.MAX_TOKENS)
        await world.elapse_until(lambda: CANARY in world.engine.running)

        load = (await world.worker.peer.call(world.worker.stub.GetLoad, pb.GetLoadRequest())).load
        assert (load.running, load.waiting) == (0, 0)
        assert world.worker.executions.count == 0
        assert world.worker.reports.take(9) == ([], [])
        assert metrics.STEPS._value.get() == before


async def test_a_stuck_output_keeps_its_place_and_others_go_on() -> None:
    async with watched() as world, world.worker.gateway() as gateway:
        world.engine.hears_aborts = False
        await gateway.send(execution(1), execution(2))
        while len(world.engine.running) < 2:
            await gateway.read()
        await gateway.send(abort_lanes=[1])

        def answer() -> bool:
            world.engine.say(StepBatch(lanes=[2], token_ids=[65]))
            world.engine.end(CANARY, EndReason.MAX_TOKENS)
            return bool(metrics.STUCK_OUTPUTS._value.get() == 1)

        await world.elapse_until(answer)

        assert world.failures == []
        assert world.worker.executions.count == 2
        world.engine.end(1, EndReason.ABORTED)
        await gateway.until_ended(1)
        assert gateway.told[1].reason == "CALL_CANCELLED"
        assert gateway.told[2].ended is None
        assert world.worker.executions.count == 1
