"""An output whose time is up ends well, with what it has."""

from __future__ import annotations

import asyncio

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from libs.testing import FakeClock
from services.worker.executions import WATCH_TICK_S
from tests.integration.services.worker.harness import (
    STEP_S,
    STEPWISE,
    eventually,
    execution,
    make_engine,
    running_worker,
)

TIME_LIMIT = generation_pb2.FINISH_REASON_TIME_LIMIT


def limited(lane: int, seconds: float, **others: object) -> engine_pb2.Execution:
    made = execution(lane, tokens=400, **others)  # type: ignore[arg-type] # a test names its own fields
    made.time_limit.FromNanoseconds(round(seconds * 1e9))
    return made


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_was_released_stays_and_the_end_is_no_failure() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(limited(1, 5 * STEP_S), execution(2, tokens=400))
        await gateway.read()
        while gateway.told[1].ended is None:
            await turns()
            clock.advance(STEP_S)
            await gateway.read()

        assert gateway.told[1].end.reason == TIME_LIMIT
        latest = 5 + WATCH_TICK_S / STEP_S + 1
        assert 1 <= len(gateway.told[1].token_ids) <= latest
        await eventually(lambda: worker.executions.running_ids() == ["execution-2"])


async def test_all_outputs_end_with_the_time() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(limited(1, 1.0, more_lanes=[2, 3]))
        await gateway.read()
        await turns()
        clock.advance(2.0)
        await gateway.until_ended(1, 2, 3)

        assert {gateway.told[lane].end.reason for lane in (1, 2, 3)} == {TIME_LIMIT}
        await eventually(lambda: worker.executions.count == 0)
        assert worker.reports.take(9) == (["execution-1"], ["execution-1"])


async def test_time_that_is_up_at_the_start_gives_an_empty_output() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        submitted: list[object] = []
        worker.engine.submit = lambda *given: submitted.append(given)  # type: ignore[method-assign] # nothing may arrive there
        await gateway.send(limited(1, 0, more_lanes=[2]))
        await gateway.until_ended(1, 2)

        assert gateway.told[1].input_tokens == 4
        assert {gateway.told[lane].end.reason for lane in (1, 2)} == {TIME_LIMIT}
        assert gateway.told[1].token_ids == []
        assert submitted == []
        assert worker.executions.count == 0


async def test_time_that_passes_while_the_prompt_is_made_gives_an_empty_output() -> None:
    clock = FakeClock()
    async with running_worker(clock=clock) as worker, worker.gateway() as gateway:
        admission = worker.executions._admission
        work = admission.work

        def slow(made: engine_pb2.Execution) -> object:
            clock.advance(60)
            return work(made)

        admission.work = slow  # type: ignore[method-assign,assignment] # as a long prompt takes its time
        await gateway.send(limited(1, 30, text="long " * 1200))
        await gateway.until_ended(1)

        # The prompt does not fit; what fits is the next one.
        assert gateway.told[1].reason == "CONTEXT_LENGTH_EXCEEDED"
        told = await gateway.run(limited(2, 30, text="grandmother " * 400))
        assert (told.end.reason, told.token_ids) == (TIME_LIMIT, [])
