"""Text, reasoning and calls come out the same, in order and whole, however the text is cut."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.parsing import (
    CallPiece,
    OutputParser,
    Piece,
    ReasoningFormat,
    ReasoningPiece,
    TextPiece,
    ToolFormat,
)

THINK = ReasoningFormat.THINK
HERMES, LLAMA3, MISTRAL = ToolFormat.HERMES, ToolFormat.LLAMA3, ToolFormat.MISTRAL
MIB = 1024 * 1024


def parser_of(
    tools: ToolFormat | None = HERMES,
    *,
    reasoning: ReasoningFormat | None = THINK,
    inside: bool = False,
    parallel: bool = True,
) -> OutputParser:
    return OutputParser(
        tools=tools,
        tool_names={"look", "now"},
        parallel=parallel,
        reasoning=reasoning,
        starts_in_reasoning=inside,
        new_call_id=lambda index: f"call_{index}",
    )


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces with neighbours of one kind made one."""
    whole: list[Piece] = []
    for piece in pieces:
        last = whole[-1] if whole else None
        match piece, last:
            case TextPiece(more), TextPiece(text):
                whole[-1] = TextPiece(text + more)
            case ReasoningPiece(more), ReasoningPiece(text):
                whole[-1] = ReasoningPiece(text + more)
            case CallPiece(index, "", "", more), CallPiece(same, call_id, name, arguments):
                assert index == same
                whole[-1] = CallPiece(index, call_id, name, arguments + more)
            case _:
                whole.append(piece)
    return whole


def parse(parser: OutputParser, parts: Sequence[str]) -> list[Piece]:
    pieces = [piece for part in parts for piece in parser.push(part)]
    return joined([*pieces, *parser.finish()])


def reads(parser: OutputParser) -> tuple[bool, bool]:
    return parser.in_reasoning, parser.has_calls


def call(index: int, name: str, arguments: str) -> CallPiece:
    return CallPiece(index, f"call_{index}", name, arguments)


@pytest.mark.parametrize(
    ("tools", "text", "expected"),
    [
        pytest.param(
            HERMES,
            "<think>\nhm\n</think>\n\nLet me look.\n"
            '<tool_call>\n{"name": "look", "arguments": {"at": [1, "}"]}}\n</tool_call>\n'
            '<tool_call>\n{"arguments": {}, "name": "now"}\n</tool_call>',
            [
                ReasoningPiece("hm"),
                TextPiece("Let me look."),
                call(0, "look", '{"at": [1, "}"]}'),
                call(1, "now", "{}"),
            ],
            id="reasoning, text and two calls",
        ),
        pytest.param(
            LLAMA3,
            '{"name": "look", "parameters": {"at": 1}}; {"name": "now", "parameters": {}}',
            [call(0, "look", '{"at": 1}'), call(1, "now", "{}")],
            id="Llama without a mark",
        ),
        pytest.param(
            LLAMA3,
            'Well.\n<|python_tag|>{"type": "function", "name": "now", "parameters": {}}',
            [TextPiece("Well."), call(0, "now", "{}")],
            id="Llama with its mark",
        ),
        pytest.param(
            MISTRAL,
            '[TOOL_CALLS] [{"name": "look", "arguments": {"at": 1}, "id": "x"}, '
            '{"name": "now", "arguments": {}}]',
            [call(0, "look", '{"at": 1}'), call(1, "now", "{}")],
            id="Mistral's list",
        ),
        pytest.param(
            HERMES,
            'see <tool_call>{"name": "nope", "arguments": {}}</tool_call> there',
            [TextPiece('see <tool_call>{"name": "nope", "arguments": {}}</tool_call> there')],
            id="an unknown tool is text, marks and all",
        ),
        pytest.param(
            HERMES,
            "<tool_call>\nlook(1)\n</tool_call>",
            [TextPiece("<tool_call>\nlook(1)\n</tool_call>")],
            id="what is no JSON is text",
        ),
        pytest.param(
            HERMES,
            '<tool_call>{"name": "now"}</tool_call>',
            [TextPiece('<tool_call>{"name": "now"}</tool_call>')],
            id="a call without arguments is text",
        ),
        pytest.param(
            HERMES,
            '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>',
            [TextPiece('<tool_call>{"name": "now", "arguments": "{}"}</tool_call>')],
            id="arguments that are no object are text",
        ),
        pytest.param(
            HERMES,
            '<tool_call>{"name": "now", "arguments": {}\n</tool_call> then',
            [call(0, "now", "{}"), TextPiece("then")],
            id="a missing brace behind the arguments does no harm",
        ),
        pytest.param(
            HERMES,
            '<tool_call>{"name": "look", "arguments": {"at": <b></tool_call>',
            [call(0, "look", '{"at": '), TextPiece("<b>")],
            id="arguments that break off stay arguments",
        ),
        pytest.param(
            LLAMA3,
            '{"name": "Bob", "age": 3}',
            [TextPiece('{"name": "Bob", "age": 3}')],
            id="an answer in JSON is no call",
        ),
        pytest.param(
            HERMES,
            'The mark <think> opens it, "</think>" closes it.',
            [TextPiece('The mark <think> opens it, "</think>" closes it.')],
            id="an answer about reasoning is text",
        ),
        pytest.param(
            HERMES,
            '<think>maybe <tool_call>{"name": "now", "arguments": {}}</think>no',
            [
                ReasoningPiece('maybe <tool_call>{"name": "now", "arguments": {}}'),
                TextPiece("no"),
            ],
            id="a call within reasoning is reasoning",
        ),
        pytest.param(
            HERMES,
            '<tool_call>{"name":"look","arguments":{"at":"\\"</tool_call>{"}}</tool_call>',
            [call(0, "look", '{"at":"\\"</tool_call>{"}')],
            id="marks in a string are data",
        ),
    ],
)
def test_each_format_is_read(tools: ToolFormat, text: str, expected: list[Piece]) -> None:
    assert parse(parser_of(tools), [text]) == expected
    assert parse(parser_of(tools), list(text)) == expected


