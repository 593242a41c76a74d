"""Wakes readers that collect output before they get a frame.

All readers with the same interval are woken at the same moments, the multiples of the interval, so
that their frames leave together: a frame that leaves alone costs several times as much.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# A timer may fire this share of the interval early and still count as in time.
_EARLY = 0.25


class Ticker:
    """Timers by interval. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[float, list[Callable[[], None]]] = {}

    def wait(self, interval_s: float, wake: Callable[[], None]) -> None:
        """Has `wake` called at the next multiple of an interval; at most one interval from now."""
        waiting = self._waiting.get(interval_s)
        if waiting is not None:
            waiting.append(wake)
            return
        self._waiting[interval_s] = [wake]
        loop = asyncio.get_running_loop()
        passed = int(loop.time() / interval_s + _EARLY)
        loop.call_at((passed + 1) * interval_s, self._tick, interval_s)

    def _tick(self, interval_s: float) -> None:
        for wake in self._waiting.pop(interval_s):
            wake()
