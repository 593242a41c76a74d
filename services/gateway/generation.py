"""What a worker has made of one execution and nobody has released yet.

A worker's link pushes, the generation takes; both on the same event loop. What is pushed while the
client's transport is busy is taken as one chunk, so frames grow under load by themselves. Bounded
by max_output_tokens, which the generation sees to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, scores_pb2

from libs.errors import Internal, MaasError, Reason
from services.gateway.meter import Meter
from services.gateway.pacing import UNBOUNDED

# Rows in one chunk. A row is a token, or some that were merged on the way.
ROWS_MAX = 1024
# Of the output in one frame. The contract allows 256 KiB; the rest is for what stands around it.
FRAME_BYTES_MAX = 248 * 1024
CHARACTER_BYTES_MAX = 4
TOKEN_ID_BYTES_MAX = 5


def rows_of_frame(texts: Sequence[str], counts: Sequence[int], tokens_max: int = UNBOUNDED) -> int:
    """Returns how many rows fit into one frame: whole ones only, and one in any case.

    Args:
        texts: of the rows, in order.
        counts: tokens of each.
        tokens_max: of all rows together.
    """
    size = tokens = 0
    for number, (text, count) in enumerate(zip(texts, counts, strict=True)):
        size += len(text.encode("utf-8")) + TOKEN_ID_BYTES_MAX * count
        tokens += count
        if number and (size > FRAME_BYTES_MAX or tokens > tokens_max):
            return number
    return len(texts)


class Inlet(Protocol):
    """Where a link puts what a worker says of one lane."""

    def accept(self, input_tokens: int) -> None:
        """The worker has queued the execution, whose prompt has so many tokens."""
        ...

    def prefill(self, cached_tokens: int) -> None:
        """The prefix cache had so many tokens of the prompt."""
        ...

    def push_prompt_scores(self, scores: scores_pb2.PromptScores) -> None:
        """Log-probabilities of the prompt."""
        ...

    def push(self, text: str, token_ids: list[int]) -> None:
        """New output."""
        ...

    def push_one(self, text: str, token_id: int) -> None:
        """New output of one token. On the token path."""
        ...

    def push_rich(
        self,
        text: str,
        token_ids: list[int],
        shown: engine_pb2.RowSegments | None,
        scores: scores_pb2.TokenScores | None,
    ) -> None:
        """New output that is more than text.

        Args:
            text: whole characters; empty with `shown`.
            token_ids: that made it.
            shown: what it shows.
            scores: of its tokens.
        """
        ...

    def took(self, engine_time_ns: int) -> None:
        """The output has ended, however, and took so many nanoseconds of the engine."""
        ...

    def finish(self, end: generation_pb2.OutputEnd) -> None:
        """The output has ended well."""
        ...

    def fail(self, error: MaasError) -> None:
        """There will be no more output."""
        ...


class Intake(Protocol):
    """What the lifecycle of a generation needs to know of its sink."""

    accepted: asyncio.Future[int]
    on_output: Callable[[], None] | None
    on_event: Callable[[], None] | None
    failure: MaasError | None
    is_over: bool
    has_output: bool
    cached_tokens: int
    meter: Meter

    @property
    def waiting(self) -> int:
        """Tokens that have not been taken."""
        ...

    @property
    def inlets(self) -> Sequence[Inlet]:
        """One for each output."""
        ...


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
        failure: why there will be no more output.
        is_over: the output has ended well; some of it may still have to be taken.
        has_output: there is something to take.
        cached_tokens: of the prompt, that the prefix cache had.
        meter: of the generation that it belongs to.
    """

    accepted: asyncio.Future[int]
    on_output: Callable[[], None] | None = None
    on_event: Callable[[], None] | None = None
    failure: MaasError | None = None
    is_over: bool = False
    has_output: bool = False
    cached_tokens: int = 0
    meter: Meter = field(default_factory=Meter)
    _texts: list[str] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    # Tokens of the rows, by their places, that have not one token each. A row is never split: its
    # text is of all of its tokens together.
    _counts: dict[int, int] = field(default_factory=dict)
    _end: generation_pb2.OutputEnd | None = None

    def accept(self, input_tokens: int) -> None:
        """The worker has queued the execution."""
        if not self.accepted.done():
            self.accepted.set_result(input_tokens)

    def prefill(self, cached_tokens: int) -> None:
        """The prefix cache had so many tokens of the prompt."""
        self.cached_tokens = max(self.cached_tokens, cached_tokens)

    def push_prompt_scores(self, scores: scores_pb2.PromptScores) -> None:  # noqa: ARG002 - Inlet
        """Nobody has asked for them."""
        self.fail(_unasked())

    def push_rich(
        self,
        text: str,  # noqa: ARG002 - Inlet
        token_ids: list[int],  # noqa: ARG002 - Inlet
        shown: engine_pb2.RowSegments | None,  # noqa: ARG002 - Inlet
        scores: scores_pb2.TokenScores | None,  # noqa: ARG002 - Inlet
    ) -> None:
        """Nobody has asked for more than text, and what it is cannot be shown."""
        self.fail(_unasked())

    def push(self, text: str, token_ids: list[int]) -> None:
        """New output.

        Args:
            text: whole characters.
            token_ids: that made it.
        """
        if len(token_ids) != 1:
            self._counts[len(self._texts)] = len(token_ids)
        self._texts.append(text)
        self._token_ids += token_ids
        self.has_output = True
        if self.on_output is not None:
            self.on_output()

    def push_one(self, text: str, token_id: int) -> None:
        """New output of one token. On the token path."""
        self._texts.append(text)
        self._token_ids.append(token_id)
        self.has_output = True
        if self.on_output is not None:
            self.on_output()

    def took(self, engine_time_ns: int) -> None:
        """The output took so many nanoseconds of the engine."""
        self.meter.add(engine_time_ns)

    def finish(self, end: generation_pb2.OutputEnd) -> None:
        """The output has ended well."""
        self._end = end
        self.is_over = self.has_output = True
        if self.on_event is not None:
            self.on_event()

    def fail(self, error: MaasError) -> None:
        """There will be no more output. The first failure stays; an end is not undone."""
        if self.failure is None and self._end is None:
            self.failure = error
        if not self.accepted.done():
            self.accepted.set_exception(error)
            # Whoever waits hears of it; if nobody does, that is no defect.
            self.accepted.exception()
        if self.on_event is not None:
            self.on_event()

    @property
    def token_ids(self) -> list[int]:
        """Tokens that have not been taken."""
        return self._token_ids

    @property
    def waiting(self) -> int:
        """Number of tokens that have not been taken."""
        return len(self._token_ids)

    @property
    def inlets(self) -> Sequence[Inlet]:
        """This sink alone: it has one output."""
        return (self,)

    def take(self, tokens_max: int = UNBOUNDED) -> Chunk:
        """Takes what there is, at most ROWS_MAX rows and what fits into a frame.

        Args:
            tokens_max: takes no more tokens than that, but one row in any case.
        """
        texts, token_ids = self._texts, self._token_ids
        if len(texts) == 1:
            text = texts[0]
        elif len(token_ids) > tokens_max:
            return self._take_some(tokens_max)
        else:
            text = "".join(texts)
            most = CHARACTER_BYTES_MAX * len(text) + TOKEN_ID_BYTES_MAX * len(token_ids)
            if most > FRAME_BYTES_MAX or len(texts) > ROWS_MAX:
                return self._take_some(tokens_max)
        self._texts, self._token_ids = [], []
        self.has_output = False
        if self._counts:
            self._counts = {}
        return Chunk(text, token_ids, self._end)

    def _take_some(self, tokens_max: int) -> Chunk:
        # Of what has piled up no more is looked at than can be taken: a row has a token at least.
        seen = self._texts[: min(ROWS_MAX, tokens_max)]
        counts = [self._counts.get(place, 1) for place in range(len(seen))]
        rows = rows_of_frame(seen, counts, tokens_max)
        tokens = sum(counts[:rows])
        text, token_ids = "".join(seen[:rows]), self._token_ids[:tokens]
        del self._texts[:rows], self._token_ids[:tokens]
        self._counts = {
            place - rows: count for place, count in self._counts.items() if place >= rows
        }
        self.has_output = bool(self._texts)
        return Chunk(text, token_ids, None if self._texts else self._end)

    def adopt(self, earlier: Self) -> None:
        """Puts before its own output what an earlier execution left untaken."""
        counts = earlier._counts_of_rows() + self._counts_of_rows()
        self._texts[:0] = earlier._texts
        self._token_ids[:0] = earlier._token_ids
        self.has_output = self.has_output or bool(self._texts)
        self.cached_tokens = max(self.cached_tokens, earlier.cached_tokens)
        self._put_counts(counts)

    def _counts_of_rows(self) -> list[int]:
        return [self._counts.get(place, 1) for place in range(len(self._texts))]

    def _put_counts(self, counts: list[int]) -> None:
        self._counts = {place: count for place, count in enumerate(counts) if count != 1}


def _unasked() -> Internal:
    return Internal("the engine failed", reason=Reason.ENGINE_FAILURE)


def new_sink() -> Sink:
    """Makes an empty sink on the running loop."""
    return Sink(asyncio.get_running_loop().create_future())


def rest_of(sink: Sink) -> Sink:
    """Makes a sink that nobody pushes to, with what another one still had."""
    rest = new_sink()
    rest.adopt(sink)
    return rest
