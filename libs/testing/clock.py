"""A clock that tests move."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from libs.clock import CancelTimer

START = datetime(2026, 1, 1, tzinfo=UTC)


class FakeClock:
    """Time that stands still until `advance`. Sleepers and timers wake when their time has come."""

    def __init__(self) -> None:
        self._elapsed_s = 0.0
        self._sleepers: list[_Timer] = []

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
        cancel = self.call_after(
            seconds, lambda: None if future.done() else future.set_result(None)
        )
        try:
            await future
        finally:
            cancel()

    def call_after(self, seconds: float, callback: Callable[[], None]) -> CancelTimer:
        """Calls from within `advance`, once the clock was advanced that far."""
        if seconds <= 0:
            return asyncio.get_running_loop().call_soon(callback).cancel
        timer = _Timer(self._elapsed_s + seconds, callback)
        self._sleepers.append(timer)

        def cancel() -> None:
            if timer in self._sleepers:
                self._sleepers.remove(timer)

        return cancel

    @property
    def pending(self) -> int:
        """Sleepers and timers that wait."""
        return len(self._sleepers)

    def advance(self, seconds: float) -> None:
        """Moves time on and wakes sleepers and timers, earliest first."""
        self._elapsed_s += seconds
        while due := [timer for timer in self._sleepers if timer.due_s <= self._elapsed_s]:
            earliest = min(due, key=lambda timer: timer.due_s)
            # Before the call, which may take others back or set new ones.
            self._sleepers.remove(earliest)
            earliest.callback()


@dataclass(frozen=True, slots=True, eq=False)
class _Timer:
    """What happens at a time of a FakeClock.

    Attributes:
        due_s: seconds advanced by then.
        callback: what to call.
    """

    due_s: float
    callback: Callable[[], None]
