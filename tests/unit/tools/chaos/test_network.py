"""A link passes what it is given, unless it is told to lose it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tools.chaos.network import Jam, Link, Trouble

NAME = "clients>gateway"
LONG_S = 60.0
DATA = bytes(range(256)) * 40


@asynccontextmanager
async def echo() -> AsyncIterator[Link]:
    """A link to a server that sends back what it gets, and ends when its client does."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, Link(f"127.0.0.1:{port}") as link:
        yield link


@asynccontextmanager
async def connected(link: Link) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = link.endpoint.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        # The way through is there.
        writer.write(b"?")
        assert await reader.readexactly(1) == b"?"
        yield reader, writer
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(
    ("trouble", "seconds", "amount"),
    [
        (Trouble.DELAY, LONG_S, 20),
        (Trouble.HOLE, 0.05, 0),
        (Trouble.SLICES, LONG_S, 0),
        (Trouble.NARROW, LONG_S, 200_000),
    ],
)
async def test_lasting_trouble_loses_nothing(trouble: Trouble, seconds: float, amount: int) -> None:
    loop = asyncio.get_running_loop()
    async with echo() as link, connected(link) as (reader, writer):
        start_s = loop.time()
        link.jam(Jam(NAME, trouble, seconds, amount))
        writer.write(DATA)

        got = await reader.readexactly(len(DATA))

        assert got == DATA
        least_s = {Trouble.DELAY: 0.02, Trouble.HOLE: 0.05, Trouble.NARROW: 0.05}
        assert loop.time() - start_s >= least_s.get(trouble, 0.0)


async def test_slices_are_single_bytes() -> None:
    async with echo() as link:
        link.jam(Jam(NAME, Trouble.SLICES, LONG_S, 0))

        assert [len(piece) for piece in link.pieces(b"x" * 100)] == [1] * 64 + [36]


async def test_reset_ends_every_connection() -> None:
    async with echo() as link, connected(link) as (reader, _), connected(link) as (other, _):
        link.jam(Jam(NAME, Trouble.RESET, 0.0, 0))

        for one in (reader, other):
            with pytest.raises(ConnectionResetError):
                await one.read(1)
        assert link.cuts == 2


async def test_cut_comes_after_its_bytes_and_once() -> None:
    async with echo() as link:
        async with connected(link) as (reader, writer):
            link.jam(Jam(NAME, Trouble.CUT, 0.0, len(DATA)))
            writer.write(DATA)
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await reader.readexactly(2 * len(DATA))

        async with connected(link) as (reader, writer):
            writer.write(DATA)
            assert await reader.readexactly(len(DATA)) == DATA


@pytest.mark.parametrize("amount", [0, 1])
async def test_half_close_is_seen_as_an_end(amount: int) -> None:
    async with echo() as link, connected(link) as (reader, _):
        link.jam(Jam(NAME, Trouble.HALF_CLOSE, 0.0, amount))

        # Away from us the server hears it and hangs up, too; towards us we do.
        assert await reader.read(1) == b""


def test_trouble_is_a_line() -> None:
    jam = Jam(NAME, Trouble.NARROW, 1.5, 4000)

    assert jam.to_line().endswith("\n")
    assert Jam.of_line(jam.to_line()) == jam
