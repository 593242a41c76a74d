"""Wakes readers that collect output before they get a frame.

All readers with the same interval are woken at the same moments, the multiples of the interval, so
that their frames leave together: a frame that leaves alone costs several times as much.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# A timer may fire this much early, and what it wakes must still wait for the moment after: at most
# a share of the interval, and no more than the timers of the loop are inexact by.
_EARLY = 0.25
_EARLY_MAX_S = 0.002


class Ticker:
    """Timers by interval. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[float, list[Callable[[], None]]] = {}

    def wait(self, interval_s: float, wake: Callable[[], None]) -> None:
        """Has `wake` called at the next multiple of an interval.

        Args:
            interval_s: seconds. The wait is at most as long, plus _EARLY_MAX_S and what the loop is
                late by; whoever comes between two moments waits for less.
            wake: called once, with all others that wait for the same interval.
        """
        waiting = self._waiting.get(interval_s)
        if waiting is not None:
            waiting.append(wake)
            return
        self._waiting[interval_s] = [wake]
        loop = asyncio.get_running_loop()
        early_s = min(_EARLY * interval_s, _EARLY_MAX_S)
        passed = int((loop.time() + early_s) / interval_s)
        loop.call_at((passed + 1) * interval_s, self._tick, interval_s)

    def _tick(self, interval_s: float) -> None:
        for wake in self._waiting.pop(interval_s):
            wake()
