"""One accepted generation: its output, its readers, what is counted and owed, and its one end.

    worker -> sink -> release (counted, journaled) -> readers, and the log for those who come later

Whatever ends it - the engine, a client, a deadline, a revoked key, a lost worker - comes through
`finish`, and the first one wins. A lost worker does not end it while another one can go on behind
the output so far. Belongs to one event loop; needs no task of its own while output flows.

What is taken from a sink, kept and made into frames is that of two kinds: plain.py for the text of
one output, which is nearly every request, and rich_generation.py for everything else.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import structlog
from maas.inference.v1 import generation_pb2, scores_pb2

from libs.errors import Internal, MaasError, OutOfRange, Reason
from libs.process import Cancel
from services.gateway import frames, metrics
from services.gateway.attempts import Attempts
from services.gateway.books import Books
from services.gateway.domain import (
    Closing,
    EndCause,
    Opening,
    Usage,
    cause_of,
    is_movable,
)
from services.gateway.frames import Frame
from services.gateway.generation import Intake
from services.gateway.pacing import UNBOUNDED, Pace
from services.gateway.placement import Placed
from services.gateway.reader import Reader
from services.gateway.receipts import signed_receipt
from services.gateway.release import Batch
from services.gateway.rich import AnySink
from services.gateway.settlement import Settlement
from services.gateway.slices import Hold
from services.gateway.terms import Terms, Times

log = structlog.get_logger(__name__)

# Workers that one generation may lose. A request that kills every worker it meets must end.
MOVES_MAX = 3


class Log(Protocol):
    """What was released, for whoever comes later."""

    def clear(self) -> None:
        """Drops everything."""
        ...


class Generation(ABC):
    """A generation from acceptance on.

    Attributes:
        opening: as journaled.
        terms: what was agreed on.
        times: of its admission.
        sequence: number of the last frame.
        output_tokens: released.
        cached_input_tokens: of the prompt, that the prefix cache had; known with the first output.
        reasoning_tokens: of output_tokens.
        readers: calls that read it or wait for its end.
        log: deltas that were released; None when nobody may come later.
        failure: why it has no result.
        cause: of its end; None while it runs.
        ended_s: monotonic.
        receipt: of its end, serialized; empty while it runs, and where it is not charged.
    """

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
        log: Log | None,
        on_end: Callable[[Generation], None],
    ) -> None:
        self.opening = opening
        self.terms = terms
        self.times = times
        self.sequence = 1
        self.output_tokens = 0
        self.cached_input_tokens = 0
        self.reasoning_tokens = 0
        self.readers: list[Reader] = []
        self.log = log
        self.failure: MaasError | None = None
        self.cause: EndCause | None = None
        self.first_s: float | None = None
        self.ended_s: float | None = None
        self.receipt = b""
        self._books = books
        self._hold = hold
        # Holds the prompt: only while another attempt may be needed.
        self._attempts: Attempts | None = attempts
        self._meter = attempts.meter
        self._placed = placed
        self._sink: Intake = placed.sink
        self._on_end = on_end
        # All output is released.
        self._has_all = False
        self._is_complete = False
        self._is_ready = False
        self._pace = Pace(books.clock, times.arrived_s, self._go)
        # Output tokens that were released, counted and journaled before this turn.
        self._counted = 0
        self._counted_reasoning = 0
        self._moves = 0
        self._stop_moving: Cancel | None = None
        # Journaled before the first frame; from here on the client owes the prompt.
        self._ordinal = books.journal.opened(opening)
        self._sink.on_event = self.ready
        if terms.lives_on:
            # It may be over already, and nobody may come to read it.
            self.ready()

    @property
    def usage(self) -> Usage:
        """Counts so far."""
        return Usage(
            input_tokens=self.opening.input_tokens,
            output_tokens=self.output_tokens,
            cached_input_tokens=self.cached_input_tokens,
            # No part is more than its whole, whatever a worker says.
            reasoning_tokens=min(self.reasoning_tokens, self.output_tokens),
        )

    @property
    def charge(self) -> int:
        """Nanos at the frozen price for the counts so far."""
        return self.terms.price.charge(self.usage, is_background=self.opening.background)

    @abstractmethod
    def outputs(
        self,
    ) -> tuple[Sequence[generation_pb2.Output], scores_pb2.PromptScores | None]:
        """Returns all outputs, whole, and the scores of the prompt, from the log.

        Raises:
            ValueError: the log has dropped some of it.
        """

    def attach(self, reader: Reader) -> None:
        """Serves a reader until its `done` is set."""
        self.readers.append(reader)
        reader.attach(self._resume)
        self.ready()

    def detach(self, reader: Reader) -> None:
        """Serves a reader no more."""
        self.readers.remove(reader)
        reader.detach()
        if self.cause is None:
            # Output that waited for this reader may be released without one.
            self.ready()

    def ready(self) -> None:
        """Says that something may be released or written. On the token path."""
        if not self._is_ready:
            self._is_ready = True
            self._books.releaser.add(self)

    def release_into(self, batch: Batch) -> None:
        """Releases what readers can take now."""
        self._is_ready = False
        self._counted = self.output_tokens
        self._counted_reasoning = self.reasoning_tokens
        if self._sink.failure is not None and self.cause is None and not self._has_unread():
            self._lose(self._sink.failure)
        takers = 0
        self._sink.on_output = None
        for reader in self.readers:
            if not reader.takes:
                continue
            takers += 1
            if reader.is_idle:
                frame = self._next_frame(reader, batch)
                if frame is not None:
                    batch.frames.append((reader, frame))
                elif not (reader.is_collecting or self._pace.is_pausing):
                    self._sink.on_output = self.ready
        if not takers and self.cause is None and (self._sink.is_over or self.terms.lives_on):
            self._release_unread(batch)
        if self._is_complete or self.failure is not None:
            self._dismiss()

    def complete(self) -> None:
        """Ends a generation whose last output is released and counted."""
        if self.cause is not None:
            return
        self.finish(EndCause.COMPLETED)
        self.sequence += 1
        self._is_complete = True
        # Those that are being written to come by themselves.
        if any(reader.is_idle or not reader.takes for reader in self.readers):
            self.ready()

    def end(self, error: MaasError, cause: EndCause) -> None:
        """Ends it without a result; all readers get the error. Repeating changes nothing."""
        if self.cause is not None:
            return
        self.failure = error
        self.finish(cause)
        for reader in self.readers:
            reader.fail(error)

    def retract(self, error: MaasError) -> None:
        """Ends it if it has released in this turn what could not be counted: nobody gets that."""
        if self.output_tokens == self._counted:
            return
        if self.log is not None:
            self.log.clear()
        if self.cause is None:
            self.output_tokens = self._counted
            self.reasoning_tokens = self._counted_reasoning
            self.end(error, EndCause.GATEWAY_LOST)

    def look_after(self) -> None:
        """Sees to output that nobody takes now. Called once a while, and not for each token."""
        if self.cause is not None:
            return
        waiting = self._sink.waiting
        if self.output_tokens + waiting > self.terms.max_output_tokens:
            self._overrun()
        elif waiting and self.terms.lives_on:
            self.ready()

    def finish(self, cause: EndCause) -> None:
        """Ends the execution, the hold and the record. Repeating changes nothing."""
        if self.cause is not None:
            return
        if self.first_s is None:
            self.cached_input_tokens = self._cached()
        books = self._books
        owed = self.charge if cause.is_charged else 0
        closing = self._closing(cause, owed)
        # First, as it asserts what is held: then another end, free of charge, is still possible.
        books.slices.owe(self._hold, owed)
        self.cause = cause
        self.receipt = closing.receipt
        self.ended_s = books.clock.monotonic_s()
        self._sink.on_event = None
        self._sink.on_output = None
        self._placed.abort()
        if self._stop_moving is not None:
            self._stop_moving()
        self._attempts = None
        if self.terms.quota is not None:
            self.terms.quota.end(self.output_tokens)
        try:
            books.journal.closed(self._ordinal, closing)
        except MaasError:
            # The end is settled from memory; after a crash the journal's last count stands.
            log.error("journal lost an end", generation_id=self.opening.generation_id)  # noqa: TRY400
        books.settler.put(
            Settlement(
                ordinal=self._ordinal,
                opening=self.opening,
                closing=closing,
                owed=owed,
                meter=self._meter,
            )
        )
        self._observe(cause)
        self._on_end(self)

    def _closing(self, cause: EndCause, owed: int) -> Closing:
        """Makes what is written down of the end, with its receipt."""
        closing = Closing(
            output_tokens=self.output_tokens,
            cause=cause,
            end_time=self._books.clock.now(),
            cached_input_tokens=self.cached_input_tokens,
            reasoning_tokens=self.reasoning_tokens,
            engine_time_ns=self._meter.engine_time_ns,
        )
        receipt = signed_receipt(self._books.signer, self.opening, closing, owed)
        return replace(closing, receipt=receipt)

    def _resume(self, reader: Reader) -> None:
        """A reader can take the next frame, or waits for output. On the token path."""
        if self._is_complete and reader.cursor == self.sequence:
            reader.complete()
        elif (
            self.cause is None
            and reader.cursor == self.sequence
            and not reader.is_collecting
            and not self._sink.has_output
        ):
            self._sink.on_output = self.ready
        else:
            self.ready()

    def _observe(self, cause: EndCause) -> None:
        metrics.GENERATIONS_ENDED.labels(cause.name).inc()
        metrics.TOKENS_RELEASED.inc(self.output_tokens)
        if self.first_s is not None:
            metrics.TIME_TO_FIRST_TOKEN.observe(self.first_s - self.times.arrived_s)

    def _next_frame(self, reader: Reader, batch: Batch) -> Frame | None:
        """Returns what a reader gets next; None when it has to wait, or has all."""
        if reader.cursor < self.sequence:
            # What another reader was first to get waits for the interval of this one too.
            is_open = self.cause is None and not self._has_all and reader.cursor > 0
            return None if is_open and reader.is_collecting else self._replay(reader)
        if self.cause is not None or self._has_all or not self._sink.has_output:
            return None
        pace = self._pace
        if pace.is_pausing:
            return None
        if reader.is_collecting and not (self._sink.is_over or pace.is_behind):
            return None
        tokens_max = pace.portion(tokens=self.output_tokens, waiting=self._sink.waiting)
        return self._release(batch, tokens_max) if tokens_max else None

    def _go(self) -> None:
        """A pause is over."""
        if self.cause is None:
            self.ready()

    @abstractmethod
    def _release(self, batch: Batch, tokens_max: int) -> Frame | None:
        """Takes from the sink, counts, and makes the next frame. On the token path.

        Args:
            batch: of this turn.
            tokens_max: of output; more only where a part of it cannot be split.
        """

    @abstractmethod
    def _released(self, number: int) -> Frame | None:
        """Makes a frame of what was released, from an entry of the log on; None if it is gone."""

    @abstractmethod
    def _suspend(self) -> Sequence[int] | None:
        """Lets go of the sink of a lost worker.

        Returns:
            Tokens behind which another worker can go on; None when that is not possible.
        """

    @abstractmethod
    def _new_sink(self) -> AnySink:
        """Makes a sink for an execution that takes the place of a lost one."""

    @abstractmethod
    def _go_on_with(self, sink: AnySink) -> None:
        """Takes the sink of such an execution, behind what is left of the one before."""

    def _begin(self, batch: Batch) -> None:
        """The first output is about to be released: from here on the cached count stands."""
        self.first_s = self._books.clock.monotonic_s()
        self.cached_input_tokens = self._cached()
        if self.cached_input_tokens:
            batch.cached.append((self._ordinal, self.cached_input_tokens))

    def _cached(self) -> int:
        return min(self._sink.cached_tokens, self.opening.input_tokens)

    def _has_unread(self) -> bool:
        return (
            self.terms.lives_on
            and self._sink.has_output
            and not any(reader.takes for reader in self.readers)
        )

    def _release_unread(self, batch: Batch) -> None:
        """Counts what nobody takes now and keeps it for whoever comes."""
        while self._sink.has_output and not self._has_all and self.cause is None:
            self._release(batch, UNBOUNDED)
        if self._sink.failure is not None:
            # It ends behind what has just been released, once that is journaled.
            self.ready()

    def _overrun(self) -> None:
        worker = self._placed.link.worker
        log.error("worker exceeds max_output_tokens", worker=worker)
        self.end(engine_failure(worker), EndCause.ENGINE_FAILURE)

    def _replay(self, reader: Reader) -> Frame | None:
        """Makes the frame behind a reader's last one, of what was released before."""
        cursor = reader.cursor
        if cursor < 1:
            return frames.started(self, is_replay=reader.is_replay)
        if self._is_complete and cursor == self.sequence - 1:
            return frames.finished(self)
        # Entry n of the log is frame n + 2: frame 1 is `started`.
        frame = self._released(cursor - 1)
        if frame is None:
            reader.fail(self.failure if self.failure is not None else self._not_kept())
        return frame

    def _not_kept(self) -> OutOfRange:
        return OutOfRange(
            "the frames are not kept any more",
            metadata={"generationId": self.opening.generation_id},
        )

    def _dismiss(self) -> None:
        """Lets go of readers that have everything."""
        for reader in self.readers:
            if reader.takes and (reader.cursor < self.sequence or not reader.is_idle):
                continue
            if self.failure is not None:
                reader.fail(self.failure)
            else:
                reader.complete()

    def _lose(self, error: MaasError) -> None:
        """The execution has failed: goes on with another worker if that can help."""
        token_ids = None
        if is_movable(error.reason) and self._moves < MOVES_MAX:
            self._sink.on_event = None
            token_ids = self._suspend()
        if token_ids is None:
            self.end(error, cause_of(error.reason))
            return
        self._moves += 1
        # A worker that drains may still make other outputs of the same execution.
        self._placed.abort()
        self._stop_moving = self._books.background.start(
            self._move(token_ids, error), name=f"move {self.opening.generation_id}"
        )

    async def _move(self, token_ids: Sequence[int], error: MaasError) -> None:
        """Goes on with another worker. A defect ends this generation and not the process."""
        try:
            await self._go_on(token_ids, error)
        except Exception:
            log.exception("move failed", generation_id=self.opening.generation_id)
            self._stop_moving = None
            self.end(Internal("internal error"), EndCause.GATEWAY_LOST)

    async def _go_on(self, token_ids: Sequence[int], error: MaasError) -> None:
        """Goes on with another worker, behind all tokens that came from the lost one."""
        assert self._attempts is not None
        books = self._books
        generation_id = self.opening.generation_id
        lost = self._placed.link.worker
        give_up_s = books.clock.monotonic_s() + books.move_wait_s
        try:
            # A worker that neither accepts nor refuses must not hold it for longer.
            async with asyncio.timeout(books.move_wait_s):
                placed = await self._attempts.again(
                    token_ids, lost, give_up_s, new_sink=self._new_sink
                )
        except (MaasError, TimeoutError) as refusal:
            log.warning("generation lost", generation_id=generation_id, cause=str(refusal))
            self._stop_moving = None
            self.end(error, cause_of(error.reason))
            return
        self._stop_moving = None
        if placed.input_tokens != self.opening.input_tokens:
            # Another tokenizer or template: what it would go on with is another text.
            log.error("worker reads the prompt differently", worker=placed.link.worker)
            placed.abort()
            self.end(error, cause_of(error.reason))
            return
        log.info(
            "generation moved",
            generation_id=generation_id,
            from_worker=lost,
            to_worker=placed.link.worker,
            output_tokens=len(token_ids),
        )
        metrics.GENERATIONS_MOVED.inc()
        self._placed = placed
        self._go_on_with(placed.sink)
        self._sink.on_event = self.ready
        self.ready()


def engine_failure(worker: str) -> Internal:
    """Makes the error for a worker that breaks its promises."""
    return Internal("the engine failed", reason=Reason.ENGINE_FAILURE, metadata={"worker": worker})
