"""Admission: from a request to a generation that a worker has accepted.

In order: offering, price, input, hold, place; meanwhile billing is asked whether the idempotency
key was charged before. Nothing is journaled, charged or sent to the client before a worker has
accepted; until then every failure leaves no trace.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from maas.inference.v1 import generation_pb2

from libs import ids
from libs.auth import Principal
from libs.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldRule,
    InvalidArgument,
    Reason,
    Unauthenticated,
    Violation,
    invalid_field,
)
from libs.units import CURRENCY
from services.gateway import convert
from services.gateway.attempts import Attempts
from services.gateway.domain import Charged, Offering, Opening, Price, prompt_bound
from services.gateway.placement import Placed, Placer
from services.gateway.replay import UNBOUNDED, Budget, ReplayLog
from services.gateway.running import Books, Generation, Terms, Times, engine_failure
from services.gateway.slices import Hold
from services.gateway.tables import Offerings, Prices

SEED_BITS = 64
ULID_BITS = 80
# Nobody reads along: output need not come from the worker at once.
UNARY_INTERVAL_S = 0.2

FindCharged = Callable[[str, str], Awaitable[Charged | None]]
"""Asks billing: project, idempotency key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request to generate.

    Attributes:
        spec: what to generate.
        request_id: idempotency key; empty when there is none.
        request_sha256: hexadecimal digest of what is asked for, not of how it is delivered; empty
            without an idempotency key.
        lives_on: it goes on when its caller leaves.
        is_unary: the answer is the whole result.
        interval_s: how long its reader collects output before a frame; 0 for not at all.
        principal: who asks.
        arrived_s: monotonic.
        deadline_s: monotonic end; None for none.
    """

    spec: generation_pb2.GenerationSpec
    request_id: str
    request_sha256: str
    lives_on: bool
    is_unary: bool
    interval_s: float = 0.0
    principal: Principal
    arrived_s: float
    deadline_s: float | None

    @property
    def project(self) -> str:
        """Resource name of who asks."""
        return f"projects/{self.principal.project}"

    @property
    def account(self) -> str:
        """Resource name of who pays."""
        return f"accounts/{self.principal.organization}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Bounds of admission.

    Attributes:
        queue_wait_s: longest wait for a place on a worker.
        replay_bytes_max: output kept of one stream.
    """

    queue_wait_s: float
    replay_bytes_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Admitted:
    offering: Offering
    price: Price
    hold: Hold
    max_output_tokens: int


class Admission:
    """Admits requests."""

    def __init__(
        self,
        *,
        instance: str,
        rules: Rules,
        books: Books,
        budget: Budget,
        offerings: Offerings,
        prices: Prices,
        placer: Placer,
        find_charged: FindCharged,
        is_revoked: Callable[[str], bool],
        random_bits: Callable[[int], int],
    ) -> None:
        self._instance = instance
        self._rules = rules
        self._books = books
        self._clock = books.clock
        self._budget = budget
        self._offerings = offerings
        self._prices = prices
        self._placer = placer
        self._find_charged = find_charged
        self._is_revoked = is_revoked
        self._random_bits = random_bits

    async def admit(self, asked: Asked, on_end: Callable[[Generation], None]) -> Generation:
        """Admits a request.

        Raises:
            MaasError: it is refused, or no worker takes it.
        """
        hold_of = await self._hold(asked)
        try:
            async with _lookup(self._find, asked) as charged:
                return await self._start(asked, hold_of, charged, on_end)
        except BaseException:
            self._books.slices.release(hold_of.hold)
            raise

    async def _start(
        self,
        asked: Asked,
        admitted: _Admitted,
        charged: asyncio.Task[Charged | None] | None,
        on_end: Callable[[Generation], None],
    ) -> Generation:
        start_time = self._clock.now()
        generation_id = f"gen_{self._instance}_{ids.ulid(start_time, self._random_bits(ULID_BITS))}"
        sampling = asked.spec.sampling
        seed = sampling.seed if sampling.HasField("seed") else self._random_bits(SEED_BITS)
        attempts = Attempts(
            placer=self._placer,
            clock=self._clock,
            execution=convert.execution_to_pb(
                asked.spec,
                admitted.offering,
                admitted.price,
                seed=seed,
                max_output_tokens=admitted.max_output_tokens,
                interval_s=UNARY_INTERVAL_S if asked.is_unary else asked.interval_s,
            ),
            generation_id=generation_id,
            project=asked.project,
            queue_wait_s=self._rules.queue_wait_s,
            deadline_s=asked.deadline_s,
        )
        placed = await attempts.first()
        try:
            if charged is not None:
                _refuse_repeat(asked, await charged)
            self.require_key(asked)
            most = self._fit(asked, admitted, placed)
            is_kept = asked.lives_on or bool(asked.request_id)
            has_log = is_kept or asked.is_unary
            return Generation(
                books=self._books,
                opening=Opening(
                    generation_id=generation_id,
                    slice_id=admitted.hold.slice.slice_id,
                    account=asked.account,
                    project=asked.project,
                    api_key=f"apiKeys/{asked.principal.key_id}",
                    offering=admitted.offering.name,
                    model_version=admitted.offering.model_version,
                    price=admitted.price.name,
                    input_tokens=placed.input_tokens,
                    start_time=start_time,
                    request_id=asked.request_id,
                    request_sha256=asked.request_sha256,
                ),
                terms=Terms(
                    price=admitted.price,
                    max_output_tokens=most,
                    seed=seed,
                    with_ids=asked.spec.output.return_token_ids,
                    lives_on=asked.lives_on,
                    is_kept=is_kept,
                ),
                hold=admitted.hold,
                attempts=attempts,
                placed=placed,
                times=Times(arrived_s=asked.arrived_s, accepted_s=self._clock.monotonic_s()),
                log=self._new_log(asked) if has_log else None,
                on_end=on_end,
            )
        except BaseException:
            placed.abort()
            raise

    def _new_log(self, asked: Asked) -> ReplayLog:
        # A whole result is charged, so it has to be there: max_output_tokens bound it.
        bytes_max = UNBOUNDED if asked.is_unary else self._rules.replay_bytes_max
        return ReplayLog(self._budget, bytes_max)

    async def _find(self, project: str, request_id: str) -> Charged | None:
        # Asked in this order nothing falls in between: what has left the queue is durable.
        queued = self._books.settler.find_charged(project, request_id)
        return queued if queued is not None else await self._find_charged(project, request_id)

    def require_key(self, asked: Asked) -> None:
        """Sees that a key that was accepted when its call came is still good.

        Raises:
            Unauthenticated: it was revoked.
        """
        if self._is_revoked(asked.principal.key_id):
            raise revoked()

    async def _hold(self, asked: Asked) -> _Admitted:
        """Checks the request and holds the most that it can cost."""
        spec = asked.spec
        if spec.WhichOneof("input") is None:
            raise invalid_field(
                "spec.input", FieldRule.REQUIRED, "chat, text or tokens is required"
            )
        offering = self._offerings.get(spec.model)
        price = self._prices.get(offering.name, self._clock.now())
        max_output_tokens = _max_output_tokens(spec, offering)
        most: int = price.charge(
            input_tokens=prompt_bound(convert.prompt_size(spec), offering),
            output_tokens=max_output_tokens,
        )
        if spec.HasField("max_charge"):
            _check_max_charge(spec)
            most = min(most, spec.max_charge.nanos)
        hold = await self._books.slices.reserve(asked.account, most)
        return _Admitted(
            offering=offering, price=price, hold=hold, max_output_tokens=max_output_tokens
        )

    def _fit(self, asked: Asked, admitted: _Admitted, placed: Placed) -> int:
        """Adjusts the hold to the exact prompt: the surplus goes back at once.

        Returns:
            The most output tokens that there can be.

        Raises:
            Internal: the worker has accepted a prompt that leaves no room below max_charge.
            FailedPrecondition: the prompt is larger than its bound and the rest is not there. Only
                a template that adds more than its model version says can do that.
        """
        most = admitted.max_output_tokens
        if asked.spec.HasField("max_charge"):
            # The worker ends the output there; this is what it is held to.
            most = admitted.price.affordable(
                nanos=asked.spec.max_charge.nanos, input_tokens=placed.input_tokens, at_most=most
            )
            if most < 1:
                raise engine_failure(placed.link.worker)
        exact = admitted.price.charge(input_tokens=placed.input_tokens, output_tokens=most)
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
        return most


