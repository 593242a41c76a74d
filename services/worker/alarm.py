"""One wait for the earliest of many times, without looking at the clock in between."""

from __future__ import annotations

import asyncio

from libs.clock import Clock

_NEVER_S = float("inf")


class Alarm:
    """Wakes one task. Belongs to one event loop.

    Args:
        clock: whose monotonic time is meant.
        tick_s: it does not go off more often than this, which is also how late it may be.
    """

    def __init__(self, clock: Clock, tick_s: float) -> None:
        self._clock = clock
        self._tick_s = tick_s
        self._due_s = _NEVER_S
        self._is_set = asyncio.Event()
        self._sleeper: asyncio.Task[None] | None = None

    def set_by(self, due_s: float) -> None:
        """Goes off at that monotonic time at the latest; infinity changes nothing."""
        if due_s >= self._due_s:
            return
        self._due_s = due_s
        self._is_set.set()
        if self._sleeper is not None:
            # It would sleep for too long.
            self._sleeper.cancel()

    async def wait(self) -> None:
        """Waits until a time has come that was set, and forgets all that were."""
        earliest_s = self._clock.monotonic_s() + self._tick_s
        while (left_s := max(self._due_s, earliest_s) - self._clock.monotonic_s()) > 0:
            if self._due_s == _NEVER_S:
                await self._is_set.wait()
                continue
            self._sleeper = asyncio.create_task(self._clock.sleep_s(left_s), name="alarm")
            try:
                await asyncio.wait([self._sleeper])
            finally:
                self._sleeper.cancel()
                self._sleeper = None
        self._due_s = _NEVER_S
        self._is_set.clear()
