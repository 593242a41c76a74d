"""A clock that tests move."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

START = datetime(2026, 1, 1, tzinfo=UTC)


class FakeClock:
    """Time that stands still until `advance`. Sleepers wake when their time has come."""

    def __init__(self) -> None:
        self._elapsed_s = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> datetime:
        """2026-01-01 plus what was advanced."""
        return START + timedelta(seconds=self._elapsed_s)

    def monotonic_s(self) -> float:
        """Seconds advanced, from 1000."""
        return 1000.0 + self._elapsed_s

    async def sleep_s(self, seconds: float) -> None:
        """Waits until the clock was advanced that far."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self._elapsed_s + seconds, future))
        await future

    def advance(self, seconds: float) -> None:
        """Moves time on and wakes sleepers, earliest first."""
        self._elapsed_s += seconds
        due = sorted(
            (item for item in self._sleepers if item[0] <= self._elapsed_s),
            key=lambda item: item[0],
        )
        self._sleepers = [item for item in self._sleepers if item[0] > self._elapsed_s]
        for _, future in due:
            if not future.done():
                future.set_result(None)
