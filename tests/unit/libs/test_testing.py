"""libs/testing: the clock that tests move."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from libs.clock import SystemClock
from libs.testing import FakeClock


async def test_sleepers_wake_in_order_when_their_time_has_come() -> None:
    clock = FakeClock()
    woken: list[float] = []

    async def sleep(seconds: float) -> None:
        await clock.sleep_s(seconds)
        woken.append(seconds)

    async with asyncio.TaskGroup() as group:
        for seconds in (3.0, 1.0, 2.0):
            group.create_task(sleep(seconds))
        await asyncio.sleep(0)
        clock.advance(0.5)
        await asyncio.sleep(0)
        assert woken == []
        clock.advance(1.5)
        await asyncio.sleep(0)
        assert woken == [1.0, 2.0]
        clock.advance(1)

    assert woken == [1.0, 2.0, 3.0]


def test_both_clocks_move_together() -> None:
    clock = FakeClock()
    now, monotonic_s = clock.now(), clock.monotonic_s()

    clock.advance(90)

    assert (clock.now() - now).total_seconds() == 90
    assert clock.monotonic_s() - monotonic_s == 90


async def test_timers_go_off_in_order_with_sleepers_and_can_be_taken_back() -> None:
    clock = FakeClock()
    called: list[float] = []
    cancels = {
        seconds: clock.call_after(seconds, lambda seconds=seconds: called.append(seconds))  # type: ignore[misc] # called later
        for seconds in (3.0, 1.0, 2.0, 2.5)
    }
    cancels[2.0]()
    cancels[2.0]()

    clock.advance(0.9)
    assert (called, clock.pending) == ([], 3)
    clock.advance(1.7)

    assert (called, clock.pending) == ([1.0, 2.5], 1)


async def test_a_timer_may_set_another_and_take_one_back() -> None:
    clock = FakeClock()
    called: list[str] = []
    cancel = clock.call_after(2, lambda: called.append("second"))

    def first() -> None:
        called.append("first")
        cancel()
        clock.call_after(1, lambda: called.append("third"))

    clock.call_after(1, first)
    clock.advance(2)
    assert called == ["first"]
    clock.advance(1)

    assert called == ["first", "third"]


async def test_a_sleeper_that_is_cancelled_leaves_nothing_behind() -> None:
    clock = FakeClock()
    sleeper = asyncio.ensure_future(clock.sleep_s(1))
    await asyncio.sleep(0)
    assert clock.pending == 1

    sleeper.cancel()
    await asyncio.wait([sleeper])

    assert clock.pending == 0


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.0004, 0.0106])
def test_a_timer_of_the_system_goes_off_once_and_not_before_its_turn(seconds: float) -> None:
    async def main() -> None:
        clock = SystemClock()
        gone_off: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        before_s = clock.monotonic_s()
        clock.call_after(seconds, lambda: gone_off.set_result(clock.monotonic_s() - before_s))
        clock.call_after(seconds, lambda: gone_off.set_result(0))()
        assert not gone_off.done()
        # The loop's clock has whole milliseconds.
        assert await asyncio.wait_for(gone_off, 5) >= seconds - 0.001

    uvloop.run(main())


async def test_a_timer_without_a_wait_goes_off_in_the_next_turn() -> None:
    called: list[float] = []
    FakeClock().call_after(0, lambda: called.append(0))
    assert called == []

    await asyncio.sleep(0)

    assert called == [0]
