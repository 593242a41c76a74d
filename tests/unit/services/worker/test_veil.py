"""Placeholders: what is put back is what was typed, as the template wrote it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.chat_rules import JsonObject, JsonValue
from services.worker import veil
from services.worker.veil import Torn, Veil

RUNES = "\u16a0\u16a1\u16a2"
texts = st.text(max_size=40) | st.text(alphabet=RUNES + '01"\\\n', max_size=12)
values: st.SearchStrategy[JsonValue] = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def unveiled(over: Veil, scaffold: str) -> str:
    return "".join(piece.text for piece in over.pieces(scaffold))


def dump(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False)


@given(st.lists(texts))
def test_texts_come_back(typed: list[str]) -> None:
    over = Veil()
    scaffold = "|".join([over.hide(text) for text in typed])

    pieces = list(over.pieces(scaffold))

    assert "".join(piece.text for piece in pieces) == "|".join(typed)
    own = "".join(piece.text for piece in pieces if not piece.is_typed)
    assert set(own) <= {"|"}


@given(values)
def test_texts_in_json_come_back_as_json(value: JsonValue) -> None:
    over = Veil()
    hidden = dump(over.hide_in(value))

    assert unveiled(over, veil.inside_json(hidden)) == dump(value)
    twice = dump(veil.inside_json(hidden))
    assert unveiled(over, veil.inside_json(twice)) == dump(dump(value))


@given(st.text(max_size=60), st.text(max_size=60))
def test_placeholders_tell_texts_apart_and_keep_their_length(one: str, other: str) -> None:
    over = Veil()
    first, second = over.hide(one), over.hide(other)

    assert (first == second) == (one == other)
    assert bool(first) == bool(one)
    # A row and its frame are the least; nobody asks for the length of a long text.
    assert len(first) == len(one) or not 5 <= len(one) <= 32
    for changed in (first.strip(), first.upper(), first.lower(), first.title(), repr(first)[1:-1]):
        assert changed == first


def test_schemas_keep_their_words_and_variables_what_templates_branch_on() -> None:
    tool: JsonObject = {
        "type": "function",
        "function": {
            "name": "type",
            "description": "string",
            "parameters": {"type": "object", "properties": {"<|x|>": {"type": "string"}}},
        },
    }

    (hidden,) = veil.hide_tools(Veil(), [tool])

    assert hidden["type"] == "function"
    function = hidden["function"]
    assert isinstance(function, dict)
    assert function["name"] != "type"
    assert function["description"] != "string"
    assert dump(function["parameters"]).count("string") == 1
    assert "<|x|>" not in dump(function["parameters"])
    variables = veil.hide_variables(Veil(), {"a": "en-GB", "b": "<|x|>", "c": [True, {"d": "x"}]})
    assert variables["a"] == "en-GB"
    assert variables["b"] != "<|x|>"
    assert variables["c"] == [True, {"d": "x"}]


@pytest.mark.parametrize("cut", [slice(1, None), slice(None, -1), slice(None, 2)])
def test_what_a_template_has_torn_is_found(cut: slice) -> None:
    over = Veil()

    with pytest.raises(Torn):
        unveiled(over, f"before {over.hide('a text')[cut]} behind")


@pytest.mark.parametrize("forged", ["\u16a07\u16a10\u16a2", "\u16a00\u16a19\u16a2"])
def test_a_placeholder_that_was_never_given_is_not_believed(forged: str) -> None:
    over = Veil()
    over.hide("a text")

    with pytest.raises(Torn):
        unveiled(over, forged)
