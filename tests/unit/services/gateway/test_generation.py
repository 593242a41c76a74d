"""The buffer between a worker and a client."""

from __future__ import annotations

import pytest
from maas.inference.v1 import generation_pb2

from libs.errors import Reason, Unavailable
from services.gateway.generation import ROWS_MAX, new_sink, rest_of

END = generation_pb2.OutputEnd(reason=generation_pb2.FINISH_REASON_END)


async def test_what_piles_up_is_taken_as_one_chunk() -> None:
    sink = new_sink()
    sink.push("a", [1])
    sink.push("b", [2, 3])
    sink.finish(END)

    chunk = sink.take()

    assert (chunk.text, chunk.token_ids, chunk.end) == ("ab", [1, 2, 3], END)


async def test_whoever_listens_hears_of_every_event() -> None:
    sink = new_sink()
    heard: list[bool] = []
    sink.on_event = lambda: heard.append(sink.has_output)
    sink.on_output = sink.on_event

    sink.push("a", [1])
    sink.take()
    sink.finish(END)

    assert heard == [True, True]


async def test_a_failure_stays_and_tells_who_waits_for_acceptance() -> None:
    sink = new_sink()

    sink.fail(Unavailable("lost", reason=Reason.WORKER_LOST))
    sink.fail(Unavailable("again"))

    assert sink.failure is not None
    assert sink.failure.reason is Reason.WORKER_LOST
    with pytest.raises(Unavailable):
        await sink.accepted


async def test_an_end_is_not_undone_by_a_later_failure() -> None:
    sink = new_sink()
    sink.push("a", [1])
    sink.finish(END)

    sink.fail(Unavailable("lost"))

    assert sink.failure is None
    assert sink.take().end == END


async def test_a_chunk_is_bounded_and_the_end_comes_with_the_last() -> None:
    sink = new_sink()
    for number in range(ROWS_MAX + 5):
        sink.push("x", [number])
    sink.finish(END)

    first, second = sink.take(), sink.take()

    assert (len(first.text), len(first.token_ids), first.end) == (ROWS_MAX, ROWS_MAX, None)
    assert (second.text, second.token_ids[0], second.end) == ("xxxxx", ROWS_MAX, END)


async def test_what_one_execution_left_comes_before_what_the_next_one_says() -> None:
    first, second = new_sink(), new_sink()
    first.push("a", [1])
    first.fail(Unavailable("lost"))
    rest = rest_of(first)
    second.push("b", [2])

    second.adopt(rest)

    chunk = second.take()
    assert (chunk.text, chunk.token_ids) == ("ab", [1, 2])
    assert rest.failure is None
