"""One generation between its worker and its client: a small buffer and one end.

The worker's link pushes, the handler takes; both on the same event loop. What is pushed while the
transport is busy is taken as one chunk, so frames grow under load by themselves. The buffer is
bounded by max_output_tokens.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from maas.inference.v1 import generation_pb2

from libs.errors import MaasError


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
    """Where a link puts the events of one execution."""

    accepted: asyncio.Future[int]
    _texts: list[str] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _end: generation_pb2.OutputEnd | None = None
    _failure: MaasError | None = None
    _waiter: asyncio.Future[None] | None = None

    def accept(self, input_tokens: int) -> None:
        """The worker has queued the execution."""
        if not self.accepted.done():
            self.accepted.set_result(input_tokens)

    def push(self, text: str, token_ids: list[int]) -> None:
        """New output. On the token path."""
        self._texts.append(text)
        self._token_ids += token_ids
        if self._waiter is not None:
            self._wake()

    def finish(self, end: generation_pb2.OutputEnd) -> None:
        """The output has ended well."""
        self._end = end
        self._wake()

    def fail(self, error: MaasError) -> None:
        """There will be no more output. The first failure stays; an end is not undone."""
        if self._failure is None and self._end is None:
            self._failure = error
        if not self.accepted.done():
            self.accepted.set_exception(error)
            # Whoever waits hears of it; if nobody does, that is no defect.
            self.accepted.exception()
        self._wake()

    @property
    def failure(self) -> MaasError | None:
        """Why there will be no more output."""
        return self._failure

    async def take(self) -> Chunk:
        """Waits for output and takes all there is.

        Raises:
            MaasError: the execution failed; what it had pushed before is dropped.
        """
        while not self._texts and self._end is None and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._failure is not None:
            raise self._failure
        texts, token_ids = self._texts, self._token_ids
        self._texts, self._token_ids = [], []
        text = texts[0] if len(texts) == 1 else "".join(texts)
        return Chunk(text, token_ids, self._end)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def new_sink() -> Sink:
    """Makes an empty sink on the running loop."""
    return Sink(asyncio.get_running_loop().create_future())
