"""A loop that did not turn is noticed."""

from __future__ import annotations

import asyncio
import threading

from tools.chaos.lag import LAG_MIN_S, Lags


async def test_loop_that_stood_still_is_noted_with_its_time() -> None:
    lags = Lags()
    watch = asyncio.create_task(lags.watch())
    loop = asyncio.get_running_loop()
    await asyncio.sleep(0)

    before_s = loop.time()
    threading.Event().wait(3 * LAG_MIN_S)
    after_s = loop.time()
    # Its timer is over, and comes with the next turns.
    for _ in range(5):
        await asyncio.sleep(0)
    watch.cancel()

    start_s, end_s = lags.found[0]
    assert start_s <= before_s
    assert end_s >= after_s
