"""Frames that were released, kept for whoever has missed them.

One log for each generation that can be resumed, bounded by itself and all together by a budget.
Never written to disk, never logged: it holds the output.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from itertools import pairwise

from services.gateway.generation import (
    CHARACTER_BYTES_MAX,
    FRAME_BYTES_MAX,
    TOKEN_ID_BYTES_MAX,
    rows_of_frame,
)

# Of a delta in the log beyond its characters: the string, its place in the list, its count.
_DELTA_BYTES = 72
# A string that is not ASCII has a larger head, and as many bytes a character as its widest needs.
_WIDE_DELTA_BYTES = 100
_WIDE = 4
# Of a log that has no bound of its own.
UNBOUNDED = sys.maxsize
# Deltas that one replayed frame may cover.
MERGED_MAX = 1024


@dataclass(slots=True)
class Budget:
    """Bytes of all logs together.

    Attributes:
        bytes_max: above this the oldest logs of ended generations go.
        used: at present.
    """

    bytes_max: int
    used: int = 0

    @property
    def is_exceeded(self) -> bool:
        """Whether something has to go."""
        return self.used > self.bytes_max


@dataclass(frozen=True, slots=True)
class Replayed:
    """Deltas, merged.

    Attributes:
        first: number of the first delta, from 0.
        last: number of the last.
        text: of all.
        tokens_before: output tokens before the first.
        tokens_after: output tokens with the last.
    """

    first: int
    last: int
    text: str
    tokens_before: int
    tokens_after: int


def bytes_of(text: str) -> int:
    """Returns the most memory that a delta in a log takes, bytes."""
    if text.isascii():
        return _DELTA_BYTES + len(text)
    return _WIDE_DELTA_BYTES + _WIDE * len(text)


class ReplayLog:
    """The deltas of one generation, numbered from 0."""

    __slots__ = (
        "_budget",
        "_bytes",
        "_bytes_max",
        "_dropped",
        "_texts",
        "_tokens",
        "_tokens_dropped",
    )

    def __init__(self, budget: Budget, bytes_max: int) -> None:
        """Makes an empty log.

        Args:
            budget: of all logs.
            bytes_max: of this one; UNBOUNDED when all of it is going to be needed at once.
        """
        self._budget = budget
        self._bytes_max = bytes_max
        self._texts: list[str] = []
        # Output tokens with each delta.
        self._tokens = array("Q")
        self._dropped = 0
        self._tokens_dropped = 0
        self._bytes = 0

    @property
    def count(self) -> int:
        """Deltas so far, dropped ones included."""
        return self._dropped + len(self._texts)

    def append(self, text: str, output_tokens: int) -> None:
        """Keeps a delta. Above its bound the log drops its older half."""
        self._texts.append(text)
        self._tokens.append(output_tokens)
        size = bytes_of(text)
        self._bytes += size
        self._budget.used += size
        if self._bytes > self._bytes_max:
            self._drop(max(1, len(self._texts) // 2))

    def read(self, first: int) -> Replayed | None:
        """Merges what fits into a frame, from a number on; None when that is not kept any more.

        Args:
            first: below `count`.
        """
        start = first - self._dropped
        if start < 0:
            return None
        stop = min(start + MERGED_MAX, len(self._texts))
        before = self._tokens[start - 1] if start else self._tokens_dropped
        text = "".join(self._texts[start:stop])
        most = CHARACTER_BYTES_MAX * len(text)
        most += TOKEN_ID_BYTES_MAX * (self._tokens[stop - 1] - before)
        if most > FRAME_BYTES_MAX:
            counts = [
                after - earlier for earlier, after in pairwise([before, *self._tokens[start:stop]])
            ]
            stop = start + rows_of_frame(self._texts[start:stop], counts)
            text = "".join(self._texts[start:stop])
        return Replayed(
            first=first,
            last=self._dropped + stop - 1,
            text=text,
            tokens_before=before,
            tokens_after=self._tokens[stop - 1],
        )

    def text(self) -> str:
        """Returns the whole text.

        Raises:
            ValueError: some of it was dropped.
        """
        if self._dropped:
            raise ValueError("the log has outgrown its bound")
        return "".join(self._texts)

    def clear(self) -> None:
        """Drops everything."""
        self._drop(len(self._texts))

    def _drop(self, count: int) -> None:
        if not count:
            return
        self._tokens_dropped = self._tokens[count - 1]
        size = sum(map(bytes_of, self._texts[:count]))
        self._bytes -= size
        self._budget.used -= size
        del self._texts[:count], self._tokens[:count]
        self._dropped += count
