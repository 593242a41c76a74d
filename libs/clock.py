"""Time, as a value that can be replaced.

The only module that reads the system's clocks; everything else takes a Clock.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

CancelTimer = Callable[[], None]
"""Takes a timer back. Nothing happens when it has gone off."""


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> datetime:
        """Wall clock, UTC, aware. For records, never for durations."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never go back. For durations and deadlines."""
        ...

    async def sleep_s(self, seconds: float) -> None:
        """Suspends for at least that long."""
        ...

    def call_after(self, seconds: float, callback: Callable[[], None]) -> CancelTimer:
        """Calls from the event loop after that long; a sleep without a task of its own.

        Args:
            seconds: so long, or up to a millisecond less where the event loop's clock is coarse; 0
                and less means in the next turn of the event loop.
            callback: must not raise.

        Returns:
            what takes it back.
        """
        ...


class SystemClock:
    """The clocks of the machine."""

    def now(self) -> datetime:
        """Wall clock, UTC, aware."""
        return datetime.now(UTC)  # noqa: TID251 - the one place

    def monotonic_s(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()  # noqa: TID251 - the one place

    async def sleep_s(self, seconds: float) -> None:
        """Suspends for at least that long."""
        await asyncio.sleep(seconds)

    def call_after(self, seconds: float, callback: Callable[[], None]) -> CancelTimer:
        """Calls from the event loop after that long."""
        # uvloop rounds to milliseconds. A timer that goes off early is set again for the rest, and
        # that is a second wake-up of the process.
        whole_s = math.ceil(seconds * 1000) / 1000
        return asyncio.get_running_loop().call_later(max(0.0, whole_s), callback).cancel
