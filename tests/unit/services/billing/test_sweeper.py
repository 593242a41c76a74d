from __future__ import annotations

import asyncio

from libs.errors import unavailable
from libs.process import Background
from libs.testing import FakeClock
from services.billing.sweeper import sweep_forever


async def test_sweeper_goes_on_when_the_database_is_away() -> None:
    clock = FakeClock()
    rounds = 0

    async def sweep() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise unavailable("postgresql")

    async with Background() as background:
        background.start(sweep_forever(sweep, clock, interval_s=5), name="sweep")
        for want in (1, 2, 3):
            for _ in range(5):
                await asyncio.sleep(0)
            assert rounds == want
            clock.advance(5)
