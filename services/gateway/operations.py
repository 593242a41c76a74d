"""All generations of this gateway: who starts and reads them, what ends them, who may return.

open -> running (readers come and go) -> ended -> kept for the replay window -> forgotten
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import structlog

from libs import ids
from libs.auth import Principal
from libs.errors import (
    Aborted,
    Cancelled,
    FailedPrecondition,
    MaasError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    Unauthenticated,
    unavailable,
)
from libs.rpc import Call
from services.gateway import metrics
from services.gateway.admission import Admission, Asked, revoked
from services.gateway.books import Books
from services.gateway.domain import EndCause
from services.gateway.reader import Reader
from services.gateway.replay import Budget
from services.gateway.requests import READERS_MAX, Requests, crowded
from services.gateway.running import Generation

log = structlog.get_logger(__name__)

# Ended generations that are remembered, kept or not: at 1000 a second, those of a minute.
ENDED_MAX = 65_536
WATCH_MAX_S = 1.0

Whole = TypeVar("Whole")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of a gateway.

    Attributes:
        generations_max: at the same time.
        stall_limit_s: longest wait for a client that does not read.
        replay_window_s: how long an ended generation can be replayed.
    """

    generations_max: int
    stall_limit_s: float
    replay_window_s: float


@dataclass(frozen=True, slots=True)
class _Ended:
    """What is remembered of a generation that is over.

    Attributes:
        project: "projects/{project}".
        until_s: monotonic; then it is forgotten.
        was_kept: it had a log, which may have had to go before its time.
    """

    project: str
    until_s: float
    was_kept: bool


