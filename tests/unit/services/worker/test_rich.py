"""services/worker/rich.py: a token comes only together with what it shows."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from maas.engine.v1 import engine_pb2

from services.worker.engine.sim_tokenizer import SimTokenizer
from services.worker.parsing import (
    CallPiece,
    OutputParser,
    ReasoningFormat,
    ReasoningPiece,
    TextPiece,
    ToolFormat,
)
from services.worker.rich import NO_EXTRAS, RichOutput, segments_of
from services.worker.rows import Row
from services.worker.text import Release, TokenPieces
from services.worker.work import call_ids

PIECES = TokenPieces.of(SimTokenizer())
CALL = '<tool_call>{"name": "f", "arguments": {"a": [1, 2]}}</tool_call>'
parts = st.lists(
    st.sampled_from(["a", " b", "<", "<think>", "</think>", CALL, "<tool_call>", "\n", "x < y"]),
    max_size=8,
)


def new_output(*, has_tools: bool = True) -> RichOutput:
    parser = OutputParser(
        tools=ToolFormat.HERMES if has_tools else None,
        tool_names={"f"},
        parallel=True,
        reasoning=ReasoningFormat.THINK,
        starts_in_reasoning=False,
        new_call_id=call_ids("key", 0),
    )
    return RichOutput(PIECES, NO_EXTRAS, parser=parser, may_become_plain=not has_tools)


def spelled(row: Row) -> list[tuple[str, str]]:
    """What a row shows: kind and characters, neighbours of one kind joined."""
    found: list[tuple[str, str]] = [("text", row.text)] if row.text else []
    for part in row.segments:
        kind = part.WhichOneof("kind") or ""
        call = part.tool_call
        text = call.name + call.arguments_json if kind == "tool_call" else getattr(part, kind)
        found.append((kind, text))
    return joined(found)


def joined(shown: list[tuple[str, str]]) -> list[tuple[str, str]]:
    whole: list[tuple[str, str]] = []
    for kind, text in shown:
        if whole and whole[-1][0] == kind:
            whole[-1] = (kind, whole[-1][1] + text)
        else:
            whole.append((kind, text))
    return whole


def rows_of(output: RichOutput, data: bytes) -> list[Row]:
    rows = [output.push(Release((byte,), chr(byte))) for byte in data]
    rows.append(output.finish())
    return [row for row in rows if row is not None]


@given(parts=parts)
def test_all_rows_together_show_what_the_parser_says_and_have_every_token(
    parts: list[str],
) -> None:
    text = "".join(parts)
    reference = OutputParser(
        tools=ToolFormat.HERMES,
        tool_names={"f"},
        parallel=True,
        reasoning=ReasoningFormat.THINK,
        starts_in_reasoning=False,
        new_call_id=call_ids("key", 0),
    )
    pieces = [*reference.push(text), *reference.finish()]

    rows = rows_of(new_output(), text.encode())

    assert [token_id for row in rows for token_id in row.token_ids] == list(text.encode())
    whole = Row([], segments=segments_of(pieces))
    assert joined([part for row in rows for part in spelled(row)]) == spelled(whole)
    assert all(row.token_ids for row in rows)


@given(parts=parts, cut=st.integers(0, 200))
def test_what_was_released_is_never_ahead_of_its_tokens(parts: list[str], cut: int) -> None:
    """The released tokens alone, parsed, show what was released."""
    data = "".join(parts).encode()[:cut]
    output = new_output()
    rows = [row for byte in data if (row := output.push(Release((byte,), chr(byte)))) is not None]
    released = bytes(token_id for row in rows for token_id in row.token_ids)
    again = OutputParser(
        tools=ToolFormat.HERMES,
        tool_names={"f"},
        parallel=True,
        reasoning=ReasoningFormat.THINK,
        starts_in_reasoning=False,
        new_call_id=call_ids("key", 0),
    )
    pieces = again.push(released.decode())

    assert not again.held
    shown = joined([part for row in rows for part in spelled(row)])
    assert shown == spelled(Row([], segments=segments_of(pieces)))


def test_it_becomes_plain_only_behind_text_and_without_tools() -> None:
    output = new_output(has_tools=False)
    seen = [output.is_plain]
    for byte in b"<think>a</think>\nA":
        output.push(Release((byte,), chr(byte)))
        seen.append(output.is_plain)
    assert seen == [False] * (len(seen) - 1) + [True]

    with_tools = new_output()
    with_tools.push(Release((65,), "A"))
    assert not with_tools.is_plain


def test_neighbouring_pieces_of_a_kind_become_one_segment() -> None:
    segments = segments_of(
        [
            ReasoningPiece("a"),
            ReasoningPiece("b"),
            TextPiece("c"),
            CallPiece(0, "call_x", "f", "{"),
            CallPiece(0, "", "", "}"),
            CallPiece(1, "call_y", "f", ""),
        ]
    )

    assert [part.WhichOneof("kind") for part in segments] == [
        "reasoning",
        "text",
        "tool_call",
        "tool_call",
    ]
    assert segments[2].tool_call.arguments_json == "{}"
    assert isinstance(segments[0], engine_pb2.Segment)


def test_calls_have_ids_of_their_own() -> None:
    ids = {
        call_ids(key, output)(index)
        for key in ("a", "b")
        for output in range(3)
        for index in range(3)
    }

    assert len(ids) == 18
    assert all(re.fullmatch("[A-Za-z0-9]{9}", name) for name in ids), "what Mistral's models take"
    assert call_ids("a", 1)(2) == call_ids("a", 1)(2)
