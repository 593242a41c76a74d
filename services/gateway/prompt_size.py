"""How large a prompt can become: measured before anybody has tokenised it. Pure.

No tokenizer makes more tokens than there are bytes, so bytes bound tokens; and a template may write
what it is given otherwise than it came. JSON it writes anew, with its own spaces, escapes and
numbers, and some indent it. A text inside JSON is escaped. What is said here is the most that the
templates of all families we know make of a request, besides what their model version says that they
add of their own (prompt_overhead_tokens, message_overhead_tokens).
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from maas.inference.v1 import generation_pb2, tools_pb2

from libs.chat_rules import JsonObject, JsonValue
from services.gateway.domain import PromptSize

# Spaces of each level where a template indents.
INDENT = 4
# Levels that templates put around the arguments of a call or the schema of a tool: the function,
# the tool, and the list of all.
LEVELS_AROUND = 3


def prompt_size(spec: generation_pb2.GenerationSpec, enough: int) -> PromptSize:
    """Measures a prompt.

    Args:
        spec: checked by libs.chat_rules.
        enough: units beyond which it does not matter how many there are. Texts that have so many
            bytes are not looked into.
    """
    match spec.WhichOneof("input"):
        case "text":
            return PromptSize(content_units=_bytes_of(spec.text), message_count=0)
        case "tokens":
            # A worker takes them as they are.
            return PromptSize(content_units=len(spec.tokens.ids), message_count=0, is_exact=True)
        case "chat":
            return _chat_size(spec, enough)
        case _:
            return PromptSize(content_units=0, message_count=0)


def _chat_size(spec: generation_pb2.GenerationSpec, enough: int) -> PromptSize:
    """Measures a conversation: whatever of it a template may write."""
    messages, tools = spec.chat.messages, spec.tools.tools
    units = 0
    count = len(tools)
    for message in messages:
        for part in message.parts:
            units += _bytes_of(part.text) + _bytes_of(part.reasoning)
        if message.tool_calls:
            count += len(message.tool_calls)
            units += sum(_bytes_of(call.arguments_json) for call in message.tool_calls)
    units += sum(_bytes_of(tool.parameters_json_schema) for tool in tools)
    if units < enough:
        units += _written_anew(spec)
    return PromptSize(content_units=units, message_count=len(messages), tool_count=count)


def _written_anew(spec: generation_pb2.GenerationSpec) -> int:
    """Returns how many units more than its bytes a template may make of a conversation."""
    messages = spec.chat.messages
    # Of the names of roles, ids and functions too: they stand in the same JSON.
    units = 0
    for message in messages:
        if message.role == generation_pb2.ROLE_TOOL:
            units += _growth_of_result(message)
        if message.name:
            units += _quoted(message.name)
        if message.tool_calls:
            units += _growth_of_calls(message.tool_calls)
    for tool in spec.tools.tools:
        units += _quoted(tool.name) + _quoted(tool.description)
        if tool.parameters_json_schema:
            units += _growth_of_json(tool.parameters_json_schema)
    variables = spec.chat.template_variables_json
    if variables:
        # Each may be written with every message. As Python, maybe, which escapes other quotes.
        most = _bytes_of(variables) + _growth_of_json(variables) + variables.count("'")
        units += (len(messages) + 1) * most
    return units


def _growth_of_result(message: generation_pb2.ChatMessage) -> int:
    """Returns how much longer the parts of a result become inside JSON, and the id of its call."""
    grown = sum(_quoted(part.text) - _bytes_of(part.text) for part in message.parts)
    return grown + _quoted(message.tool_call_id)


def _growth_of_calls(calls: Iterable[tools_pb2.ToolCall]) -> int:
    """Returns how much longer the arguments of calls may become; their ids and names in full."""
    return sum(
        _quoted(call.id) + _quoted(call.name) + _growth_of_json(call.arguments_json)
        for call in calls
    )


def _quoted(text: str) -> int:
    """Returns the length of a text inside JSON, without its quotes: the most that there can be."""
    return len(json.dumps(text)) - 2 if text else 0


def _growth_of_json(text: str) -> int:
    """Returns how much longer a JSON object may be when it is written anew; not below 0."""
    value: JsonObject = json.loads(text)
    # In ASCII, with spaces: the longest way to write it on one line.
    return max(0, len(json.dumps(value)) + _layout(value) - _bytes_of(text))


def _layout(value: JsonObject) -> int:
    """Returns the line ends and spaces of an indented JSON object. Level by level."""
    level: list[JsonObject | list[JsonValue]] = [value]
    depth = LEVELS_AROUND
    added = 0
    while level:
        items = sum(map(len, level))
        # Each item has a line of its own, and so has the end of what it is in.
        added += items * (1 + INDENT * (depth + 1)) + len(level) * (1 + INDENT * depth)
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        depth += 1
    return added


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))
