"""The sink of rich output: what goes in comes out, in order, in frames that fit."""

from __future__ import annotations

import asyncio
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, scores_pb2

from libs.errors import Unavailable
from services.gateway.generation import FRAME_BYTES_MAX
from services.gateway.pacing import PORTION
from services.gateway.rich import ALARM_BYTES, RichChunk, RichSink, RichTerms

END = generation_pb2.OutputEnd(reason=generation_pb2.FINISH_REASON_END)


def terms(count: int = 1, *, with_ids: bool = False, with_reasoning: bool = True) -> RichTerms:
    return RichTerms(count=count, with_ids=with_ids, with_reasoning=with_reasoning)


async def sink_of(
    count: int = 1, *, with_ids: bool = False, with_reasoning: bool = True
) -> RichSink:
    return RichSink(terms(count, with_ids=with_ids, with_reasoning=with_reasoning))


def drain(sink: RichSink) -> list[RichChunk]:
    chunks = []
    while sink.has_output:
        chunks.append(sink.take())
    return chunks


def outputs(chunks: list[RichChunk]) -> list[generation_pb2.OutputDelta]:
    deltas = [chunk.data for chunk in chunks if not chunk.is_prompt]
    return list(
        chain.from_iterable(generation_pb2.Delta.FromString(data).outputs for data in deltas)
    )


def reasoning(text: str, tokens: int) -> engine_pb2.RowSegments:
    return engine_pb2.RowSegments(
        segments=[engine_pb2.Segment(reasoning=text)], reasoning_tokens=tokens
    )


ROWS = st.lists(
    st.tuples(
        st.integers(0, 2), st.text(max_size=9), st.integers(1, 3), st.booleans(), st.booleans()
    ),
    max_size=30,
)


@given(rows=ROWS, takes=st.sets(st.integers(0, 29)))
def test_every_output_gets_its_rows_whole_and_in_order(
    rows: list[tuple[int, str, int, bool, bool]], takes: set[int]
) -> None:
    sink = asyncio.run(sink_of(3))
    chunks: list[RichChunk] = []
    for number, (index, text, count, is_thought, is_last) in enumerate(rows):
        ids = [number] * count
        if is_thought:
            sink.inlets[index].push_rich("", ids, reasoning(text, count), None)
        else:
            sink.inlets[index].push(text, ids)
        if is_last and number in takes:
            chunks += drain(sink)
    for inlet in sink.inlets:
        inlet.finish(END)
    chunks += drain(sink)

    for index in range(3):
        mine = [row for row in rows if row[0] == index]
        got = [delta for delta in outputs(chunks) if delta.index == index]
        assert "".join(delta.text for delta in got) == "".join(r[1] for r in mine if not r[3])
        assert "".join(delta.reasoning for delta in got) == "".join(r[1] for r in mine if r[3])
        assert [delta.HasField("end") for delta in got] == [False] * (len(got) - 1) + [True]
    assert sum(chunk.tokens for chunk in chunks) == sum(row[2] for row in rows)
    assert sum(chunk.reasoning_tokens for chunk in chunks) == sum(r[2] for r in rows if r[3])
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert (sink.waiting, sink.waiting_bytes, sink.is_over) == (0, 0, True)


async def test_text_that_piles_up_is_one_delta() -> None:
    sink = RichSink(terms())
    for word in ("a", "b", "c"):
        sink.inlets[0].push_one(word, 1)

    (chunk,) = drain(sink)

    assert outputs([chunk]) == [generation_pb2.OutputDelta(text="abc")]
    assert (chunk.tokens, chunk.token_ids) == (3, [1, 1, 1])


async def test_what_does_not_fit_into_a_frame_waits_for_the_next() -> None:
    sink = RichSink(terms())
    text = "\N{SNOWMAN}" * 10_000
    for number in range(50):
        sink.inlets[0].push(text, [number])

    chunks = drain(sink)

    assert len(chunks) > 1
    assert max(len(chunk.data) for chunk in chunks) <= FRAME_BYTES_MAX
    assert "".join(delta.text for delta in outputs(chunks)) == text * 50


async def test_no_more_tokens_are_taken_than_asked_for() -> None:
    sink = await sink_of()
    for _ in range(3 * PORTION):
        sink.push_row(0, "ab", [1], None, None)
    sink.finish(0, END)

    taken = []
    while sink.has_output:
        taken.append(sink.take(PORTION))

    assert [chunk.tokens for chunk in taken] == [PORTION] * 3
    assert [len(chunk.token_ids) for chunk in taken] == [PORTION] * 3
    assert "".join(delta.text for delta in outputs(taken)) == "ab" * 3 * PORTION
    assert [chunk.is_last for chunk in taken] == [False, False, True]


async def test_one_row_larger_than_a_frame_is_cut_and_counted_first() -> None:
    sink = RichSink(terms())
    text = "x" * 600_000
    sink.inlets[0].push(text, [1, 2, 3])

    chunks = drain(sink)

    assert max(len(chunk.data) for chunk in chunks) <= FRAME_BYTES_MAX
    assert "".join(delta.text for delta in outputs(chunks)) == text
    assert [chunk.tokens for chunk in chunks] == [3] + [0] * (len(chunks) - 1)


