"""libs/rpc/writer.py: writing to the stream of a call without a task for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from libs.rpc.writer import CallWriter

METHOD = "/test.Service/Stream"


class Streamer:
    """Writes messages to one call, each when the one before has been taken.

    Attributes:
        sent: messages handed to the writer.
        error: what ended the writing early.
        done: set when all are taken, or one is not.
    """

    def __init__(self, write: Callable[[Any], Any], messages: list[bytes]) -> None:
        self._messages = messages
        self._is_inside = False
        self._writer = CallWriter(write, self._on_done)
        self.sent = 0
        self.error: BaseException | None = None
        self.done = asyncio.Event()

    def start(self) -> None:
        """Writes the first message."""
        self._on_done(None)

    def _on_done(self, error: BaseException | None) -> None:
        assert not self._is_inside, "called from within write"
        assert not self._writer.is_busy
        if error is not None or self.sent == len(self._messages):
            self.error = error
            self.done.set()
            return
        self.sent += 1
        self._is_inside = True
        self._writer.write(self._messages[self.sent - 1])
        self._is_inside = False


@asynccontextmanager
async def serving(handler: Callable[[bytes, Any], Awaitable[None]]) -> AsyncIterator[Any]:
    """Serves one streaming method of plain bytes; gives what calls it."""
    server = grpc.aio.server()
    service, _, method = METHOD[1:].partition("/")
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        method: grpc.unary_stream_rpc_method_handler(handler)
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel.unary_stream(METHOD)
    await server.stop(0)


async def test_a_real_call_gets_all_messages_in_order() -> None:
    messages = [b"%d" % number for number in range(1000)]

    async def handler(_: bytes, context: Any) -> None:
        streamer = Streamer(context.write, messages)
        streamer.start()
        await streamer.done.wait()
        assert streamer.error is None

    async with serving(handler) as call:
        got = [message async for message in call(b"")]

    assert got == messages


async def test_a_message_waits_for_a_client_that_does_not_read() -> None:
    streamers: list[Streamer] = []

    async def handler(_: bytes, context: Any) -> None:
        streamers.append(Streamer(context.write, [b"x" * 1_000_000] * 50))
        streamers[0].start()
        await streamers[0].done.wait()

    async with serving(handler) as call:
        stream = call(b"")
        await stream.read()
        sent = -1
        while sent != streamers[0].sent:
            sent = streamers[0].sent
            await asyncio.sleep(0.02)
        assert streamers[0]._writer.is_busy
        assert sent < 50
        count = 1
        while await stream.read() is not grpc.aio.EOF:
            count += 1

    assert count == 50


async def test_a_client_that_leaves_ends_the_write_with_an_error() -> None:
    errors: list[BaseException | None] = []
    is_over = asyncio.Event()

    async def handler(_: bytes, context: Any) -> None:
        streamer = Streamer(context.write, [b"x" * 1_000_000] * 50)
        streamer.start()
        try:
            await asyncio.shield(streamer.done.wait())
        finally:
            # The handler is cancelled by the library; the writer is told all the same.
            async with asyncio.timeout(5):
                await streamer.done.wait()
            errors.append(streamer.error)
            is_over.set()

    async with serving(handler) as call:
        stream = call(b"")
        await stream.read()
        stream.cancel()
        async with asyncio.timeout(5):
            await is_over.wait()

    assert errors != [None]


async def test_what_is_taken_at_once_is_told_later_and_not_deeper_in_the_stack() -> None:
    taken: list[bytes] = []

    async def write(message: bytes) -> None:
        taken.append(message)

    messages = [b"%d" % number for number in range(5000)]
    streamer = Streamer(write, messages)
    streamer.start()
    assert (len(taken), streamer.done.is_set()) == (1, False)
    async with asyncio.timeout(5):
        await streamer.done.wait()

    assert taken == messages


async def test_what_fails_at_once_is_told_later_too() -> None:
    async def write(_: bytes) -> None:
        raise ValueError("no")

    streamer = Streamer(write, [b"a"])
    streamer.start()
    assert not streamer.done.is_set()
    async with asyncio.timeout(5):
        await streamer.done.wait()

    assert isinstance(streamer.error, ValueError)


async def test_a_write_of_several_steps_is_carried_through() -> None:
    gates = [asyncio.get_running_loop().create_future() for _ in range(3)]

    async def write(_: bytes) -> None:
        for gate in gates:
            await gate

    streamer = Streamer(write, [b"a"])
    streamer.start()
    for gate in gates:
        assert streamer._writer.is_busy
        gate.set_result(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    assert streamer.done.is_set()
    assert streamer.error is None


@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_the_error_of_what_is_waited_for_is_told(is_cancelled: bool) -> None:  # noqa: FBT001 - a parameter of a test
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def write(_: bytes) -> None:
        await gate

    streamer = Streamer(write, [b"a", b"b"])
    streamer.start()
    if is_cancelled:
        gate.cancel()
    else:
        gate.set_exception(OSError("gone"))
    async with asyncio.timeout(5):
        await streamer.done.wait()

    assert isinstance(streamer.error, asyncio.CancelledError if is_cancelled else OSError)
    assert streamer.sent == 1
