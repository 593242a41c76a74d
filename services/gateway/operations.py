"""Admission: from a request to a generation that a worker has accepted, and its end.

In order: offering, price, input, hold, place. Nothing is journaled, charged or sent to the client
before a worker has accepted; until then every failure leaves no trace.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from libs import ids
from libs.auth import Principal
from libs.errors import (
    Aborted,
    FailedPrecondition,
    FieldRule,
    InvalidArgument,
    MaasError,
    NotFound,
    Reason,
    ResourceExhausted,
    Violation,
    invalid_field,
    unavailable,
)
from libs.rpc import Call
from libs.units import CURRENCY
from services.gateway import convert, metrics
from services.gateway.domain import EndCause, Offering, Opening, Price, prompt_bound
from services.gateway.placement import Placed, Placer, Wanted
from services.gateway.running import Books, RunningGeneration, Times
from services.gateway.slices import Hold
from services.gateway.tables import Offerings, Prices

SEED_BITS = 64
ULID_BITS = 80

_CAUSES = {
    Reason.WORKER_LOST: EndCause.WORKER_LOST,
    Reason.WORKER_DRAINING: EndCause.WORKER_LOST,
    Reason.ENGINE_FAILURE: EndCause.ENGINE_FAILURE,
    Reason.INTERNAL: EndCause.ENGINE_FAILURE,
    Reason.DEADLINE_EXCEEDED: EndCause.DEADLINE,
    Reason.GENERATION_CANCELLED: EndCause.CLIENT_CANCELLED,
    Reason.CONSUMER_STALLED: EndCause.STALLED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a gateway.

    Attributes:
        generations_max: at the same time.
        queue_wait_s: longest wait for a place on a worker.
        stall_limit_s: longest wait for a client that does not read.
    """

    generations_max: int
    queue_wait_s: float
    stall_limit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Admitted:
    offering: Offering
    price: Price
    hold: Hold
    max_output_tokens: int


