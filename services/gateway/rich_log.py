"""Encoded deltas that were released, kept for whoever has missed them.

As replay.py, for output that is more than the text of one output: what is kept is what was sent, so
that several deltas in one frame are their bytes one after the other. Holds output: never written to
disk, never logged.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from maas.inference.v1 import generation_pb2, scores_pb2

from services.gateway.generation import FRAME_BYTES_MAX
from services.gateway.replay import MERGED_MAX, Budget

# Of an entry beyond its bytes: the object, its place in the list, its count, its kind.
_ENTRY_BYTES = 64


@dataclass(frozen=True, slots=True)
class Merged:
    """Entries, merged.

    Attributes:
        first: number of the first entry, from 0.
        last: number of the last.
        data: entries of Delta.outputs, or a PromptScores.
        is_prompt: it is a PromptScores, and one entry.
        tokens_after: output tokens with the last.
    """

    first: int
    last: int
    data: bytes
    is_prompt: bool
    tokens_after: int


class RichLog:
    """What one generation has released, numbered from 0: an entry for each frame.

    Attributes:
        payload: bytes of what is kept, as it was sent.
    """

    __slots__ = (
        "_budget",
        "_bytes",
        "_bytes_max",
        "_dropped",
        "_entries",
        "_kinds",
        "_tokens",
        "payload",
    )

    def __init__(self, budget: Budget, bytes_max: int) -> None:
        """Makes an empty log.

        Args:
            budget: of all logs.
            bytes_max: of this one; above it the older half goes.
        """
        self._budget = budget
        self._bytes_max = bytes_max
        self._entries: list[bytes] = []
        self._kinds = bytearray()
        # Output tokens with each entry.
        self._tokens = array("Q")
        self._dropped = 0
        self._bytes = 0
        self.payload = 0

    @property
    def count(self) -> int:
        """Entries so far, dropped ones included."""
        return self._dropped + len(self._entries)

    def append(self, data: bytes, output_tokens: int, *, is_prompt: bool) -> None:
        """Keeps what a frame brings. Above its bound the log drops its older half."""
        self._entries.append(data)
        self._kinds.append(is_prompt)
        self._tokens.append(output_tokens)
        size = _ENTRY_BYTES + len(data)
        self._bytes += size
        self.payload += len(data)
        self._budget.used += size
        if self._bytes > self._bytes_max:
            self._drop(max(1, len(self._entries) // 2))

    def read(self, first: int) -> Merged | None:
        """Merges what fits into a frame, from a number on; None when that is not kept any more.

        Args:
            first: below `count`.
        """
        start = first - self._dropped
        if start < 0:
            return None
        stop = start + 1
        size = len(self._entries[start])
        is_prompt = bool(self._kinds[start])
        while not is_prompt and stop < min(start + MERGED_MAX, len(self._entries)):
            size += len(self._entries[stop])
            if self._kinds[stop] or size > FRAME_BYTES_MAX:
                break
            stop += 1
        return Merged(
            first=first,
            last=self._dropped + stop - 1,
            data=b"".join(self._entries[start:stop]),
            is_prompt=is_prompt,
            tokens_after=self._tokens[stop - 1],
        )

    def deltas(self) -> Iterator[generation_pb2.OutputDelta]:
        """Yields all output.

        Raises:
            ValueError: some of it was dropped.
        """
        for data in self._all(is_prompt=False):
            yield from generation_pb2.Delta.FromString(data).outputs

    def prompt_scores(self) -> Iterator[scores_pb2.PromptScores]:
        """Yields all log-probabilities of the prompt.

        Raises:
            ValueError: some of the log was dropped.
        """
        for data in self._all(is_prompt=True):
            yield scores_pb2.PromptScores.FromString(data)

    def clear(self) -> None:
        """Drops everything."""
        self._drop(len(self._entries))

    def _all(self, *, is_prompt: bool) -> Iterator[bytes]:
        if self._dropped:
            raise ValueError("the log has outgrown its bound")
        for data, kind in zip(self._entries, self._kinds, strict=True):
            if bool(kind) is is_prompt:
                yield data

    def _drop(self, count: int) -> None:
        if not count:
            return
        payload = sum(map(len, self._entries[:count]))
        size = _ENTRY_BYTES * count + payload
        self.payload -= payload
        self._bytes -= size
        self._budget.used -= size
        del self._entries[:count], self._kinds[:count], self._tokens[:count]
        self._dropped += count
