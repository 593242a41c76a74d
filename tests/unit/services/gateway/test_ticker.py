"""Readers that collect output are woken together, and within bounded time."""

from __future__ import annotations

import asyncio
from functools import partial

from services.gateway.ticker import Ticker

INTERVAL_S = 0.05


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


async def test_intervals_do_not_wait_for_each_other() -> None:
    ticker = Ticker()
    slow = asyncio.create_task(woken(ticker, 0.5))

    await woken(ticker, 0.02)

    assert not slow.done()
    slow.cancel()
