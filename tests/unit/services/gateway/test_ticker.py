"""Readers that collect output are woken together, and within bounded time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextvars import Context
from functools import partial

import pytest
from typing_extensions import TypeVarTuple, override

from services.gateway.ticker import Ticker

INTERVAL_S = 0.05
Arguments = TypeVarTuple("Arguments")


async def woken(ticker: Ticker, interval_s: float) -> float:
    """Waits to be woken; returns after how many seconds."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    began_s = loop.time()
    ticker.wait(interval_s, event.set)
    async with asyncio.timeout(5):
        await event.wait()
    return loop.time() - began_s


async def test_all_that_wait_for_one_interval_are_woken_in_one_turn() -> None:
    ticker, order = Ticker(), list[int]()
    is_over = asyncio.Event()
    for number in range(5):
        ticker.wait(INTERVAL_S, partial(order.append, number))
    assert order == []
    ticker.wait(INTERVAL_S, is_over.set)

    await is_over.wait()

    assert order == [0, 1, 2, 3, 4]
    assert ticker._waiting == {}


async def test_the_moments_of_waking_are_an_interval_apart() -> None:
    ticker = Ticker()
    await woken(ticker, INTERVAL_S)
    loop = asyncio.get_running_loop()
    began_s = loop.time()

    for _ in range(4):
        await woken(ticker, INTERVAL_S)

    assert loop.time() - began_s >= 3 * INTERVAL_S


async def test_who_waits_again_when_woken_is_woken_at_the_next_moment() -> None:
    ticker, times = Ticker(), list[float]()
    loop = asyncio.get_running_loop()
    is_over = asyncio.Event()

    def wake() -> None:
        times.append(loop.time())
        if len(times) == 3:
            is_over.set()
        else:
            ticker.wait(INTERVAL_S, wake)

    ticker.wait(INTERVAL_S, wake)
    await is_over.wait()

    assert times[2] - times[0] >= 1.5 * INTERVAL_S


class StillLoop(asyncio.SelectorEventLoop):
    """A loop whose time stands still. It notes when timers are due."""

    def __init__(self, now_s: float) -> None:
        super().__init__()
        self._now_s = now_s
        self.due_s: list[float] = []

    @override
    def time(self) -> float:
        return self._now_s

    @override
    def call_at(
        self,
        when: float,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        self.due_s.append(when)
        return super().call_at(when, callback, *args, context=context)


def due_in_s(now_s: float, interval_s: float) -> float:
    """Returns after how many seconds somebody is woken who comes at that time."""

    async def wait() -> None:
        Ticker().wait(interval_s, lambda: None)

    with contextlib.closing(StillLoop(now_s)) as loop:
        loop.run_until_complete(wait())
        (due_s,) = loop.due_s
        return due_s - now_s


@pytest.mark.parametrize("interval_s", [0.001, 0.08, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 0.74, 0.76, 0.9, 0.99, 0.9999])
def test_nobody_waits_for_longer_than_the_interval(share: float, interval_s: float) -> None:
    waited_s = due_in_s((1000 + share) * interval_s, interval_s)

    slack_s = min(0.002, interval_s / 4)
    assert slack_s - 1e-9 <= waited_s <= interval_s + slack_s + 1e-9


@pytest.mark.parametrize("interval_s", [0.001, 0.08, 1.0])
def test_what_a_timer_has_woken_early_waits_for_the_moment_after(interval_s: float) -> None:
    early_s = min(0.001, interval_s / 5)

    waited_s = due_in_s(1000 * interval_s - early_s, interval_s)

    assert waited_s == pytest.approx(interval_s + early_s)


async def test_intervals_do_not_wait_for_each_other() -> None:
    ticker = Ticker()
    slow = asyncio.create_task(woken(ticker, 0.5))

    await woken(ticker, 0.02)

    assert not slow.done()
    slow.cancel()
