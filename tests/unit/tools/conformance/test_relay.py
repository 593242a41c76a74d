"""tools/conformance/relay.py: bytes pass until the connection is cut."""

from __future__ import annotations

import asyncio

import pytest

from tools.conformance.relay import Relay


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1024):
        writer.write(data)
        await writer.drain()
    writer.close()


async def test_bytes_pass_and_a_cut_resets_both_sides() -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, Relay(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as relay:
        host, _, port = relay.endpoint.rpartition(":")
        for cuts in (1, 2):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"

            assert await relay.cut() == 1

            with pytest.raises(ConnectionResetError):
                await reader.readexactly(1)
            writer.close()
            assert relay.cuts == cuts


async def test_address_where_nobody_listens_ends_the_connection() -> None:
    async with Relay("127.0.0.1:1") as relay:
        host, _, port = relay.endpoint.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))

        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
