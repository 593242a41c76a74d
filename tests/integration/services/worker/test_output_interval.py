"""Output that may wait: which messages leave, and when, over real gRPC."""

from __future__ import annotations

import asyncio

import pytest
from maas.inference.v1 import generation_pb2

from libs.testing import FakeClock
from tests.integration.services.worker.harness import (
    STEP_S,
    STEPWISE,
    Gateway,
    execution,
    make_engine,
    running_worker,
)

MAX_TOKENS = generation_pb2.FINISH_REASON_MAX_TOKENS


async def step(clock: FakeClock, gateway: Gateway, seconds: float = STEP_S) -> None:
    """One step of a STEPWISE engine, and the message that comes of it."""
    for _ in range(20):
        await asyncio.sleep(0)
    clock.advance(seconds)
    await gateway.read()


async def elapse(clock: FakeClock, steps: int) -> None:
    """Some steps of a STEPWISE engine, whether or not a message comes of them."""
    for _ in range(steps):
        for _ in range(20):
            await asyncio.sleep(0)
        clock.advance(STEP_S)
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("stops", [[], ["\ue000never"]])
async def test_with_an_output_interval_only_the_first_token_and_the_end_leave_at_once(
    stops: list[str],
) -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=12, stops=stops, interval_s=8 * STEP_S + 0.001))
        await gateway.read()
        await step(clock, gateway)
        assert not worker.executions._delivery.routes.holding, "the rest is handed on as columns"
        # Five wait: the first of them is not yet old enough at the fifth.
        await elapse(clock, 5)
        assert len(gateway.messages) == 2
        clock.advance(STEP_S / 2)
        await gateway.read()
        await elapse(clock, 5)
        await step(clock, gateway)
        await gateway.until_ended(1)

        assert [len(message.token_ids) for message in gateway.messages] == [0, 1, 5, 5, 1]
        assert gateway.messages[-1].ended[0].end.reason == MAX_TOKENS


async def test_an_execution_without_an_output_interval_makes_the_stream_prompt() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=9, interval_s=1), execution(2, tokens=4))
        await gateway.read()
        for _ in range(4):
            await step(clock, gateway)

        lanes = [list(message.lanes) for message in gateway.messages]
        assert lanes == [[], [1, 2], [1, 2], [1, 2], [1, 2]]
        assert gateway.told[2].end.reason == MAX_TOKENS
        await elapse(clock, 4)
        await step(clock, gateway)
        assert list(gateway.messages[-1].token_counts) == [5]
        assert gateway.told[1].end.reason == MAX_TOKENS


async def test_the_first_token_of_a_continuation_leaves_at_once_too() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=9, continues=[65, 66], interval_s=1))
        await gateway.read()

        await step(clock, gateway)

        assert [len(message.token_ids) for message in gateway.messages] == [0, 1]


async def test_an_abort_takes_along_what_waits() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=99, interval_s=1))
        await gateway.read()
        await step(clock, gateway)
        await elapse(clock, 5)
        assert len(gateway.messages) == 2

        await gateway.send(abort_lanes=[1])
        await gateway.until_ended(1)

        assert (len(gateway.messages), len(gateway.told[1].token_ids)) == (3, 6)


@pytest.mark.parametrize("interval_s", [-0.001, 1.001, 4e9])
async def test_an_output_interval_out_of_range_is_refused(interval_s: float) -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        told = await gateway.run(execution(1, interval_s=interval_s))

        assert told.reason == "INVALID_FIELD"
        assert dict(told.failure.metadata)["field"] == "output_interval"


@pytest.mark.parametrize("interval_s", [0.0, 1.0])
async def test_an_output_interval_of_nothing_or_of_a_second_is_fine(interval_s: float) -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        told = await gateway.run(execution(1, tokens=3, interval_s=interval_s))

        assert (len(told.token_ids), told.end.reason) == (3, MAX_TOKENS)
