"""A failing write waits for the true status, and is left alone where that cannot be had."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from grpc.aio import InternalError

from libs.rpc import true_status
from libs.rpc.true_status import keep_true_status


class Core:
    """The library's own call, on whose stream nothing can be written any more."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def receive_serialized_message(self) -> bytes:
        return b""

    async def send_serialized_message(self, _: bytes) -> None:
        raise InternalError("the stream is over")

    async def status(self) -> None:
        await self.ended.wait()


class Call:
    """What is public of a call."""

    def __init__(self, core: Any) -> None:
        self._cython_call = core


def kept(core: Any) -> Any:
    """What a call uses from then on."""
    call: Any = Call(core)
    keep_true_status(cast("Any", call))
    return call._cython_call


async def test_a_failing_write_goes_nowhere_once_the_status_is_there() -> None:
    core = Core()
    writing = asyncio.create_task(kept(core).send_serialized_message(b"x"))
    await asyncio.sleep(0)
    assert not writing.done()

    core.ended.set()

    await writing


async def test_a_write_that_fails_without_an_end_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(true_status, "STATUS_WAIT_S", 0.001)

    with pytest.raises(InternalError):
        await kept(Core()).send_serialized_message(b"x")


async def test_a_write_that_waits_for_the_status_can_be_cancelled() -> None:
    writing = asyncio.create_task(kept(Core()).send_serialized_message(b"x"))
    await asyncio.sleep(0)

    writing.cancel()

    with pytest.raises(asyncio.CancelledError):
        await writing


@pytest.mark.parametrize("core", [None, object()])
def test_a_call_of_a_library_that_is_made_otherwise_stays_as_it_is(core: object) -> None:
    assert kept(core) is core


def test_a_call_without_a_core_gets_none() -> None:
    call: Any = object()

    keep_true_status(call)
