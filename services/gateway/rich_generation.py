"""Generations that show more than the text of one output; see rich.py."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence

from maas.inference.v1 import generation_pb2, scores_pb2, tools_pb2
from typing_extensions import override

from libs.errors import Aborted, OutOfRange, Reason
from services.gateway import frames
from services.gateway.attempts import Attempts
from services.gateway.books import Books
from services.gateway.domain import EndCause, Opening
from services.gateway.frames import Frame
from services.gateway.placement import Placed
from services.gateway.release import Batch
from services.gateway.replay import Budget
from services.gateway.rich import AnySink, RichSink
from services.gateway.rich_encoding import append_scores
from services.gateway.rich_log import RichLog
from services.gateway.running import Generation
from services.gateway.slices import Hold
from services.gateway.terms import Terms, Times
from services.gateway.whole import WHOLE_BYTES_MAX

# Waits for the readers of a stream at most: more than a prompt of 128 Ki tokens comes to, with 20
# alternatives each, which a worker sends all at once.
WAITING_BYTES_MAX = 64 * 1024 * 1024


class RichGeneration(Generation):
    """A generation of several outputs, or of more than text.

    Attributes:
        log: what was released; None when nobody may come later.
    """

    log: RichLog | None

    def __init__(
        self,
        *,
        books: Books,
        opening: Opening,
        terms: Terms,
        hold: Hold,
        attempts: Attempts,
        placed: Placed,
        times: Times,
        log: RichLog | None,
        budget: Budget,
        on_end: Callable[[Generation], None],
    ) -> None:
        """Takes over an execution that a worker has accepted. Raises as the journal does."""
        self._rich_sink = _rich(placed.sink)
        self._budget = budget
        # Of the budget, for what waits.
        self._booked = 0
        # Released; of several outputs none.
        self._token_ids = array("I")
        super().__init__(
            books=books,
            opening=opening,
            terms=terms,
            hold=hold,
            attempts=attempts,
            placed=placed,
            times=times,
            log=log,
            on_end=on_end,
        )

    @override
    def outputs(
        self,
    ) -> tuple[Sequence[generation_pb2.Output], scores_pb2.PromptScores | None]:
        """Returns all outputs, whole, and the scores of the prompt."""
        assert self.log is not None
        wholes = [_Whole(index) for index in range(self._rich_sink.terms.count)]
        for delta in self.log.deltas():
            wholes[delta.index].add(delta)
        return [whole.output() for whole in wholes], self._prompt_scores()

    @override
    def look_after(self) -> None:
        """Sees to output that nobody takes now, and to what outgrows its bounds."""
        super().look_after()
        self._check_size()
        self._book()

    @override
    def release_into(self, batch: Batch) -> None:
        """Releases what readers can take now, unless it has outgrown its bounds."""
        self._check_size()
        super().release_into(batch)
        self._book()

    @override
    def finish(self, cause: EndCause) -> None:
        """Ends it, and drops what nobody is going to get. Repeating changes nothing."""
        if self.cause is not None:
            return
        super().finish(cause)
        self._rich_sink.close()
        self._book()

    @override
    def _release(self, batch: Batch, tokens_max: int) -> Frame | None:
        chunk = self._rich_sink.take(tokens_max)
        count = self.output_tokens + chunk.tokens
        if count > self.terms.max_output_tokens:
            self._overrun()
            return None
        if chunk.tokens:
            batch.progress.append((self._ordinal, count))
            self._token_ids.extend(chunk.token_ids)
            self.output_tokens = count
            self.reasoning_tokens += chunk.reasoning_tokens
            if self.first_s is None:
                self._begin(batch)
        if self.log is not None:
            self.log.append(chunk.data, count, is_prompt=chunk.is_prompt)
        self.sequence += 1
        if chunk.is_last:
            self._has_all = True
            batch.ended.append(self)
        if chunk.is_prompt:
            return frames.prompt_scores(
                sequence=self.sequence, scores=chunk.data, output_tokens=count
            )
        return frames.rich_delta(sequence=self.sequence, outputs=chunk.data, output_tokens=count)

    @override
    def _released(self, number: int) -> Frame | None:
        merged = self.log.read(number) if self.log is not None else None
        if merged is None:
            return None
        if merged.is_prompt:
            return frames.prompt_scores(
                sequence=merged.last + 2, scores=merged.data, output_tokens=merged.tokens_after
            )
        return frames.rich_delta(
            sequence=merged.last + 2,
            first_sequence=merged.first + 2 if merged.last > merged.first else 0,
            outputs=merged.data,
            output_tokens=merged.tokens_after,
        )

    @override
    def _suspend(self) -> Sequence[int] | None:
        sink = self._rich_sink
        if self.terms.is_exact and not sink.is_parsed:
            self._take_over(sink.rest())
            return [*self._token_ids, *self._rich_sink.token_ids]
        if self.sequence > 1:
            # Somebody may have seen the beginning, and another one would not be that of its end.
            return None
        # Nobody has seen any of it: it begins anew.
        self._take_over(RichSink(sink.terms))
        return []

    @override
    def _new_sink(self) -> AnySink:
        return self._rich_sink.successor()

    @override
    def _go_on_with(self, sink: AnySink) -> None:
        following = _rich(sink)
        following.adopt(self._rich_sink)
        self._take_over(following)

    def _take_over(self, sink: RichSink) -> None:
        self._sink = self._rich_sink = sink

    def _book(self) -> None:
        """Counts what waits in with all that the gateway keeps."""
        waiting = self._rich_sink.waiting_bytes
        self._budget.used += waiting - self._booked
        self._booked = waiting

    def _check_size(self) -> None:
        """Sees to output that becomes more than can be answered, or than may wait."""
        if self.cause is not None:
            return
        waiting = self._rich_sink.waiting_bytes
        if not self.terms.is_unary:
            if waiting > WAITING_BYTES_MAX:
                self._cut_readers()
        elif self.log is not None and self.log.payload + waiting > WHOLE_BYTES_MAX:
            # Before it is released: who gets nothing pays for the prompt, as if he had cancelled.
            self.end(
                OutOfRange(
                    "the result is larger than one answer may be: ask for a stream of it",
                    metadata={"generationId": self.opening.generation_id},
                ),
                EndCause.CLIENT_CANCELLED,
            )

    def _cut_readers(self) -> None:
        """Ends calls that read slower than the worker writes, and what does not live without."""
        now_s = asyncio.get_running_loop().time()
        since = [reader.writing_since_s or now_s for reader in self.readers if reader.takes]
        error = Aborted(
            "the client reads too slowly",
            reason=Reason.CONSUMER_STALLED,
            metadata={
                "stallSeconds": f"{now_s - min(since, default=now_s):.3g}",
                "generationId": self.opening.generation_id,
                "resumable": str(self.terms.lives_on).lower(),
            },
        )
        for reader in self.readers:
            if reader.takes:
                reader.fail(error)
        if not self.terms.lives_on:
            self.end(error, EndCause.STALLED)

    def _prompt_scores(self) -> scores_pb2.PromptScores | None:
        assert self.log is not None
        whole: scores_pb2.PromptScores | None = None
        for part in self.log.prompt_scores():
            if whole is None:
                whole = part
            else:
                append_scores(whole.scores, part.scores)
        return whole


class _Whole:
    """One output, put together: texts once, as adding to them one by one takes quadratic time."""

    def __init__(self, index: int) -> None:
        self._made = generation_pb2.Output(index=index)
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: dict[int, tools_pb2.ToolCall] = {}
        self._arguments: dict[int, list[str]] = {}

    def add(self, delta: generation_pb2.OutputDelta) -> None:
        """Adds what comes next."""
        self._texts.append(delta.text)
        self._thoughts.append(delta.reasoning)
        self._made.token_ids.extend(delta.token_ids)
        if delta.HasField("scores"):
            append_scores(self._made.scores, delta.scores)
        if delta.HasField("end"):
            self._made.end.CopyFrom(delta.end)
        if delta.HasField("tool_call"):
            part = delta.tool_call
            call = self._calls.setdefault(part.call_index, tools_pb2.ToolCall())
            call.id, call.name = call.id or part.id, call.name or part.name
            self._arguments.setdefault(part.call_index, []).append(part.arguments_json)

    def output(self) -> generation_pb2.Output:
        """Returns the output."""
        self._made.text = "".join(self._texts)
        self._made.reasoning = "".join(self._thoughts)
        for index, call in sorted(self._calls.items()):
            call.arguments_json = "".join(self._arguments[index])
            self._made.tool_calls.append(call)
        return self._made


def _rich(sink: AnySink) -> RichSink:
    assert isinstance(sink, RichSink)
    return sink
