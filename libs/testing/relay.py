"""A Unix socket in front of PostgreSQL's, which tests can take away and bring back."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, quote, urlsplit

SOCKET_NAME = ".s.PGSQL.5432"


class Relay:
    """Passes bytes both ways. An async context manager.

    Attributes:
        dsn: of the same database, through the relay.
    """

    def __init__(self, dsn: str, folder: Path) -> None:
        """Prepares it.

        Args:
            dsn: with a parameter `host` that names the folder of the server's socket.
            folder: where the relay's own socket is put; its path has to be short.
        """
        parts = urlsplit(dsn)
        self._target = Path(parse_qs(parts.query)["host"][0]) / SOCKET_NAME
        self._socket = folder / SOCKET_NAME
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.dsn = parts._replace(query=f"host={quote(str(folder))}").geturl()

    async def __aenter__(self) -> Self:
        await self.bring_back()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.take_away()

    async def bring_back(self) -> None:
        """Lets connections through again."""
        self._server = await asyncio.start_unix_server(self._pass, self._socket)

    async def take_away(self) -> None:
        """Cuts every connection and refuses new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._socket.unlink(missing_ok=True)
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _pass(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        far, forth = await asyncio.open_unix_connection(self._target)
        try:
            # A cut connection is what the relay is for.
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await asyncio.gather(_copy(near, forth), _copy(far, back))
        finally:
            for writer in (back, forth):
                writer.transport.abort()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        target.write(data)
        await target.drain()
    target.close()