class Generations:
    """Owns every generation from its admission on. Belongs to one event loop."""

    def __init__(
        self,
        *,
        instance: str,
        bounds: Bounds,
        books: Books,
        budget: Budget,
        admission: Admission,
    ) -> None:
        self._instance = instance
        self._bounds = bounds
        self._clock = books.clock
        self._budget = budget
        self._admission = admission
        self._requests = Requests(books.background)
        self._running: dict[str, Generation] = {}
        # In the order of their ends; those with a log once more by themselves.
        self._ended: dict[str, _Ended] = {}
        self._kept: dict[str, Generation] = {}
        self._reading: dict[Reader, Generation] = {}
        self._admitting = 0
        self._is_draining = False
        self._is_stopped = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def open(self, asked: Asked, call: Call) -> tuple[Generation, bool]:
        """Admits a request, or finds the generation that its idempotency key has started.

        Attach a reader before the next suspension.

        Returns:
            The generation, and whether another call has started it.

        Raises:
            MaasError: the request is refused.
        """
        if not asked.request_id and not asked.lives_on:
            return await self._admit(asked), False

        def leave(generation: Generation) -> None:
            self._leave_alone(generation, call)

        try:
            generation, is_repeat = await self._requests.join(asked, self._admit, leave)
        except Unauthenticated as error:
            # Another call's key, unless it was this one's too.
            self._admission.require_key(asked)
            raise Aborted("the key that had started the generation was revoked") from error
        if is_repeat:
            metrics.REPLAYS.inc()
        try:
            # Admission may have looked at another key, and that was a moment ago.
            self._admission.require_key(asked)
        except MaasError:
            leave(generation)
            raise
        return generation, is_repeat

    async def read(self, generation: Generation, reader: Reader, call: Call) -> None:
        """Serves a reader until it has everything.

        Raises:
            ResourceExhausted: too many calls read it.
            MaasError: the generation failed, or this reader has.
        """
        if len(generation.readers) >= READERS_MAX:
            raise crowded()
        generation.attach(reader)
        self._reading[reader] = generation
        try:
            await reader.done
        except MaasError:
            await reader.can_end()
            raise
        finally:
            del self._reading[reader]
            generation.detach(reader)
            self._leave_alone(generation, call)

    async def read_whole(
        self,
        generation: Generation,
        reader: Reader,
        call: Call,
        make: Callable[[Generation], Whole],
    ) -> Whole:
        """Waits for the end; returns the whole result.

        Args:
            generation: to be read.
            reader: a unary call's.
            call: that reads it.
            make: makes the result; raises ValueError when some of the output is not there any more.

        Raises:
            OutOfRange: it has outgrown what is kept of one.
            MaasError: the generation failed, or this reader has.
        """
        try:
            await self.read(generation, reader, call)
            return make(generation)
        except ValueError as error:
            raise _outgrown(generation) from error
        finally:
            if not generation.terms.is_kept and generation.log is not None:
                # Nobody can come back for it.
                generation.log.clear()

    def find(self, generation_id: str, principal: Principal) -> Generation:
        """Returns a generation that can be replayed.

        Raises:
            NotFound: there never was one here.
            PermissionDenied: it is another project's.
            FailedPrecondition: it keeps no frames.
            OutOfRange: its replay window is over.
        """
        generation = self._running.get(generation_id)
        if generation is None:
            ended = self._ended.get(generation_id)
            if ended is None:
                raise self._unknown(generation_id)
            _require_project(ended.project, principal)
            generation = self._kept.get(generation_id)
            if generation is None and ended.was_kept:
                raise _expired(generation_id)
        else:
            _require_project(generation.opening.project, principal)
        if generation is None or not generation.terms.is_kept:
            raise FailedPrecondition(
                "the generation keeps no frames",
                reason=Reason.NOT_RESUMABLE,
                metadata={"generationId": generation_id},
            )
        metrics.REPLAYS.inc()
        return generation

    def cancel(self, generation_id: str, principal: Principal) -> None:
        """Stops a generation of the caller's project. One that has just ended stays as it is.

        Raises:
            NotFound: it is not known here.
            PermissionDenied: it is another project's.
        """
        generation = self._running.get(generation_id)
        if generation is None:
            ended = self._ended.get(generation_id)
            if ended is None:
                raise _not_found(generation_id)
            _require_project(ended.project, principal)
            return
        _require_project(generation.opening.project, principal)
        generation.end(
            Aborted("the generation was cancelled", metadata={"generationId": generation_id}),
            EndCause.CLIENT_CANCELLED,
        )

    def revoke(self, key_id: str) -> None:
        """Ends all calls that read with a key, and all that it has started."""
        # First the calls: to other keys, which are good, the generation was cancelled.
        for reader in self._reading:
            if reader.key_id == key_id:
                reader.fail(revoked())
        api_key = f"apiKeys/{key_id}"
        for generation_id, generation in list(self._running.items()):
            if generation.opening.api_key == api_key:
                generation.end(
                    Aborted(
                        "the key that has started the generation was revoked",
                        metadata={"generationId": generation_id},
                    ),
                    EndCause.REVOKED,
                )

    async def watch(self) -> None:
        """Cuts off who does not read, looks after what nobody reads, forgets what is over."""
        loop = asyncio.get_running_loop()
        interval_s = min(
            self._bounds.stall_limit_s / 8, self._bounds.replay_window_s / 4, WATCH_MAX_S
        )
        while True:
            await self._clock.sleep_s(interval_s)
            # Readers note the time of the loop, which costs them less than that of a clock.
            self._cut_stalled(loop.time() - self._bounds.stall_limit_s)
            self._forget(self._clock.monotonic_s())
            for generation in list(self._running.values()):
                generation.look_after()
            metrics.REPLAY_BYTES.set(self._budget.used)

    async def drain(self) -> None:
        """Refuses new generations and waits for the running ones; cancelled, it stops them."""
        self._is_draining = True
        try:
            await self._idle.wait()
        except asyncio.CancelledError:
            # The grace is over. At once, as next the server ends all calls, as if clients had.
            self.stop()
            raise

    def stop(self) -> None:
        """Ends what the drain has left. Free of charge: the gateway's end is not the client's."""
        self._is_stopped = True
        for generation in list(self._running.values()):
            generation.end(unavailable("gateway", retry_after_s=1.0), EndCause.GATEWAY_LOST)

    async def _admit(self, asked: Asked) -> Generation:
        self._enter()
        try:
            generation = await self._admission.admit(asked, self._end)
        except BaseException:
            self._leave()
            raise
        self._running[generation.opening.generation_id] = generation
        return generation

    def _enter(self) -> None:
        if self._is_draining:
            raise unavailable("gateway", retry_after_s=1.0)
        if self._admitting >= self._bounds.generations_max:
            raise ResourceExhausted("too many generations are running", retry_after_s=1.0)
        self._make_room()
        if self._budget.is_exceeded:
            raise ResourceExhausted("too much output is kept for replays", retry_after_s=1.0)
        self._admitting += 1
        self._idle.clear()
        metrics.GENERATIONS_RUNNING.set(self._admitting)

    def _leave(self) -> None:
        self._admitting -= 1
        if not self._admitting:
            self._idle.set()
        metrics.GENERATIONS_RUNNING.set(self._admitting)

    def _leave_alone(self, generation: Generation, call: Call) -> None:
        """A reader has gone: was it the last one, and does that end the generation?"""
        if generation.readers or generation.terms.lives_on or generation.cause is not None:
            return
        generation.end(Cancelled("the caller went away"), self._cause_of_leaving(call))

    def _cause_of_leaving(self, call: Call) -> EndCause:
        if self._is_stopped:
            # Admitted too late for `stop`; the server ends its calls: not the client's doing.
            return EndCause.GATEWAY_LOST
        if call.is_overdue(self._clock.monotonic_s()):
            return EndCause.DEADLINE
        return EndCause.CLIENT_CANCELLED

    def _end(self, generation: Generation) -> None:
        """A generation is over."""
        opening = generation.opening
        self._running.pop(opening.generation_id, None)
        assert generation.cause is not None
        if not generation.cause.is_charged:
            self._requests.forget(generation)
        is_kept = generation.terms.is_kept
        if is_kept:
            self._kept[opening.generation_id] = generation
        self._ended[opening.generation_id] = _Ended(
            opening.project, self._clock.monotonic_s() + self._bounds.replay_window_s, is_kept
        )
        if len(self._ended) > ENDED_MAX:
            self._forget_one(next(iter(self._ended)))
        self._make_room()
        self._leave()

    def _forget(self, now_s: float) -> None:
        while self._ended:
            generation_id, ended = next(iter(self._ended.items()))
            if ended.until_s > now_s:
                return
            self._forget_one(generation_id)

    def _forget_one(self, generation_id: str) -> None:
        del self._ended[generation_id]
        self._drop_log(generation_id)

    def _make_room(self) -> None:
        """Drops what is kept, oldest first, while it is too much; not what is being read."""
        while self._budget.is_exceeded:
            idle = (key for key, generation in self._kept.items() if not generation.readers)
            generation_id = next(idle, None)
            if generation_id is None:
                return
            self._drop_log(generation_id)

    def _drop_log(self, generation_id: str) -> None:
        generation = self._kept.pop(generation_id, None)
        if generation is not None:
            self._requests.forget(generation)
            if generation.log is not None:
                generation.log.clear()

    def _cut_stalled(self, before_s: float) -> None:
        for reader, generation in list(self._reading.items()):
            since_s = reader.writing_since_s
            if since_s is None or since_s >= before_s:
                continue
            error = _stalled(generation, self._bounds.stall_limit_s)
            reader.fail(error)
            if generation.terms.lives_on or not all(
                other.done.done() for other in generation.readers
            ):
                continue
            generation.end(error, EndCause.STALLED)

    def _unknown(self, generation_id: str) -> MaasError:
        """Tells what is over from what never was: an id names its gateway and its time."""
        prefix, _, ulid = generation_id.rpartition("_")
        if prefix != f"gen_{self._instance}":
            return _not_found(generation_id)
        started = ids.time_of_ulid(ulid)
        now = self._clock.now()
        if started is None or started > now:
            return _not_found(generation_id)
        if (now - started).total_seconds() < self._bounds.replay_window_s:
            return _not_found(generation_id)
        return _expired(generation_id)


def _require_project(project: str, principal: Principal) -> None:
    if project != f"projects/{principal.project}":
        raise PermissionDenied(
            "the generation is another project's", metadata={"permission": "generations.get"}
        )


def _not_found(generation_id: str) -> NotFound:
    return NotFound(
        "the generation is not known here",
        reason=Reason.GENERATION_NOT_FOUND,
        metadata={"generationId": generation_id},
    )


def _expired(generation_id: str) -> OutOfRange:
    return OutOfRange("the replay window is over", metadata={"generationId": generation_id})


def _outgrown(generation: Generation) -> OutOfRange:
    return OutOfRange(
        "the output is larger than what is kept of it",
        metadata={"generationId": generation.opening.generation_id},
    )


def _stalled(generation: Generation, limit_s: float) -> Aborted:
    return Aborted(
        "the client stopped reading",
        reason=Reason.CONSUMER_STALLED,
        metadata={
            "stallSeconds": f"{limit_s:g}",
            "generationId": generation.opening.generation_id,
            "resumable": str(generation.terms.lives_on).lower(),
        },
    )
