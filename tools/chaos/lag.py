"""Notices when a process of ours stood still: what it should have read had to wait for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

PERIOD_S = 0.02
LAG_MIN_S = 0.1
"""Less than that is not noted."""
LAGS_MAX = 10_000


@dataclass(slots=True)
class Lags:
    """Times in which the event loop did not turn.

    Attributes:
        found: first and last moment of each, on the clock of all loops of this machine; no more
            than LAGS_MAX.
    """

    found: list[tuple[float, float]] = field(default_factory=list)

    async def watch(self) -> None:
        """Notes them, without end."""
        loop = asyncio.get_running_loop()
        while len(self.found) < LAGS_MAX:
            before_s = loop.time()
            await asyncio.sleep(PERIOD_S)
            now_s = loop.time()
            if now_s - before_s > PERIOD_S + LAG_MIN_S:
                self.found.append((before_s, now_s))
