"""A TCP connection in the middle, which can be cut: a client that loses its network."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Self

CHUNK_BYTES = 65536
_BACKLOG = 16
_AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER that makes closing a reset: what was not delivered yet is lost."""


class Relay:
    """Passes bytes between clients and one address. An async context manager.

    Attributes:
        target: host and port to connect to.
        cuts: how many connections were cut.
    """

    def __init__(self, target: str) -> None:
        """Prepares it.

        Args:
            target: host:port to connect to.
        """
        host, _, port = target.rpartition(":")
        self.target = (host.strip("[]"), int(port))
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.cuts = 0

    @property
    def endpoint(self) -> str:
        """host:port of the near side."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0, backlog=_BACKLOG)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        await self.cut()

    async def cut(self) -> int:
        """Resets every connection, on both sides; returns how many. New ones are let through."""
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        self.cuts += len(connections)
        return len(connections)

    async def _pass(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        forth: asyncio.StreamWriter | None = None
        # A cut connection is what the relay is for.
        with contextlib.suppress(asyncio.CancelledError, OSError):
            try:
                far, forth = await asyncio.open_connection(*self.target)
                await asyncio.gather(self.copy(near, forth), self.copy(far, back))
            finally:
                for writer in (back, forth):
                    if writer is not None:
                        _reset(writer)

    async def copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """Passes one direction of a connection to its end."""
        while data := await source.read(CHUNK_BYTES):
            target.write(data)
            await target.drain()
        target.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    found = writer.get_extra_info("socket")
    # A connection that has ended by itself has no socket left to set anything on.
    with contextlib.suppress(OSError):
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    writer.transport.abort()
