"""Waiting for what other tasks and processes do, where no clock of ours can be moved."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

INTERVAL_S = 0.002


async def eventually(
    condition: Callable[[], bool | Awaitable[bool]], *, within_s: float = 5.0
) -> None:
    """Waits until a condition holds, looking every 2 ms.

    Raises:
        TimeoutError: it did not hold in time.
    """
    async with asyncio.timeout(within_s):
        while True:
            found = condition()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(INTERVAL_S)