@pytest.mark.parametrize(
    "body",
    [
        pytest.param('{"name": "now", "arguments": {}}\n', id="whole"),
        pytest.param('{"name": "now", "arguments": {}\n', id="without its last brace"),
    ],
)
@pytest.mark.parametrize("length", range(len("</tool_call>") + 1))
def test_an_output_cut_inside_of_the_mark_behind_a_call_shows_none_of_it(
    body: str, length: int
) -> None:
    text = f"<tool_call>\n{body}" + "</tool_call>"[:length]

    assert parse(parser_of(), [text]) == [call(0, "now", "{}")]
    assert parse(parser_of(), list(text)) == [call(0, "now", "{}")]


@pytest.mark.parametrize("text", ["</tool_x", "a</tool", "</tool_call></tool"])
def test_what_only_looks_like_the_mark_behind_a_call_is_text(text: str) -> None:
    parts = ['<tool_call>{"name": "now", "arguments": {}}', text]

    shown = text.removeprefix("</tool_call>")
    assert parse(parser_of(), parts) == [call(0, "now", "{}"), TextPiece(shown)]


def test_reasoning_that_the_prompt_opened_goes_on() -> None:
    parser = parser_of(None, inside=True)

    assert reads(parser) == (True, False)
    assert parser.push("so ") == [ReasoningPiece("so")]
    assert parser.push("on</think>\n\n") == [ReasoningPiece(" on")]
    assert reads(parser) == (False, False)
    assert parser.push("Yes") == [TextPiece("Yes")]


def test_the_name_comes_with_the_first_arguments_and_these_as_they_are_written() -> None:
    parser = parser_of()

    assert parser.push('<tool_call>\n{"name": "look", ') == []
    assert reads(parser) == (False, False)
    assert parser.push('"arguments": {"at') == [CallPiece(0, "call_0", "look", '{"at')]
    assert reads(parser) == (False, True)
    assert parser.push('": 1') == [CallPiece(0, "", "", '": 1')]
    assert parser.push("}}\n</tool_call>") == [CallPiece(0, "", "", "}")]
    assert parser.held == 0


def test_what_may_become_something_else_is_held_and_counted() -> None:
    parser = parser_of()

    assert parser.push("Yes.\n<tool") == [TextPiece("Yes.")]
    assert parser.held == len("\n<tool")
    assert parser.push("s>") == [TextPiece("\n<tools>")]
    assert parser.held == 0
    assert parser.push(' <tool_call>{"name"') == []
    assert parser.held == len(' <tool_call>{"name"')
    assert parser.finish() == [TextPiece(' <tool_call>{"name"')]


def test_text_without_formats_is_passed_on_at_once() -> None:
    parser = parser_of(None, reasoning=None)

    assert parser.push("<think> \n") == [TextPiece("<think> \n")]
    assert parser.held == 0


def test_a_header_of_more_than_4_kib_is_text() -> None:
    text = '<tool_call>{"id": "' + "x" * 4096 + '", "name": "now", "arguments": {}}</tool_call>'

    assert parse(parser_of(), [text]) == [TextPiece(text)]


