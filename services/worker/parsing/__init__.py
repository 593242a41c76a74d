"""From the text of an output to text, reasoning and calls of tools. Pure; see parser.py."""

from services.worker.parsing.formats import (
    ReasoningFormat,
    ToolFormat,
    detect_reasoning_format,
    detect_tool_format,
    marks_of,
    starts_in_reasoning,
)
from services.worker.parsing.parser import OutputParser
from services.worker.parsing.pieces import CallPiece, Piece, ReasoningPiece, TextPiece

__all__ = [
    "CallPiece",
    "OutputParser",
    "Piece",
    "ReasoningFormat",
    "ReasoningPiece",
    "TextPiece",
    "ToolFormat",
    "detect_reasoning_format",
    "detect_tool_format",
    "marks_of",
    "starts_in_reasoning",
]
