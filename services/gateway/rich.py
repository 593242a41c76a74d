"""What workers have made of executions that show more than the text of one output.

Several outputs, reasoning, calls of tools and log-probabilities. Rows are encoded once, as they
come, into deltas as they will be sent; from then on they are bytes with a count. Where a request
asks for plain text nothing of this is used (generation.py).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, scores_pb2

from libs.errors import MaasError
from services.gateway import rich_encoding as encoding
from services.gateway.generation import (
    CHARACTER_BYTES_MAX,
    FRAME_BYTES_MAX,
    ROWS_MAX,
    Inlet,
    Sink,
)
from services.gateway.meter import Meter
from services.gateway.pacing import PORTION, UNBOUNDED

# Of one delta of text alone: less than a frame, so that others fit beside it.
TEXT_BYTES_MAX = CHARACTER_BYTES_MAX * encoding.CONTENT_CHARACTERS_MAX
# What stands around the text of a delta.
DELTA_BYTES_MAX = 16
# With more than this waiting, whoever owns the sink looks at it at once, and not once a while.
ALARM_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RichTerms:
    """What comes back.

    Attributes:
        count: outputs.
        with_ids: token ids beside the text.
        with_reasoning: reasoning is sent; else it is counted only.
    """

    count: int
    with_ids: bool
    with_reasoning: bool


@dataclass(slots=True)
class Piece:
    """A part of the output that is sent as a whole.

    Attributes:
        data: entries of Delta.outputs, or a PromptScores; may be empty where output is hidden.
        tokens: output tokens that are counted with it.
        reasoning_tokens: of these.
        is_prompt: it is a PromptScores.
        texts: instead of `data`: text alone, to which more may be added before it is sent.
        index: of the output whose text it is.
        size: bytes when it is sent, or somewhat more.
    """

    data: bytes
    tokens: int = 0
    reasoning_tokens: int = 0
    is_prompt: bool = False
    texts: list[str] | None = None
    index: int = 0
    size: int = 0

    def encoded(self) -> bytes:
        """Returns what is sent."""
        if self.texts is None:
            return self.data
        return encoding.text_delta(self.index, "".join(self.texts))


@dataclass(slots=True)
class RichChunk:
    """New output, for one frame.

    Attributes:
        data: entries of Delta.outputs, or a PromptScores.
        tokens: output tokens.
        reasoning_tokens: of these.
        token_ids: of the tokens; of several outputs none.
        is_prompt: it is a PromptScores.
        is_last: all outputs have ended with it.
    """

    data: bytes
    tokens: int
    reasoning_tokens: int
    token_ids: list[int]
    is_prompt: bool
    is_last: bool


class RichSink:
    """Where a link puts the events of one execution with all of its outputs.

    Attributes:
        accepted: exact tokens of the prompt, once the worker has queued the execution.
        on_output: called after output has come; None while nobody could take it.
        on_event: called after the end of all outputs or a failure has come.
        failure: why there will be no more output. One output's failure is that of all.
        is_over: all outputs have ended well; some of them may still have to be taken.
        has_output: there is something to take.
        cached_tokens: of the prompt, that the prefix cache had.
        waiting: tokens that have not been taken.
        waiting_bytes: likewise.
        is_parsed: some of the output was not, or not only, text.
        meter: of the generation that it belongs to.
    """

    def __init__(self, terms: RichTerms, prompt_next: int = 0) -> None:
        """Makes an empty sink on the running loop.

        Args:
            terms: what comes back.
            prompt_next: tokens of the prompt whose log-probabilities have come from an earlier
                worker.
        """
        self.accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.on_output: Callable[[], None] | None = None
        self.on_event: Callable[[], None] | None = None
        self.failure: MaasError | None = None
        self.is_over = False
        self.has_output = False
        self.cached_tokens = 0
        self.waiting = 0
        self.waiting_bytes = 0
        self.is_parsed = False
        self.meter = Meter()
        self.terms = terms
        self._lanes = tuple(_Lane(self, index) for index in range(terms.count))
        self._running = terms.count
        self._pieces: deque[Piece] = deque()
        self._token_ids: list[int] = []
        # Place in the prompt of the next token whose log-probability is wanted.
        self._prompt_next = prompt_next
        self._is_closed = False

    @property
    def inlets(self) -> Sequence[Inlet]:
        """One for each output."""
        return self._lanes

    @property
    def token_ids(self) -> list[int]:
        """Tokens that have not been taken; of several outputs none."""
        return self._token_ids

    def accept(self, input_tokens: int) -> None:
        """The worker has queued the execution."""
        if not self.accepted.done():
            self.accepted.set_result(input_tokens)

    def prefill(self, cached_tokens: int) -> None:
        """The prefix cache had so many tokens of the prompt."""
        self.cached_tokens = max(self.cached_tokens, cached_tokens)

    def push_prompt_scores(self, part: scores_pb2.PromptScores) -> None:
        """Log-probabilities of the prompt. What came from an earlier worker is left out."""
        known = self._prompt_next - part.offset
        scores = part.scores if known <= 0 else encoding.scores_from(part.scores, known)
        if not scores.token_ids:
            return
        offset = max(part.offset, self._prompt_next)
        self._prompt_next = offset + len(scores.token_ids)
        for data in encoding.prompt_parts(offset, scores):
            self._put(Piece(data, is_prompt=True))
        self._wake()

    def push_row(
        self,
        index: int,
        text: str,
        token_ids: list[int],
        shown: engine_pb2.RowSegments | None,
        scores: scores_pb2.TokenScores | None,
    ) -> None:
        """New output of one output. On the token path.

        Args:
            index: of the output.
            text: whole characters; empty with `shown`.
            token_ids: that made it.
            shown: what it shows, if not only text.
            scores: of its tokens.
        """
        terms = self.terms
        is_short = len(text) <= encoding.CONTENT_CHARACTERS_MAX
        if is_short and shown is None and scores is None and not terms.with_ids:
            self._push_text(index, text, token_ids)
            return
        reasoning_tokens = 0
        if shown is not None:
            reasoning_tokens = shown.reasoning_tokens
            self.is_parsed = True
        contents = encoding.contents(text, shown, with_reasoning=terms.with_reasoning)
        hidden = 0 if terms.with_reasoning or shown is None else _hidden(shown, len(token_ids))
        if hidden and scores is not None:
            scores = encoding.scores_from(scores, hidden)
        ids: Sequence[int] = token_ids[hidden:] if terms.with_ids else ()
        deltas = encoding.deltas(index, contents, ids, scores)
        # All of its tokens count with its first delta: counted before it is shown.
        first = deltas[0] if deltas else b""
        self._put(Piece(first, len(token_ids), reasoning_tokens))
        for data in deltas[1:]:
            self._put(Piece(data))
        self._count(token_ids)

    def _push_text(self, index: int, text: str, token_ids: list[int]) -> None:
        """Text alone: one delta of all that comes before it is taken."""
        size = len(text) if text.isascii() else len(text.encode("utf-8"))
        last = self._pieces[-1] if self._pieces else None
        if (
            last is not None
            and last.texts is not None
            and last.index == index
            and last.size + size <= TEXT_BYTES_MAX
            and last.tokens + len(token_ids) <= PORTION
        ):
            last.texts.append(text)
            last.tokens += len(token_ids)
            last.size += size
            self.waiting_bytes += size
        else:
            size += DELTA_BYTES_MAX
            self._put(Piece(b"", len(token_ids), texts=[text], index=index, size=size))
        self._count(token_ids)

    def _count(self, token_ids: list[int]) -> None:
        self.waiting += len(token_ids)
        if self.terms.count == 1:
            self._token_ids += token_ids
        self._wake()

    def finish(self, index: int, end: generation_pb2.OutputEnd) -> None:
        """One output has ended well."""
        self._put(Piece(encoding.end(index, end)))
        self._running -= 1
        if self._running:
            self._wake()
            return
        self.is_over = True
        if self.on_event is not None:
            self.on_event()

    def fail(self, error: MaasError) -> None:
        """There will be no more output. The first failure stays; an end is not undone."""
        if self.failure is None and not self.is_over:
            self.failure = error
        if not self.accepted.done():
            self.accepted.set_exception(error)
            # Whoever waits hears of it; if nobody does, that is no defect.
            self.accepted.exception()
        if self.on_event is not None:
            self.on_event()

    def take(self, tokens_max: int = UNBOUNDED) -> RichChunk:
        """Takes what there is and fits into a frame. Something has to be there.

        Args:
            tokens_max: takes no more tokens than that, but one piece in any case.
        """
        pieces = self._pieces
        if len(pieces) == 1:
            return self._take_one(pieces.popleft())
        taken = [pieces.popleft()]
        size, tokens = taken[0].size, taken[0].tokens
        while pieces and len(taken) < ROWS_MAX:
            piece = pieces[0]
            if taken[0].is_prompt or piece.is_prompt or size + piece.size > FRAME_BYTES_MAX:
                break
            if tokens + piece.tokens > tokens_max:
                break
            taken.append(pieces.popleft())
            size += piece.size
            tokens += piece.tokens
        self.waiting -= tokens
        self.waiting_bytes -= size
        self.has_output = bool(pieces)
        token_ids = self._token_ids[:tokens]
        del self._token_ids[:tokens]
        return RichChunk(
            data=b"".join([piece.encoded() for piece in taken]),
            tokens=tokens,
            reasoning_tokens=sum(piece.reasoning_tokens for piece in taken),
            token_ids=token_ids,
            is_prompt=taken[0].is_prompt,
            is_last=self.is_over and not pieces,
        )

    def _take_one(self, piece: Piece) -> RichChunk:
        """Takes the only piece. Nearly always, while readers are fast."""
        self.waiting -= piece.tokens
        self.waiting_bytes -= piece.size
        self.has_output = False
        token_ids, self._token_ids = self._token_ids, []
        return RichChunk(
            data=piece.encoded(),
            tokens=piece.tokens,
            reasoning_tokens=piece.reasoning_tokens,
            token_ids=token_ids,
            is_prompt=piece.is_prompt,
            is_last=self.is_over,
        )

    def adopt(self, earlier: Self) -> None:
        """Puts before its own output what an earlier execution left untaken."""
        self._pieces.extendleft(reversed(earlier._pieces))
        self._token_ids[:0] = earlier._token_ids
        self.waiting += earlier.waiting
        self.waiting_bytes += earlier.waiting_bytes
        self.cached_tokens = max(self.cached_tokens, earlier.cached_tokens)
        self.has_output = self.has_output or earlier.has_output

    def successor(self) -> RichSink:
        """Makes an empty sink for an execution that goes on where this one has stopped."""
        following = RichSink(self.terms, self._prompt_next)
        following.is_parsed = self.is_parsed
        return following

    def rest(self) -> RichSink:
        """Makes a sink that nobody pushes to, with what this one still has."""
        rest = self.successor()
        rest.adopt(self)
        return rest

    def close(self) -> None:
        """Drops what there is, and whatever still comes until the worker has heard of the end."""
        self._is_closed = True
        self._pieces.clear()
        self._token_ids = []
        self.waiting = self.waiting_bytes = 0
        self.has_output = False

    def _put(self, piece: Piece) -> None:
        if self._is_closed:
            return
        piece.size = piece.size or len(piece.data)
        self._pieces.append(piece)
        self.waiting_bytes += piece.size
        self.has_output = True
        if self.waiting_bytes > ALARM_BYTES and self.on_event is not None:
            self.on_event()

    def _wake(self) -> None:
        if self.on_output is not None:
            self.on_output()


class _Lane:
    """Where a link puts what a worker says of one of the outputs."""

    __slots__ = ("_index", "_sink")

    def __init__(self, sink: RichSink, index: int) -> None:
        self._sink = sink
        self._index = index

    def accept(self, input_tokens: int) -> None:
        """The worker has queued the execution."""
        self._sink.accept(input_tokens)

    def prefill(self, cached_tokens: int) -> None:
        """The prefix cache had so many tokens of the prompt."""
        self._sink.prefill(cached_tokens)

    def push_prompt_scores(self, scores: scores_pb2.PromptScores) -> None:
        """Log-probabilities of the prompt."""
        self._sink.push_prompt_scores(scores)

    def push(self, text: str, token_ids: list[int]) -> None:
        """New output."""
        self._sink.push_row(self._index, text, token_ids, None, None)

    def push_one(self, text: str, token_id: int) -> None:
        """New output of one token."""
        self._sink.push_row(self._index, text, [token_id], None, None)

    def push_rich(
        self,
        text: str,
        token_ids: list[int],
        shown: engine_pb2.RowSegments | None,
        scores: scores_pb2.TokenScores | None,
    ) -> None:
        """New output that is more than text."""
        self._sink.push_row(self._index, text, token_ids, shown, scores)

    def took(self, engine_time_ns: int) -> None:
        """The output took so many nanoseconds of the engine."""
        self._sink.meter.add(engine_time_ns)

    def finish(self, end: generation_pb2.OutputEnd) -> None:
        """The output has ended well."""
        self._sink.finish(self._index, end)

    def fail(self, error: MaasError) -> None:
        """There will be no more output."""
        self._sink.fail(error)


def _hidden(shown: engine_pb2.RowSegments, count: int) -> int:
    """Returns how many tokens of a row, its first ones, belong to reasoning that is not shown.

    Reasoning begins an output or does not come. Pieces of its mark may not be counted with it;
    where a row shows nothing else, they are hidden too.

    Args:
        shown: what the row shows.
        count: of its tokens.
    """
    if all(segment.HasField("reasoning") for segment in shown.segments):
        return count
    return shown.reasoning_tokens


AnySink = Sink | RichSink
