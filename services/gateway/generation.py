"""What a worker has made of one execution and nobody has released yet.

A worker's link pushes, the generation takes; both on the same event loop. What is pushed while the
client's transport is busy is taken as one chunk, so frames grow under load by themselves. Bounded
by max_output_tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from maas.inference.v1 import generation_pb2

from libs.errors import MaasError

# Rows in one chunk. A row is a token, or some that were merged on the way: frames stay far below
# the 256 KiB that the contract allows.
ROWS_MAX = 1024


@dataclass(slots=True)
class Chunk:
    """New output.

    Attributes:
        text: whole characters.
        token_ids: the tokens that made it.
        end: in the last chunk.
    """

    text: str
    token_ids: list[int]
    end: generation_pb2.OutputEnd | None


@dataclass(slots=True)
class Sink:
    """Where a link puts the events of one execution.

    Attributes:
        accepted: exact tokens of the prompt, once the worker has queued the execution.
        on_output: called after output has come; None while nobody could take it.
        on_event: called after an end or a failure has come.
    """

    accepted: asyncio.Future[int]
    on_output: Callable[[], None] | None = None
    on_event: Callable[[], None] | None = None
    _texts: list[str] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _end: generation_pb2.OutputEnd | None = None
    _failure: MaasError | None = None

    def accept(self, input_tokens: int) -> None:
        """The worker has queued the execution."""
        if not self.accepted.done():
            self.accepted.set_result(input_tokens)

    def push(self, text: str, token_ids: list[int]) -> None:
        """New output. On the token path."""
        self._texts.append(text)
        self._token_ids += token_ids
        if self.on_output is not None:
            self.on_output()

    def finish(self, end: generation_pb2.OutputEnd) -> None:
        """The output has ended well."""
        self._end = end
        if self.on_event is not None:
            self.on_event()

    def fail(self, error: MaasError) -> None:
        """There will be no more output. The first failure stays; an end is not undone."""
        if self._failure is None and self._end is None:
            self._failure = error
        if not self.accepted.done():
            self.accepted.set_exception(error)
            # Whoever waits hears of it; if nobody does, that is no defect.
            self.accepted.exception()
        if self.on_event is not None:
            self.on_event()

    @property
    def failure(self) -> MaasError | None:
        """Why there will be no more output."""
        return self._failure

    @property
    def is_over(self) -> bool:
        """Whether the output has ended well; some of it may still have to be taken."""
        return self._end is not None

    @property
    def has_output(self) -> bool:
        """Whether there is something to take."""
        return bool(self._texts) or self._end is not None

    @property
    def token_ids(self) -> list[int]:
        """Tokens that have not been taken."""
        return self._token_ids

    def take(self) -> Chunk:
        """Takes what there is, at most ROWS_MAX rows while each is one token."""
        texts, token_ids = self._texts, self._token_ids
        if len(texts) > ROWS_MAX and len(texts) == len(token_ids):
            chunk = Chunk("".join(texts[:ROWS_MAX]), token_ids[:ROWS_MAX], None)
            del texts[:ROWS_MAX], token_ids[:ROWS_MAX]
            return chunk
        self._texts, self._token_ids = [], []
        text = texts[0] if len(texts) == 1 else "".join(texts)
        return Chunk(text, token_ids, self._end)

    def adopt(self, earlier: Self) -> None:
        """Puts before its own output what an earlier execution left untaken."""
        self._texts[:0] = earlier._texts
        self._token_ids[:0] = earlier._token_ids


def new_sink() -> Sink:
    """Makes an empty sink on the running loop."""
    return Sink(asyncio.get_running_loop().create_future())


def rest_of(sink: Sink) -> Sink:
    """Makes a sink that nobody pushes to, with what another one still had."""
    rest = new_sink()
    rest.adopt(sink)
    return rest
