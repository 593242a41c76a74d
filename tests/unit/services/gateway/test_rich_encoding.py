"""Deltas that are written by hand are what the library reads, and fit into frames."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, scores_pb2, tools_pb2

from services.gateway import rich_encoding as encoding

FRAME_BYTES_MAX = 256 * 1024
TOKENS = st.integers(0, 2**32 - 1)
TEXTS = st.text(max_size=20)
SEGMENTS = st.lists(
    st.one_of(
        st.builds(engine_pb2.Segment, text=TEXTS),
        st.builds(engine_pb2.Segment, reasoning=TEXTS),
        st.builds(
            engine_pb2.Segment,
            tool_call=st.builds(
                tools_pb2.ToolCallDelta,
                call_index=st.integers(0, 200),
                id=TEXTS,
                name=TEXTS,
                arguments_json=TEXTS,
            ),
        ),
    ),
    max_size=5,
)


def scores_of(rows: int, *, width: int = 2, with_bytes: bool = True) -> scores_pb2.TokenScores:
    """Makes scores whose every number says where it stands."""
    return scores_pb2.TokenScores(
        token_ids=range(rows),
        logprobs=[-float(row) for row in range(rows)],
        top_count=width,
        top_token_ids=range(rows * width),
        top_logprobs=[-float(place) for place in range(rows * width)],
        token_bytes=[str(row).encode() for row in range(rows)] if with_bytes else [],
        top_token_bytes=[str(row).encode() for row in range(rows * width)] if with_bytes else [],
    )


def read(deltas: list[bytes]) -> list[generation_pb2.OutputDelta]:
    """Reads entries of Delta.outputs as clients do."""
    return list(generation_pb2.Delta.FromString(b"".join(deltas)).outputs)


@given(index=st.integers(0, 300), segments=SEGMENTS, ids=st.lists(TOKENS, max_size=9))
def test_a_row_reads_as_it_was_meant(
    index: int, segments: list[engine_pb2.Segment], ids: list[int]
) -> None:
    scores = scores_of(len(ids)) if ids else None
    shown = engine_pb2.RowSegments(segments=segments)

    made = read(
        encoding.deltas(index, encoding.contents("", shown, with_reasoning=True), ids, scores)
    )

    assert all(delta.index == index for delta in made)
    for kind in ("text", "reasoning"):
        meant = "".join(getattr(segment, kind) for segment in segments)
        assert "".join(getattr(delta, kind) for delta in made) == meant
    calls = [delta.tool_call for delta in made if delta.HasField("tool_call")]
    assert calls == [item.tool_call for item in segments if item.HasField("tool_call")]
    assert [token for delta in made for token in delta.token_ids] == ids
    assert [delta.scores for delta in made if delta.HasField("scores")] == [scores] * bool(ids)
    # Tokens stand beside what they end in.
    assert not any(delta.token_ids for delta in made[:-1])


@given(text=st.text(max_size=50), ids=st.lists(TOKENS, max_size=5))
def test_plain_text_is_one_delta(text: str, ids: list[int]) -> None:
    made = encoding.deltas(0, encoding.contents(text, None, with_reasoning=False), ids, None)

    meant = generation_pb2.OutputDelta(token_ids=ids)
    if text:
        meant.text = text
    assert read(made) == ([meant] if text or ids else [])
    whole = generation_pb2.Delta(outputs=[meant] if text or ids else [])
    assert b"".join(made) == whole.SerializeToString(deterministic=True)


def test_reasoning_that_is_not_wanted_is_left_out() -> None:
    shown = engine_pb2.RowSegments(
        segments=[engine_pb2.Segment(reasoning="hm"), engine_pb2.Segment(text="so")]
    )

    made = read(encoding.deltas(1, encoding.contents("", shown, with_reasoning=False), (), None))

    assert made == [generation_pb2.OutputDelta(index=1, text="so")]


def test_an_end_names_its_output() -> None:
    how = generation_pb2.OutputEnd(
        reason=generation_pb2.FINISH_REASON_STOP_SEQUENCE, stop_sequence="x"
    )

    assert read([encoding.end(3, how)]) == [generation_pb2.OutputDelta(index=3, end=how)]


@pytest.mark.parametrize("rows", [1, 3000, 20_000])
def test_a_large_row_is_cut_into_deltas_that_fit(rows: int) -> None:
    scores = scores_of(rows, width=20)
    ids = list(range(rows))

    made = encoding.deltas(0, encoding.contents("x", None, with_reasoning=True), ids, scores)

    assert max(map(len, made)) < FRAME_BYTES_MAX - 1024
    back = read(made)
    whole = scores_pb2.TokenScores()
    for delta in back:
        assert list(delta.token_ids) == list(delta.scores.token_ids)
        encoding.append_scores(whole, delta.scores)
    assert whole == scores
    assert [delta.text for delta in back] == [""] * (len(back) - 1) + ["x"]


def test_long_texts_and_arguments_are_cut_and_whole() -> None:
    long = "\N{SNOWMAN}" * 200_000
    call = tools_pb2.ToolCallDelta(call_index=2, id="i", name="n", arguments_json=long)
    shown = engine_pb2.RowSegments(
        segments=[engine_pb2.Segment(text=long), engine_pb2.Segment(tool_call=call)]
    )

    made = encoding.deltas(0, encoding.contents("", shown, with_reasoning=True), (), None)

    assert max(map(len, made)) < FRAME_BYTES_MAX - 1024
    back = read(made)
    assert "".join(delta.text for delta in back) == long
    calls = [delta.tool_call for delta in back if delta.HasField("tool_call")]
    assert "".join(part.arguments_json for part in calls) == long
    assert [(part.id, part.name) for part in calls] == [("i", "n")] + [("", "")] * (len(calls) - 1)
    assert {part.call_index for part in calls} == {2}


def test_scores_of_a_prompt_are_cut_with_their_places() -> None:
    scores = scores_of(5000, width=5)

    parts = [scores_pb2.PromptScores.FromString(data) for data in encoding.prompt_parts(7, scores)]

    assert len(parts) > 1
    place = 7
    whole = scores_pb2.TokenScores()
    for part in parts:
        assert part.offset == place
        assert part.ByteSize() < FRAME_BYTES_MAX - 1024
        place += len(part.scores.token_ids)
        encoding.append_scores(whole, part.scores)
    assert whole == scores


@settings(max_examples=50)
@given(start=st.integers(0, 6), width=st.integers(0, 3))
def test_scores_from_a_token_on_keep_their_columns(start: int, width: int) -> None:
    part = encoding.scores_from(scores_of(6, width=width), start)

    assert list(part.token_ids) == list(range(start, 6))
    assert list(part.logprobs) == [-float(row) for row in range(start, 6)]
    assert list(part.top_token_ids) == list(range(start * width, 6 * width))
    assert list(part.top_token_bytes) == [str(n).encode() for n in range(start * width, 6 * width)]


def test_rows_with_fewer_alternatives_are_filled_up() -> None:
    whole = scores_pb2.TokenScores()
    for width in (1, 2, 0):
        encoding.append_scores(whole, scores_of(1, width=width))

    assert whole.top_count == 2
    no = encoding.NO_TOKEN
    assert list(whole.top_token_ids) == [0, no, 0, 1, no, no]
    assert [math.isinf(value) for value in whole.top_logprobs] == [
        False, True, False, False, True, True,
    ]  # fmt: skip
    assert list(whole.top_token_bytes) == [b"0", b"", b"0", b"1", b"", b""]