class _lookup:  # noqa: N801 - a context manager, used as a function
    """Asks billing about an idempotency key while the block runs; does not outlive it."""

    def __init__(self, find: FindCharged, asked: Asked) -> None:
        self._find = find
        self._asked = asked
        self._task: asyncio.Task[Charged | None] | None = None

    async def __aenter__(self) -> asyncio.Task[Charged | None] | None:
        asked = self._asked
        if asked.request_id:
            self._task = asyncio.create_task(self._ask(), name="find charged")
        return self._task

    async def __aexit__(self, *_: object) -> None:
        if self._task is None:
            return
        if not self._task.done():
            self._task.cancel()
        elif not self._task.cancelled():
            # The block may have ended before it asked; an answer that nobody needs is no defect.
            self._task.exception()

    async def _ask(self) -> Charged | None:
        return await self._find(self._asked.project, self._asked.request_id)


def revoked() -> Unauthenticated:
    """Makes the error for a key that was revoked while it was in use."""
    return Unauthenticated("the API key was revoked", reason=Reason.CREDENTIALS_REVOKED)


def reused(request_id: str) -> InvalidArgument:
    """Makes the error for an idempotency key that comes with another request."""
    return InvalidArgument(
        "the request_id came with another spec before",
        reason=Reason.REQUEST_ID_REUSED,
        metadata={"requestId": request_id},
    )


def _refuse_repeat(asked: Asked, charged: Charged | None) -> None:
    if charged is None:
        return
    if charged.request_sha256 != asked.request_sha256:
        raise reused(asked.request_id)
    raise AlreadyExists(
        "the request was served before, and its output is not kept any more",
        reason=Reason.GENERATION_SETTLED,
        metadata={
            "requestId": asked.request_id,
            "generationId": charged.generation_id,
            "inputTokens": str(charged.usage.input_tokens),
            "outputTokens": str(charged.usage.output_tokens),
            "chargeNanos": str(charged.nanos),
            "currency": CURRENCY,
        },
    )


def _max_output_tokens(spec: generation_pb2.GenerationSpec, offering: Offering) -> int:
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


def _check_max_charge(spec: generation_pb2.GenerationSpec) -> None:
    limit = spec.max_charge
    if limit.currency_code != CURRENCY:
        raise InvalidArgument(
            f"spec.max_charge: prices are in {CURRENCY}",
            reason=Reason.CURRENCY_MISMATCH,
            metadata={"left": limit.currency_code, "right": CURRENCY},
            violations=[
                Violation(
                    "spec.max_charge.currency_code", FieldRule.OUT_OF_RANGE, f"must be {CURRENCY}"
                )
            ],
        )
    if limit.nanos <= 0:
        raise invalid_field("spec.max_charge.nanos", FieldRule.OUT_OF_RANGE, "must be above 0")
