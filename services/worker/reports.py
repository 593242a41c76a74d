"""Which executions started and ended, until the scheduler has been told. Bounded."""

from __future__ import annotations

import asyncio

PENDING_MAX = 65_536


class Reports:
    """Pending reports of one worker. While nobody is connected nothing is kept.

    Attributes:
        changed: set by every report; the reader clears it.
        overflowed: more happened than is kept: the reader has to repeat the whole state.
    """

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.overflowed = False
        self._started: list[str] = []
        self._ended: list[str] = []
        self._is_open = False

    def open(self) -> None:
        """Starts to keep reports, from nothing: the reader knows the state of this moment."""
        self.overflowed = False
        self._started.clear()
        self._ended.clear()
        self._is_open = True

    def close(self) -> None:
        """Keeps nothing more."""
        self._is_open = False

    def started(self, execution_id: str) -> None:
        """An execution is in the engine."""
        self._add(self._started, execution_id)

    def ended(self, execution_id: str) -> None:
        """An execution is over, and its place is free."""
        self._add(self._ended, execution_id)

    def take(self, most: int) -> tuple[list[str], list[str]]:
        """Removes and returns the oldest: at most that many started, and that many ended.

        An end never comes before its start: ends wait while starts are left.
        """
        started = self._started[:most]
        del self._started[:most]
        ended = [] if self._started else self._ended[:most]
        del self._ended[: len(ended)]
        return started, ended

    def _add(self, pending: list[str], execution_id: str) -> None:
        if not self._is_open:
            return
        if len(pending) >= PENDING_MAX:
            self.overflowed = True
        else:
            pending.append(execution_id)
        self.changed.set()
