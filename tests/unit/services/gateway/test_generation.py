"""The buffer between a worker and a client."""

from __future__ import annotations

import asyncio

import pytest
from maas.inference.v1 import generation_pb2

from libs.errors import Reason, Unavailable
from services.gateway.generation import new_sink

END = generation_pb2.OutputEnd(reason=generation_pb2.FINISH_REASON_END)


async def test_what_piles_up_is_taken_as_one_chunk() -> None:
    sink = new_sink()
    sink.push("a", [1])
    sink.push("b", [2, 3])
    sink.finish(END)

    chunk = await sink.take()

    assert (chunk.text, chunk.token_ids, chunk.end) == ("ab", [1, 2, 3], END)


async def test_a_waiting_reader_gets_each_token() -> None:
    sink = new_sink()
    taking = asyncio.create_task(sink.take())
    await asyncio.sleep(0)

    sink.push("a", [1])

    assert (await taking).token_ids == [1]


async def test_a_failure_ends_the_wait_and_stays() -> None:
    sink = new_sink()
    taking = asyncio.create_task(sink.take())
    await asyncio.sleep(0)

    sink.fail(Unavailable("lost", reason=Reason.WORKER_LOST))
    sink.fail(Unavailable("again"))

    with pytest.raises(Unavailable) as caught:
        await taking
    assert caught.value.reason is Reason.WORKER_LOST
    with pytest.raises(Unavailable):
        await sink.accepted


async def test_an_end_is_not_undone_by_a_later_failure() -> None:
    sink = new_sink()
    sink.push("a", [1])
    sink.finish(END)

    sink.fail(Unavailable("lost"))

    assert (await sink.take()).end == END


async def test_a_cancelled_wait_loses_nothing() -> None:
    sink = new_sink()
    taking = asyncio.create_task(sink.take())
    await asyncio.sleep(0)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking

    sink.push("a", [1])

    assert (await sink.take()).text == "a"
