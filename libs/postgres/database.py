"""A pool of connections whose failures are the suite's own errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import asyncpg
import structlog

from libs.config import PostgresSection, read_secret
from libs.errors import MaasError, unavailable

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Connection = Any
    Pool = Any

log = structlog.get_logger(__name__)

_AWAY = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    # Too many connections, no memory, no space on the disk.
    asyncpg.InsufficientResourcesError,
    # This process stood still inside a transaction, and the server gave up on it.
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InterfaceError,
    # The server has said its last word on an idle connection, and the end of it is not read yet.
    asyncpg.InternalClientError,
    # What the caller meant is unknown to the server now; repeating it is safe by design.
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
)


class Database:
    """Transactions on one schema. An async context manager; leaving closes the pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.terminate()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """Opens a transaction, READ COMMITTED. Leaving with an error rolls it back.

        Raises:
            Unavailable: the server is away, restarts, or the wait for a lock was too long. Whether
                a commit that was under way took effect is unknown, so what runs in here has to
                be safe to repeat.
        """
        with away_is_unavailable():
            async with self._pool.acquire() as connection, connection.transaction():
                yield connection

    async def fetch(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """Runs one statement; returns its rows. Raises as `transaction` does."""
        with away_is_unavailable():
            return await self._pool.fetch(statement, *arguments)

    async def fetch_row(self, statement: str, *arguments: object) -> asyncpg.Record | None:
        """Runs one statement; returns its first row. Raises as `transaction` does."""
        with away_is_unavailable():
            return await self._pool.fetchrow(statement, *arguments)


class away_is_unavailable:  # noqa: N801 - reads as a statement
    """Turns failures of the server into Unavailable."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # asyncpg's errors of use, as a value that does not fit its column, are ValueErrors too: a
        # defect, which must not look like an outage.
        is_away = isinstance(error, _AWAY) and not isinstance(error, ValueError)
        if isinstance(error, MaasError) or not is_away:
            return
        log.warning("database failed", cause=type(error).__name__)
        raise unavailable("postgresql") from error


async def connect(config: PostgresSection, *, schema: str, wait_s: float = 30.0) -> Database:
    """Opens the pool, waiting for a server that is still starting.

    Args:
        config: where to.
        schema: search path of every connection; also the role's own schema.
        wait_s: longest wait.

    Raises:
        Unavailable: the server did not answer in that time.
        ConfigError: the password file cannot be read.
    """
    password = read_secret(config.password_file) if config.password_file else None
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + wait_s
    delay_s = 0.05
    while True:
        try:
            return Database(await _create_pool(config, schema, password))
        except _AWAY as error:
            if loop.time() >= give_up_at:
                raise unavailable("postgresql") from error
        await asyncio.sleep(delay_s)
        delay_s = min(2 * delay_s, 1.0)


async def _create_pool(config: PostgresSection, schema: str, password: str | None) -> Pool:
    statement_ms = str(int(config.statement_timeout * 1000))
    return await asyncpg.create_pool(
        config.dsn,
        password=password,
        min_size=1,
        max_size=config.connections_max,
        timeout=5.0,
        command_timeout=config.statement_timeout + 5.0,
        server_settings={
            "application_name": f"maas-{schema}",
            "search_path": schema,
            "statement_timeout": statement_ms,
            "lock_timeout": statement_ms,
            "idle_in_transaction_session_timeout": "10000",
            "timezone": "UTC",
        },
        reset=_keep,
    )


async def _keep(_connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Spares the statement that would reset a connection's session each time it is given back.

    Nothing here changes a session: no LISTEN, no cursor or advisory lock beyond a transaction, no
    SET but SET LOCAL. What is left of a transaction the library itself rolls back before this.
    """
