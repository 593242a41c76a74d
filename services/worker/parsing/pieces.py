"""What an output is made of: text, reasoning and calls of tools, in order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More text of the answer.

    Attributes:
        text: whole characters, never empty.
    """

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPiece:
    """More reasoning.

    Attributes:
        text: whole characters, never empty.
    """

    text: str


@dataclass(frozen=True, slots=True)
class CallPiece:
    """More of one call of a tool.

    Attributes:
        call_index: 0-based number of the call within its output.
        call_id: names the call; in its first piece only, else empty.
        name: of the tool; in the first piece only, else empty.
        arguments: more of the arguments' JSON text, exactly as the model wrote it.
    """

    call_index: int
    call_id: str
    name: str
    arguments: str


Piece = TextPiece | ReasoningPiece | CallPiece
