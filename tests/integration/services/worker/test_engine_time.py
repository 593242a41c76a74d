"""Shares of the engine's time, as a gateway is told them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from libs.testing import FakeClock
from tests.integration.services.worker.harness import (
    STEP_S,
    STEPWISE,
    Gateway,
    execution,
    make_engine,
    running_worker,
)

CLOSE = 0.02


def took_s(gateway: Gateway, lane: int) -> float:
    ended = gateway.told[lane].ended
    assert ended is not None
    return ended.engine_time.ToNanoseconds() / 1e9


class Stepper:
    """Moves the clock step by step, and knows how long the engine has worked."""

    def __init__(self, clock: FakeClock, gateway: Gateway) -> None:
        self._clock = clock
        self._gateway = gateway
        self.busy_s = 0.0

    async def until(self, *lanes: int) -> None:
        """Steps until outputs have ended."""
        await self.while_(lambda: any(self._gateway.told[lane].ended is None for lane in lanes))

    async def while_(self, condition: Callable[[], bool]) -> None:
        """Steps while a condition holds. Every step brings a message."""
        while condition():
            for _ in range(20):
                await asyncio.sleep(0)
            self._clock.advance(STEP_S)
            self.busy_s += STEP_S
            await self._gateway.read()


async def test_the_shares_of_all_outputs_sum_to_the_time_that_the_engine_worked() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        stepper = Stepper(clock, gateway)
        # Three outputs of one execution count as three.
        await gateway.send(execution(1, tokens=30, more_lanes=[2, 3]), execution(4, tokens=7))
        await gateway.read()
        await stepper.until(4)
        await gateway.send(execution(5, tokens=40))
        await gateway.read()
        await stepper.until(1, 2, 3, 5)
        # Nothing to do for a while.
        clock.advance(1000.0)
        await gateway.send(execution(6, tokens=5))
        await gateway.read()
        await stepper.until(6)

        shares = [took_s(gateway, lane) for lane in range(1, 7)]
        assert sum(shares) == pytest.approx(stepper.busy_s, rel=CLOSE)
        assert shares[0] == pytest.approx(shares[1], rel=CLOSE)
        assert shares[5] == pytest.approx(5 * STEP_S, rel=CLOSE)


async def test_an_output_that_is_stopped_or_aborted_says_what_it_took_until_then() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        stepper = Stepper(clock, gateway)
        await gateway.send(execution(1, tokens=400), execution(2, tokens=400))
        await gateway.read()
        await stepper.while_(lambda: len(gateway.told[1].token_ids) < 10)
        await gateway.send(abort_lanes=[1])
        await gateway.until_ended(1)
        await stepper.while_(lambda: len(gateway.told[2].token_ids) < 20)
        await gateway.send(abort_lanes=[2])
        await gateway.until_ended(2)

        assert gateway.told[1].reason == "CALL_CANCELLED"
        assert took_s(gateway, 1) == pytest.approx(stepper.busy_s / 4, rel=0.1)
        assert took_s(gateway, 1) + took_s(gateway, 2) == pytest.approx(stepper.busy_s, rel=CLOSE)