async def test_hidden_reasoning_is_counted_and_nothing_of_it_is_sent() -> None:
    sink = RichSink(terms(with_ids=True, with_reasoning=False))
    scores = scores_pb2.TokenScores(token_ids=[1, 2], logprobs=[-1, -2])
    sink.inlets[0].push_rich("", [1, 2], reasoning("secret", 2), scores)
    both = engine_pb2.RowSegments(
        segments=[engine_pb2.Segment(reasoning="more"), engine_pb2.Segment(text="so")],
        reasoning_tokens=1,
    )
    scores = scores_pb2.TokenScores(token_ids=[3, 4], logprobs=[-3, -4])
    sink.inlets[0].push_rich("", [3, 4], both, scores)

    (chunk,) = drain(sink)

    assert (chunk.tokens, chunk.reasoning_tokens) == (4, 3)
    (delta,) = outputs([chunk])
    shown = scores_pb2.TokenScores(token_ids=[4], logprobs=[-4])
    assert delta == generation_pb2.OutputDelta(text="so", token_ids=[4], scores=shown)


async def test_pieces_of_the_mark_are_hidden_with_the_reasoning_that_they_begin() -> None:
    sink = RichSink(terms(with_ids=True, with_reasoning=False))
    # "<think", ">", "hm": the first was held as what might have been text, and is not counted.
    scores = scores_pb2.TokenScores(token_ids=[1, 2, 3], logprobs=[-1, -2, -3])
    sink.inlets[0].push_rich("", [1, 2, 3], reasoning("hm", 2), scores)

    (chunk,) = drain(sink)

    assert (chunk.tokens, outputs([chunk])) == (3, [])


async def test_a_closed_sink_keeps_nothing() -> None:
    sink = RichSink(terms())
    sink.inlets[0].push("a", [1])

    sink.close()
    sink.inlets[0].push("b", [2])

    assert (sink.has_output, sink.waiting_bytes) == (False, 0)


async def test_who_owns_a_sink_is_told_when_much_waits() -> None:
    sink = RichSink(terms())
    events: list[int] = []
    sink.on_event = lambda: events.append(sink.waiting_bytes)
    text = "x" * (ALARM_BYTES // 2)

    sink.inlets[0].push(text, [1])
    assert events == []
    sink.inlets[0].push(text, [2])

    assert events[0] > ALARM_BYTES


async def test_scores_of_the_prompt_have_a_frame_of_their_own() -> None:
    sink = RichSink(terms())
    scores = scores_pb2.TokenScores(token_ids=[5, 6], logprobs=[-5, -6])
    sink.inlets[0].push_prompt_scores(scores_pb2.PromptScores(offset=0, scores=scores))
    sink.inlets[0].push("a", [1])

    first, second = drain(sink)

    assert first.is_prompt
    assert first.tokens == 0
    assert scores_pb2.PromptScores.FromString(first.data).scores == scores
    assert not second.is_prompt


async def test_a_successor_leaves_out_scores_that_have_come_before() -> None:
    sink = RichSink(terms())
    scores = scores_pb2.TokenScores(token_ids=[5, 6], logprobs=[-5, -6])
    sink.inlets[0].push_prompt_scores(scores_pb2.PromptScores(offset=0, scores=scores))
    following = sink.successor()
    scores = scores_pb2.TokenScores(token_ids=[5, 6, 7], logprobs=[-5, -6, -7])
    following.inlets[0].push_prompt_scores(scores_pb2.PromptScores(offset=0, scores=scores))
    following.inlets[0].push("a", [1])
    following.adopt(sink.rest())

    chunks = drain(following)

    parts = [scores_pb2.PromptScores.FromString(c.data) for c in chunks if c.is_prompt]
    assert [(part.offset, list(part.scores.token_ids)) for part in parts] == [
        (0, [5, 6]),
        (2, [7]),
    ]
    assert outputs(chunks)[0].text == "a"


async def test_what_an_earlier_execution_left_comes_first() -> None:
    earlier, later = RichSink(terms()), RichSink(terms())
    earlier.inlets[0].push("a", [1])
    earlier.inlets[0].prefill(2)
    later.inlets[0].push("b", [2])
    later.adopt(earlier.rest())

    (chunk,) = drain(later)

    assert "".join(delta.text for delta in outputs([chunk])) == "ab"
    assert (chunk.token_ids, later.cached_tokens) == ([1, 2], 2)


async def test_the_failure_of_one_output_is_that_of_all() -> None:
    sink = RichSink(terms(2))
    events: list[str] = []
    sink.on_event = lambda: events.append("event")
    sink.inlets[0].accept(3)
    sink.inlets[0].finish(END)
    assert events == []

    sink.inlets[1].fail(error := Unavailable("gone"))
    sink.inlets[1].fail(Unavailable("once more"))

    assert await sink.accepted == 3
    assert sink.failure is error
    assert events == ["event", "event"]


async def test_a_refusal_comes_to_who_waits_for_acceptance() -> None:
    sink = RichSink(terms(2))
    sink.inlets[0].fail(error := Unavailable("full"))
    sink.inlets[1].fail(Unavailable("full"))

    assert sink.accepted.exception() is error
