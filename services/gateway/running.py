"""One accepted generation: what is counted, what is owed, and its one end.

Whatever ends it - the engine, the client, a deadline, a lost worker - comes through `finish`, and
the first one wins. The count is journaled before the frame that it counts is released.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from libs.clock import Clock
from libs.errors import MaasError
from services.gateway import metrics
from services.gateway.domain import Closing, EndCause, Opening, Price, Usage
from services.gateway.generation import Chunk
from services.gateway.journal import Journal
from services.gateway.placement import Placed
from services.gateway.settlement import Settlement, Settler
from services.gateway.slices import Hold, SliceBook

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """Where money is written down.

    Attributes:
        journal: counts, before they are released.
        slices: what is held.
        settler: what has ended.
        clock: time.
    """

    journal: Journal
    slices: SliceBook
    settler: Settler
    clock: Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Monotonic seconds of one generation.

    Attributes:
        arrived_s: the call.
        accepted_s: the worker's acceptance.
    """

    arrived_s: float
    accepted_s: float


class RunningGeneration:
    """A generation between acceptance and end."""

    def __init__(
        self,
        *,
        books: Books,
        opening: Opening,
        price: Price,
        hold: Hold,
        placed: Placed,
        seed: int,
        times: Times,
    ) -> None:
        self.opening = opening
        self.seed = seed
        self.times = times
        self.output_tokens = 0
        self.first_s: float | None = None
        self.ended_s: float | None = None
        # Since when a write waits for the client; None while none does.
        self.writing_since_s: float | None = None
        self.failure: MaasError | None = None
        self._books = books
        self._price = price
        self._hold = hold
        self._placed = placed
        self._is_finished = False
        # Journaled before the first frame; from here on the client owes the prompt.
        self._ordinal = books.journal.opened(opening)

    @property
    def usage(self) -> Usage:
        """Counts so far."""
        return Usage(input_tokens=self.opening.input_tokens, output_tokens=self.output_tokens)

    @property
    def charge(self) -> int:
        """Nanos at the frozen price for the counts so far."""
        return self._price.charge(
            input_tokens=self.opening.input_tokens, output_tokens=self.output_tokens
        )

    async def take(self) -> Chunk:
        """Waits for output. Raises what ended the execution instead."""
        chunk = await self._placed.sink.take()
        if self.first_s is None:
            self.first_s = self._books.clock.monotonic_s()
        return chunk

    def release(self, chunk: Chunk) -> None:
        """Counts a chunk, in the journal first. Call right before it goes to the transport.

        Raises:
            Unavailable: the journal cannot be written; the chunk must not be sent.
        """
        count = self.output_tokens + len(chunk.token_ids)
        if chunk.token_ids:
            self._books.journal.progress(self._ordinal, count)
        self.output_tokens = count

    def cancel(self, error: MaasError) -> None:
        """Ends the stream with an error from outside, such as CancelGeneration."""
        self.failure = error
        # At once: the handler may wait for a client that does not read.
        self._placed.abort()
        self._placed.sink.fail(error)

    def finish(self, cause: EndCause) -> None:
        """Ends the generation: engine, journal, hold, settlement. Repeating changes nothing."""
        if self._is_finished:
            return
        self._is_finished = True
        self.ended_s = self._books.clock.monotonic_s()
        self._placed.abort()
        closing = Closing(
            output_tokens=self.output_tokens, cause=cause, end_time=self._books.clock.now()
        )
        owed = self.charge if cause.is_charged else 0
        self._books.slices.owe(self._hold, owed)
        try:
            self._books.journal.closed(self._ordinal, closing)
        except MaasError:
            # The end is settled from memory; after a crash the journal's last count stands.
            log.error("journal lost an end", generation_id=self.opening.generation_id)  # noqa: TRY400
        self._books.settler.put(
            Settlement(ordinal=self._ordinal, opening=self.opening, closing=closing, owed=owed)
        )
        metrics.GENERATIONS_ENDED.labels(cause.name).inc()
        metrics.TOKENS_RELEASED.inc(self.output_tokens)
        if self.first_s is not None:
            metrics.TIME_TO_FIRST_TOKEN.observe(self.first_s - self.times.arrived_s)