def test_arguments_may_be_longer_than_any_header() -> None:
    arguments = json.dumps({"at": "x" * 100_000})
    text = f'<tool_call>{{"name": "look", "arguments": {arguments}}}</tool_call>'

    assert parse(parser_of(), [text]) == [call(0, "look", arguments)]


def test_calls_that_were_not_to_come_are_reported_and_flagged() -> None:
    one = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    parser = parser_of(parallel=False)

    assert parse(parser, [one + one]) == [call(0, "now", "{}"), call(1, "now", "{}")]
    assert parser.has_surplus_calls


ATOMS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"),
    *(
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        ":",
        ",",
        ";",
        "<",
        "</t",
        "[TOO",
        "\n",
        " ",
        " " * 70,
        "é",
        "1",
    ),
    *('"name"', '"now"', '"arguments"', '"id":"z"', '{"name": "now", "arguments": {', "x"),
    *('{"arguments":{"a":"}"},"name":"look"}', '{"name":"look","parameters":{}}', "y" * 4090),
]


@settings(max_examples=600, deadline=None)
@given(
    tools=st.sampled_from([None, *ToolFormat]),
    reasoning=st.sampled_from([None, THINK]),
    inside=st.booleans(),
    atoms=st.lists(st.sampled_from(ATOMS), max_size=14),
    data=st.data(),
)
def test_pieces_are_the_same_however_the_text_is_cut(
    tools: ToolFormat | None,
    reasoning: ReasoningFormat | None,
    atoms: list[str],
    data: st.DataObject,
    *,
    inside: bool,
) -> None:
    text = "".join(atoms)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def new() -> OutputParser:
        return parser_of(tools, reasoning=reasoning, inside=inside)

    whole = parse(new(), [text])
    assert parse(new(), parts) == whole
    # Nothing is lost but marks, white space and what stands around arguments.
    if tools is None and reasoning is None:
        assert whole == ([TextPiece(text)] if text else [])
    if not any(isinstance(piece, CallPiece) for piece in whole):
        shown = "".join(p.text for p in whole if isinstance(p, TextPiece | ReasoningPiece))
        assert bare(shown) == bare(text)


def bare(text: str) -> str:
    for mark in ("<think>", "</think>", "</tool_call>"):
        text = text.replace(mark, "")
    return "".join(text.split())


NAMES = st.sampled_from(["look", "now"])
WORDS = st.text(alphabet="abc <{[;é\n", min_size=1, max_size=20).map(lambda text: f"w{text}w")
ARGUMENTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(st.integers() | st.text(max_size=9), st.lists, max_leaves=4),
    max_size=3,
).map(json.dumps)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), max_size=3)


@settings(max_examples=200, deadline=None)
@given(thought=st.none() | WORDS, answer=st.none() | WORDS, calls=CALLS, size=st.integers(1, 9))
def test_what_a_model_of_the_hermes_family_writes_comes_back(
    thought: str | None, answer: str | None, calls: list[tuple[str, str]], size: int
) -> None:
    text = f"<think>\n{thought}\n</think>\n\n" if thought is not None else ""
    text += answer if answer is not None else ""
    text += "".join(
        f'\n<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in calls
    )
    expected: list[Piece] = [
        *([ReasoningPiece(thought)] if thought is not None else []),
        *([TextPiece(answer)] if answer is not None else []),
        *(call(index, name, arguments) for index, (name, arguments) in enumerate(calls)),
    ]

    parts = [text[at : at + size] for at in range(0, len(text), size)]
    assert parse(parser_of(), parts) == expected


@pytest.mark.parametrize(
    "unit",
    [
        "<", "<tool_call", "<tool_call>", "<tool_call>{", '<tool_call>{"name":"now","arguments":{',
        '<tool_call>{"a":"', " ", "[", '{"a":', "<think>", "</think>", '<tool_call>{"a":[[[',
    ],
)  # fmt: skip
@pytest.mark.parametrize(("length", "size"), [(MIB // 8, 7), (MIB, MIB)])
def test_a_mib_of_anything_takes_linear_time(unit: str, length: int, size: int) -> None:
    text = (unit * (length // len(unit) + 1))[:length]
    parser = parser_of()
    began = time.perf_counter()

    for at in range(0, len(text), size):
        parser.push(text[at : at + size])
        assert parser.held <= 2 * 4096 + 80
    parser.finish()

    # It takes 0.01 s to 0.5 s; if it were quadratic, minutes to hours.
    assert time.perf_counter() - began < 10
