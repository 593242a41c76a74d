"""libs/testing: the clock that tests move."""

from __future__ import annotations

import asyncio

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
