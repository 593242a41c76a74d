"""Grammars for outputs that call tools: only calls, or free text in which calls are valid. Pure.

Calls are written as `parsing` reads them and as chat templates show them to the model. Marks are
written out in characters, so that a grammar fits every vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from services.worker.gbnf import lark_literal
from services.worker.json_schemas import Schema
from services.worker.parsing import ToolFormat

CALLS_MAX = 8
"""Most calls of an output that has to be calls."""

_ARGUMENTS = {
    ToolFormat.HERMES: "arguments",
    ToolFormat.LLAMA3: "parameters",
    ToolFormat.MISTRAL: "arguments",
}
_FREE_TEXT = "TEXT: /(?s:.)*/"
# What Llama writes is a call when it begins with a brace.
_FREE_TEXT_LLAMA3 = r"TEXT: /[ \t\r\n]*([^{ \t\r\n](?s:.)*)?/"


@dataclass(frozen=True, slots=True)
class CallableTool:
    """A tool in a grammar.

    Attributes:
        name: letters, digits, "_", "." and "-".
        schema: of its arguments, which are objects in any case.
    """

    name: str
    schema: Schema


def calls_only(tool_format: ToolFormat, tools: Sequence[CallableTool], *, parallel: bool) -> str:
    """Writes the grammar of an output that is one call, or 1 to 8 where `parallel`."""
    again = f"{{0,{CALLS_MAX - 1}}}" if parallel else "{0}"
    match tool_format:
        case ToolFormat.HERMES:
            start = f'call ("\\n" call){again}' if parallel else "call"
        case ToolFormat.LLAMA3:
            start = f'body ("; " body){again}' if parallel else "body"
        case _:
            start = '"[TOOL_CALLS] " list'
    return _grammar(f"start: {start}", tool_format, tools, parallel=parallel)


def free_with_calls(
    tool_format: ToolFormat, tools: Sequence[CallableTool], *, parallel: bool
) -> str:
    """Writes the grammar of free text in which what begins as a call is a valid one.

    Without `parallel`, and where the format has one place for calls, nothing follows them.
    """
    match tool_format:
        case ToolFormat.HERMES:
            start = "begun rest"
            rules = ['begun[lazy]: TEXT "<tool_call>"', _FREE_TEXT]
            several = "(begun rest)* TEXT"
        case ToolFormat.LLAMA3:
            start = "bodies | begun bodies"
            rules = ['begun[lazy]: TEXT "<|python_tag|>"', _FREE_TEXT_LLAMA3]
            again = f'("; " body){{0,{CALLS_MAX - 1}}}' if parallel else ""
            rules.append(f"bodies: body {again}")
            several = f"{start} | TEXT"
        case _:
            start = 'begun " "? list'
            rules = ['begun[lazy]: TEXT "[TOOL_CALLS]"', _FREE_TEXT]
            several = f"{start} | TEXT"
    alternatives = several if parallel else f"{start} | TEXT"
    head = "\n".join([f"start: {alternatives}", *rules])
    return _grammar(head, tool_format, tools, parallel=parallel)


def _grammar(
    head: str, tool_format: ToolFormat, tools: Sequence[CallableTool], *, parallel: bool
) -> str:
    lines = ["%llguidance {}", head]
    if tool_format is ToolFormat.HERMES:
        lines += ['call: "<tool_call>" rest', 'rest: "\\n" body "\\n</tool_call>"']
    if tool_format is ToolFormat.MISTRAL:
        again = f'(", " body){{0,{CALLS_MAX - 1}}}' if parallel else ""
        lines.append(f'list: "[" body {again} "]"')
    lines.append("body: " + " | ".join(f"body{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        header = f'{{"name": "{tool.name}", "{_ARGUMENTS[tool_format]}": '
        lines.append(f'body{number}: {lark_literal(header)} arguments{number} "}}"')
        lines.append(f"arguments{number}: %json {_arguments_schema(tool.schema)}")
    return "\n".join(lines) + "\n"


def _arguments_schema(schema: Schema) -> str:
    fields = {} if isinstance(schema, bool) else schema
    compact = {"whitespace_flexible": False}
    return json.dumps({**fields, "type": "object", "x-guidance": compact})
