from __future__ import annotations

import asyncio

from typing_extensions import override

from libs.testing import FakeClock
from services.worker.alarm import Alarm

TICK_S = 0.02


async def turns() -> None:
    """Lets every task that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


class Sleeper(FakeClock):
    """Counts how often somebody went to sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.naps: list[float] = []

    @override
    async def sleep_s(self, seconds: float) -> None:
        self.naps.append(round(seconds, 6))
        await super().sleep_s(seconds)


async def test_sleeps_once_until_the_time_that_was_set() -> None:
    clock = Sleeper()
    alarm = Alarm(clock, TICK_S)
    waiting = asyncio.ensure_future(alarm.wait())
    alarm.set_by(clock.monotonic_s() + 600)
    await turns()

    clock.advance(599)
    await turns()
    assert not waiting.done()
    clock.advance(1)
    await waiting

    assert clock.naps == [600]


async def test_an_earlier_time_is_not_slept_over() -> None:
    clock = Sleeper()
    alarm = Alarm(clock, TICK_S)
    waiting = asyncio.ensure_future(alarm.wait())
    alarm.set_by(clock.monotonic_s() + 600)
    await turns()

    alarm.set_by(clock.monotonic_s() + 1)
    alarm.set_by(clock.monotonic_s() + 300)
    await turns()
    clock.advance(1)
    await waiting

    assert clock.naps == [600, 1]


async def test_does_not_go_off_more_often_than_a_tick() -> None:
    clock = Sleeper()
    alarm = Alarm(clock, TICK_S)
    waiting = asyncio.ensure_future(alarm.wait())
    alarm.set_by(clock.monotonic_s())
    await turns()
    assert not waiting.done()

    clock.advance(TICK_S)
    await waiting

    assert clock.naps == [TICK_S]


async def test_without_a_time_it_sleeps_not_at_all() -> None:
    clock = Sleeper()
    alarm = Alarm(clock, TICK_S)
    alarm.set_by(float("inf"))
    waiting = asyncio.ensure_future(alarm.wait())
    await turns()

    clock.advance(1e6)
    await turns()

    assert not waiting.done()
    assert clock.naps == []
    waiting.cancel()


async def test_a_time_counts_once() -> None:
    clock = Sleeper()
    alarm = Alarm(clock, TICK_S)
    waiting = asyncio.ensure_future(alarm.wait())
    alarm.set_by(clock.monotonic_s() + 1)
    await turns()
    clock.advance(1)
    await waiting

    again = asyncio.ensure_future(alarm.wait())
    await turns()
    clock.advance(600)
    await turns()

    assert not again.done()
    again.cancel()
