"""Reads that may take long: few at a time, and none longer than its caller waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import asyncpg

from libs.errors import DeadlineExceeded, ResourceExhausted
from libs.postgres import Connection, Database

AT_ONCE_MAX = 3
"""Of the pool's connections, so that settlements always find one; an account has one of them."""
WAITING_MAX = 8
"""Of an account."""
ACCOUNTS_MAX = 64
"""That wait."""
_RETRY_S = 1.0
# The server gives up first; this only is for one that no longer answers.
_SLACK_S = 5.0


class Report:
    """An open transaction whose statements are over in time.

    Args:
        connection: of the transaction.
        timeout_s: longest time of a statement.
    """

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self.connection = connection
        self._timeout_s = timeout_s

    async def fetch(self, statement: str, arguments: Sequence[object]) -> list[asyncpg.Record]:
        """Runs a statement; returns its rows."""
        longest_s = self._timeout_s + _SLACK_S
        return await self.connection.fetch(statement, *arguments, timeout=longest_s)


@dataclass(slots=True)
class _Line:
    """Those of an account that read or wait; who has the lock is the first."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    length: int = 0


class Reports:
    """Makes transactions for reads that may take long. One for each process.

    Args:
        database: where to read.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._places = asyncio.Semaphore(AT_ONCE_MAX)
        self._lines: dict[str, _Line] = {}

    @asynccontextmanager
    async def open(
        self, account_id: str, timeout_s: float, *, advice: str
    ) -> AsyncIterator[Report]:
        """Opens a transaction once there is room for one more.

        Args:
            account_id: whose usage is read; one at a time, so that nobody waits for one account.
            timeout_s: longest wait for a place, and longest time of a statement.
            advice: how the caller asks for less, told when the time was too short.

        Raises:
            ResourceExhausted: QUEUE_FULL, too many wait already, or there was no place in time.
            DeadlineExceeded: a statement took longer.
            Unavailable: as Database.transaction says.
        """
        async with self._place(account_id, timeout_s), self._database.transaction() as connection:
            milliseconds = str(max(int(timeout_s * 1000), 1))
            await connection.execute(
                "SELECT set_config('statement_timeout', $1, true)", milliseconds
            )
            try:
                yield Report(connection, timeout_s)
            except asyncpg.QueryCanceledError:
                raise DeadlineExceeded(
                    f"there is too much to read in the time of the call: {advice}"
                ) from None

    @asynccontextmanager
    async def _place(self, account_id: str, timeout_s: float) -> AsyncIterator[None]:
        """Waits for the account's turn, then for a place."""
        is_full = len(self._lines) >= ACCOUNTS_MAX and account_id not in self._lines
        if is_full or (account_id in self._lines and self._lines[account_id].length >= WAITING_MAX):
            raise _no_place()
        line = self._lines.setdefault(account_id, _Line())
        line.length += 1
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    await line.lock.acquire()
            except TimeoutError:
                raise _no_place() from None
            try:
                await self._wait_for_place(timeout_s)
                try:
                    yield
                finally:
                    self._places.release()
            finally:
                line.lock.release()
        finally:
            line.length -= 1
            if not line.length:
                del self._lines[account_id]

    async def _wait_for_place(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._places.acquire()
        except TimeoutError:
            raise _no_place() from None


def _no_place() -> ResourceExhausted:
    return ResourceExhausted("too many reports are being made", retry_after_s=_RETRY_S)
