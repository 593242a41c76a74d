"""Placeholders for all that a tenant typed, so that a template's own text can be told from it.

A veiled conversation has the shape of the true one: the same messages, calls and tools, equal texts
with equal placeholders, empty ones empty. What a template makes of it besides placeholders is the
template's own, or the server's. `contents` puts the texts back, as JSON where the template wrote
the placeholder inside JSON.

Not veiled are words that only say how something is made: those of JSON Schema, and variables of
letters, digits and a few harmless marks, on which templates branch.

Placeholders are made of letters (runes, which have no upper and lower case), so no template trims,
splits or escapes them. They are as long as a short text is: some templates ask for its length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from libs.chat_rules import JsonObject, JsonValue

_OPEN, _LEVEL, _CLOSE = "\u16a0", "\u16a1", "\u16a2"
_PLACEHOLDER = re.compile(f"{_OPEN}([0-9]+){_LEVEL}([0-9]+){_CLOSE}")
_MARKS = re.compile(f"[{_OPEN}{_LEVEL}{_CLOSE}]")
_FRAME_CHARACTERS = len(_OPEN + _LEVEL + "0" + _CLOSE)
_PADDED_CHARACTERS_MAX = 32
# JSON in JSON in JSON: each level may double the text.
_LEVELS_MAX = 3
_HARMLESS = re.compile(r"[A-Za-z0-9_ .,-]{0,64}")
_SCHEMA_WORD = re.compile(
    r"type|properties|required|items|enum|const|anyOf|oneOf|allOf|not|if|then|else|default|title|"
    r"description|format|minimum|maximum|minLength|maxLength|minItems|maxItems|pattern|"
    r"uniqueItems|additionalProperties|nullable|examples|\$defs|\$ref|"
    r"object|array|string|number|integer|boolean|null"
)


class Torn(Exception):
    """The template has cut a placeholder, so that its text cannot be put back."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a rendered conversation.

    Attributes:
        text: of it.
        is_typed: it is what a tenant typed, and not the template's.
    """

    text: str
    is_typed: bool


class Veil:
    """The texts of one conversation by their placeholders."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}

    def hide(self, text: str) -> str:
        """Returns the placeholder of a text; equal texts have equal ones."""
        if not text:
            return text
        row = self._rows.setdefault(text, len(self._rows))
        digits = min(len(text), _PADDED_CHARACTERS_MAX) - _FRAME_CHARACTERS
        return f"{_OPEN}{str(row).zfill(digits)}{_LEVEL}0{_CLOSE}"

    def hide_in(self, value: JsonValue, kept: re.Pattern[str] | None = None) -> JsonValue:
        """Returns a JSON value with placeholders for its texts and keys.

        Args:
            value: not changed.
            kept: texts that it matches as a whole stay; None for none.
        """
        match value:
            case str():
                return value if kept is not None and kept.fullmatch(value) else self.hide(value)
            case list():
                return [self.hide_in(item, kept) for item in value]
            case dict():
                return {
                    str(self.hide_in(name, kept)): self.hide_in(item, kept)
                    for name, item in value.items()
                }
            case _:
                return value

    def pieces(self, scaffold: str) -> Iterator[Piece]:
        """Yields what was rendered of a veiled conversation, with the texts put back.

        Raises:
            Torn: the template has cut a placeholder.
        """
        texts = list(self._rows)
        place = 0
        for found in _PLACEHOLDER.finditer(scaffold):
            yield _own(scaffold[place : found.start()])
            place = found.end()
            row, level = int(found[1]), int(found[2])
            if row >= len(texts) or level > _LEVELS_MAX:
                raise Torn
            yield Piece(_in_json(texts[row], level), is_typed=True)
        yield _own(scaffold[place:])


def inside_json(text: str) -> str:
    """Marks the placeholders in a JSON text: their texts have to be put back as JSON has them."""
    return _PLACEHOLDER.sub(_one_level_deeper, text)


def hide_messages(veil: Veil, messages: list[JsonObject]) -> list[JsonObject]:
    """Returns messages for a template with placeholders for all but what the server says."""
    return [
        {
            name: value if name == "role" else _hide_calls(veil, value)
            for name, value in message.items()
        }
        for message in messages
    ]


def hide_tools(veil: Veil, tools: list[JsonObject]) -> list[JsonObject]:
    """Does the same to tools, and leaves the words of their schemas."""
    return [_hide_function(veil, tool, _SCHEMA_WORD) for tool in tools]


def hide_variables(veil: Veil, variables: JsonObject) -> JsonObject:
    """Does the same to variables, and leaves texts that templates branch on."""
    return {name: veil.hide_in(value, _HARMLESS) for name, value in variables.items()}


def _hide_calls(veil: Veil, value: JsonValue) -> JsonValue:
    """Hides a field of a message: only calls of tools have something of the server's in them."""
    if not isinstance(value, list):
        return veil.hide_in(value)
    return [_hide_function(veil, call, None) for call in value if isinstance(call, dict)]


def _hide_function(veil: Veil, call: JsonObject, kept: re.Pattern[str] | None) -> JsonObject:
    """Hides what is said of a function, whose fields have names that the server gives."""
    hidden: JsonObject = {}
    for name, value in call.items():
        if name == "function" and isinstance(value, dict):
            hidden[name] = {
                inner: veil.hide_in(item, kept if inner == "parameters" else None)
                for inner, item in value.items()
            }
        else:
            hidden[name] = value if name == "type" else veil.hide_in(value)
    return hidden


def _one_level_deeper(found: re.Match[str]) -> str:
    return f"{_OPEN}{found[1]}{_LEVEL}{int(found[2]) + 1}{_CLOSE}"


def _in_json(text: str, levels: int) -> str:
    for _ in range(levels):
        text = json.dumps(text, ensure_ascii=False)[1:-1]
    return text


def _own(text: str) -> Piece:
    if _MARKS.search(text):
        raise Torn
    return Piece(text, is_typed=False)