class Generations:
    """All generations of this gateway."""

    def __init__(
        self,
        *,
        instance: str,
        limits: Limits,
        books: Books,
        offerings: Offerings,
        prices: Prices,
        placer: Placer,
        random_bits: Callable[[int], int],
    ) -> None:
        self._instance = instance
        self._limits = limits
        self._books = books
        self._clock = books.clock
        self._offerings = offerings
        self._prices = prices
        self._placer = placer
        self._random_bits = random_bits
        self._running: dict[str, RunningGeneration] = {}
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self._admitting = 0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def run(
        self, spec: generation_pb2.GenerationSpec, call: Call
    ) -> AsyncIterator[RunningGeneration]:
        """Admits a request, and ends its generation however the block is left.

        The block calls `finish(COMPLETED)` itself when all is released.

        Raises:
            MaasError: the request is refused, or the generation failed.
        """
        self._enter()
        try:
            generation = await self._start(spec, call)
            generation_id = generation.opening.generation_id
            self._running[generation_id] = generation
            task = asyncio.current_task()
            assert task is not None
            self._tasks[generation_id] = task
            try:
                yield generation
            except MaasError as error:
                generation.finish(_CAUSES.get(error.reason, EndCause.GATEWAY_LOST))
                raise
            except asyncio.CancelledError:
                if generation.failure is not None:
                    # Not the client but the watchdog ended this call: say why.
                    generation.finish(_CAUSES[generation.failure.reason])
                    raise generation.failure from None
                generation.finish(self._cause_of_cancel(call))
                raise
            finally:
                # What nobody foresaw is our fault, not the client's.
                generation.finish(EndCause.GATEWAY_LOST)
                del self._running[generation_id]
                del self._tasks[generation_id]
        finally:
            self._leave()

    def cancel(self, generation_id: str, principal: Principal) -> None:
        """Stops a generation of the caller's project.

        Raises:
            NotFound: it is not running here, or belongs to another project.
        """
        generation = self._running.get(generation_id)
        if generation is None or generation.opening.project != f"projects/{principal.project}":
            raise NotFound(
                "the generation is not running here",
                reason=Reason.GENERATION_NOT_FOUND,
                metadata={"generationId": generation_id},
            )
        generation.cancel(
            Aborted("the generation was cancelled", metadata={"generationId": generation_id})
        )

    async def watch_stalls(self) -> None:
        """Cuts off clients that do not read, for ever."""
        limit_s = self._limits.stall_limit_s
        while True:
            await self._clock.sleep_s(limit_s / 8)
            before_s = self._clock.monotonic_s() - limit_s
            for generation_id, generation in list(self._running.items()):
                since_s = generation.writing_since_s
                if since_s is not None and since_s < before_s:
                    generation.failure = Aborted(
                        "the client stopped reading",
                        reason=Reason.CONSUMER_STALLED,
                        metadata={"stallSeconds": f"{limit_s:g}"},
                    )
                    self._tasks[generation_id].cancel()

    async def drain(self) -> None:
        """Refuses new generations and waits for the running ones."""
        self._is_draining = True
        await self._idle.wait()

    def _enter(self) -> None:
        if self._is_draining:
            raise unavailable("gateway", retry_after_s=1.0)
        if self._admitting >= self._limits.generations_max:
            raise ResourceExhausted("too many generations are running", retry_after_s=1.0)
        self._admitting += 1
        self._idle.clear()
        metrics.GENERATIONS_RUNNING.set(self._admitting)

    def _leave(self) -> None:
        self._admitting -= 1
        if not self._admitting:
            self._idle.set()
        metrics.GENERATIONS_RUNNING.set(self._admitting)

    def _cause_of_cancel(self, call: Call) -> EndCause:
        if self._is_draining:
            # The grace is over and the server ends its calls: not the client's doing.
            return EndCause.GATEWAY_LOST
        if call.is_overdue(self._clock.monotonic_s()):
            return EndCause.DEADLINE
        return EndCause.CLIENT_CANCELLED

    async def _start(self, spec: generation_pb2.GenerationSpec, call: Call) -> RunningGeneration:
        principal = call.require_principal()
        start_time = self._clock.now()
        generation_id = f"gen_{self._instance}_{ids.ulid(start_time, self._random_bits(ULID_BITS))}"
        admitted = await self._admit(spec, principal)
        hold = admitted.hold
        try:
            seed = spec.sampling.seed if spec.sampling.HasField("seed") else self._random_bits(64)
            execution = convert.execution_to_pb(
                spec,
                admitted.offering,
                seed=seed,
                max_output_tokens=admitted.max_output_tokens,
            )
            placed = await self._place(generation_id, execution, call, principal)
            try:
                self._fit(admitted, placed)
                return RunningGeneration(
                    books=self._books,
                    opening=Opening(
                        generation_id=generation_id,
                        slice_id=hold.slice.slice_id,
                        account=f"accounts/{principal.organization}",
                        project=f"projects/{principal.project}",
                        api_key=f"apiKeys/{principal.key_id}",
                        offering=admitted.offering.name,
                        model_version=admitted.offering.model_version,
                        price=admitted.price.name,
                        input_tokens=placed.input_tokens,
                        start_time=start_time,
                    ),
                    price=admitted.price,
                    hold=hold,
                    placed=placed,
                    seed=seed,
                    times=Times(arrived_s=call.started_s, accepted_s=self._clock.monotonic_s()),
                )
            except BaseException:
                placed.abort()
                raise
        except BaseException:
            self._books.slices.release(hold)
            raise

    async def _admit(self, spec: generation_pb2.GenerationSpec, principal: Principal) -> _Admitted:
        """Checks the request and holds its worst case."""
        if spec.WhichOneof("input") is None:
            raise invalid_field(
                "spec.input", FieldRule.REQUIRED, "chat, text or tokens is required"
            )
        offering = self._offerings.get(spec.model)
        price = self._prices.get(offering.name, self._clock.now())
        max_output_tokens = self._max_output_tokens(spec, offering)
        worst = price.charge(
            input_tokens=prompt_bound(convert.prompt_size(spec), offering),
            output_tokens=max_output_tokens,
        )
        hold = await self._books.slices.reserve(f"accounts/{principal.organization}", worst)
        return _Admitted(
            offering=offering, price=price, hold=hold, max_output_tokens=max_output_tokens
        )

    def _max_output_tokens(self, spec: generation_pb2.GenerationSpec, offering: Offering) -> int:
        if not spec.stop.HasField("max_output_tokens"):
            return min(offering.default_max_output_tokens, offering.context_length)
        wanted = spec.stop.max_output_tokens
        if wanted > offering.context_length:
            raise invalid_field(
                "spec.stop.max_output_tokens",
                FieldRule.OUT_OF_RANGE,
                f"must be at most {offering.context_length}, the context of {offering.name}",
            )
        return wanted

    async def _place(
        self,
        generation_id: str,
        execution: engine_pb2.Execution,
        call: Call,
        principal: Principal,
    ) -> Placed:
        def make(execution_id: str, epoch: int) -> engine_pb2.Execution:
            attempt = engine_pb2.Execution()
            attempt.CopyFrom(execution)
            attempt.execution_id = execution_id
            attempt.epoch = epoch
            if call.deadline_s is not None:
                left_s = max(call.deadline_s - self._clock.monotonic_s(), 0.001)
                attempt.budget.CopyFrom(convert.duration_to_pb(left_s))
            return attempt

        wanted = Wanted(
            execution_id=generation_id,
            model_version=execution.model_version,
            project=f"projects/{principal.project}",
            max_wait_s=self._limits.queue_wait_s,
        )
        try:
            return await self._placer.place(wanted, make)
        except InvalidArgument as error:
            raise _with_field(error, f"spec.{execution.WhichOneof('input')}") from error

    def _fit(self, admitted: _Admitted, placed: Placed) -> None:
        """Adjusts the hold to the exact prompt: the surplus goes back at once.

        Raises:
            FailedPrecondition: the prompt is larger than its bound and the rest is not there. Only
                a template that adds more than its model version says can do that.
        """
        exact = admitted.price.charge(
            input_tokens=placed.input_tokens, output_tokens=admitted.max_output_tokens
        )
        hold = admitted.hold
        if exact <= hold.nanos:
            self._books.slices.shrink(hold, exact)
        elif not self._books.slices.try_grow(hold, exact - hold.nanos):
            raise FailedPrecondition(
                "the credit set aside does not cover the prompt",
                reason=Reason.INSUFFICIENT_CREDIT,
                metadata={
                    "account": hold.slice.account,
                    "requiredNanos": str(exact),
                    "availableNanos": str(hold.nanos + hold.slice.free),
                    "currency": CURRENCY,
                },
            )


def _with_field(error: InvalidArgument, default: str) -> InvalidArgument:
    """Gives a worker's refusal the path of the field: its own, or that of the input."""
    field = error.metadata.get("field", default)
    is_length = error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    rule = FieldRule.TOO_LONG if is_length else FieldRule.BAD_FORMAT
    return InvalidArgument(
        error.message,
        reason=error.reason,
        metadata=error.metadata,
        violations=error.violations or [Violation(field, rule, error.message)],
    )
