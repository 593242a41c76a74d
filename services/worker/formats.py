"""In which format a model calls tools and thinks: configured, or read off its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.worker.config import ReasoningParser, ToolParser
from services.worker.engine.base import Tokenizer
from services.worker.parsing import (
    ReasoningFormat,
    ToolFormat,
    detect_reasoning_format,
    detect_tool_format,
    marks_of,
)
from services.worker.text import TokenPieces

_TOOLS = {
    "hermes": ToolFormat.HERMES,
    "llama3": ToolFormat.LLAMA3,
    "mistral": ToolFormat.MISTRAL,
    "none": None,
}
_REASONING = {"think": ReasoningFormat.THINK, "none": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """What the output of a conversation with a model is written in.

    Attributes:
        tools: calls of tools; None when they are not split from the text.
        reasoning: likewise.
        marks: texts of the control tokens that are marks of these formats, by id. A control token
            has no text for anybody but the parser.
    """

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    marks: Mapping[int, str] = field(default_factory=dict)


def find_formats(
    template: str,
    tokenizer: Tokenizer,
    pieces: TokenPieces,
    *,
    tool_parser: ToolParser | None = None,
    reasoning_parser: ReasoningParser | None = None,
) -> Formats:
    """Finds the formats of a model.

    Args:
        template: source of its chat template; without one nothing is split.
        tokenizer: of the model.
        pieces: of its vocabulary.
        tool_parser: what the configuration says; None to read it off the template.
        reasoning_parser: likewise.
    """
    if not template:
        return Formats()
    tools = _TOOLS[tool_parser] if tool_parser is not None else detect_tool_format(template)
    reasoning = (
        _REASONING[reasoning_parser]
        if reasoning_parser is not None
        else detect_reasoning_format(template)
    )
    marks: dict[int, str] = {}
    for mark in marks_of(tools, reasoning):
        token_ids = tokenizer.encode(mark, parse_special=True)
        if len(token_ids) == 1 and not pieces.data[token_ids[0]]:
            marks[token_ids[0]] = mark
    return Formats(tools=tools, reasoning=reasoning, marks=marks)
