"""The buffer between a worker and a client."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from maas.inference.v1 import generation_pb2

from libs.errors import Reason, Unavailable
from services.gateway import frames
from services.gateway.generation import ROWS_MAX, Chunk, Sink, new_sink, rest_of

END = generation_pb2.OutputEnd(reason=generation_pb2.FINISH_REASON_END)
# What the contract allows for one frame.
FRAME_MAX = 256 * 1024
TOKEN_ID_MAX = 2**32 - 1

rows = st.tuples(
    st.sampled_from(
        ["", "x", "\u00e9" * 3, "x" * 30_000, "\u732b" * 30_000, "\U0001f431" * 70_000]
    ),
    st.integers(0, 3),
)


def taken(sink: Sink) -> list[Chunk]:
    """Takes all there is, up to the end."""
    chunks = [sink.take()]
    while chunks[-1].end is None:
        chunks.append(sink.take())
    return chunks


def frame_size(chunk: Chunk) -> int:
    """Bytes of the frame that a chunk becomes."""
    frame = frames.delta(
        sequence=2**40,
        text=chunk.text,
        token_ids=chunk.token_ids,
        end=chunk.end,
        output_tokens=2**31,
    )
    return len(frame.response)


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


async def test_no_more_tokens_are_taken_than_asked_for_and_rows_stay_whole() -> None:
    sink = new_sink()
    for number in range(3):
        sink.push(str(number), [number, number])
    sink.push("long", [9] * 7)
    sink.push_one("x", 8)
    sink.finish(END)

    taken = []
    while sink.has_output:
        taken.append(sink.take(5))

    assert [chunk.text for chunk in taken] == ["01", "2", "long", "x"]
    assert [len(chunk.token_ids) for chunk in taken] == [4, 2, 7, 1]
    assert [chunk.end for chunk in taken] == [None, None, None, END]
    assert not sink.waiting


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


@given(some=st.lists(rows, max_size=12), left=st.integers(0, 12))
async def test_rows_stay_whole_in_order_and_in_frames_that_the_contract_allows(
    some: list[tuple[str, int]], left: int
) -> None:
    """What is left by an earlier execution stands before the rest, with its own tokens."""
    earlier, sink = new_sink(), new_sink()
    for place, (text, count) in enumerate(some):
        (earlier if place < left else sink).push(text, [TOKEN_ID_MAX - place] * count)
    sink.finish(END)
    sink.adopt(rest_of(earlier))

    chunks = taken(sink)

    assert "".join(chunk.text for chunk in chunks) == "".join(text for text, _ in some)
    whole = list(itertools.accumulate((len(text) for text, _ in some), initial=0))
    tokens = list(itertools.accumulate((count for _, count in some), initial=0))
    boundaries = set(zip(whole, tokens, strict=True))
    characters = count = 0
    for chunk in chunks:
        characters, count = characters + len(chunk.text), count + len(chunk.token_ids)
        assert (characters, count) in boundaries
        assert frame_size(chunk) <= FRAME_MAX or chunk.text in {text for text, _ in some}
    assert (characters, count) == (whole[-1], tokens[-1])


async def test_rows_of_many_tokens_are_no_way_around_the_size_of_a_frame() -> None:
    sink = new_sink()
    for _ in range(10):
        sink.push("x" * 10_000, [TOKEN_ID_MAX] * 10_000)
    sink.finish(END)

    chunks = taken(sink)

    assert [len(chunk.token_ids) for chunk in chunks] == [40_000, 40_000, 20_000]
    assert max(map(frame_size, chunks)) <= FRAME_MAX
    assert [chunk.end for chunk in chunks] == [None, None, END]


async def test_a_row_that_no_frame_can_hold_leaves_alone() -> None:
    sink = new_sink()
    for text in ("a", "x" * FRAME_MAX, "b"):
        sink.push(text, [1, 2])
    sink.finish(END)

    assert [len(chunk.text) for chunk in taken(sink)] == [1, FRAME_MAX, 1]


async def test_rows_without_a_token_keep_their_place() -> None:
    sink = new_sink()
    for number in range(ROWS_MAX + 2):
        sink.push("x", [number] if number % 2 else [])
    sink.finish(END)

    first, second = taken(sink)

    assert (len(first.text), len(first.token_ids)) == (ROWS_MAX, ROWS_MAX // 2)
    assert (second.text, second.token_ids) == ("xx", [ROWS_MAX + 1])
