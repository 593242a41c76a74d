"""Time, as a value that can be replaced.

The only module that reads the system's clocks; everything else takes a Clock.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


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
