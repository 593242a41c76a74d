"""Admission: from a request to a generation that a worker has accepted.

In order: what can be checked (checks.py), hold, place; meanwhile billing is asked whether the
idempotency key was charged before. Nothing is journaled, charged or sent to the client before a
worker has accepted; until then every failure leaves no trace.
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
    InvalidArgument,
    Reason,
    Unauthenticated,
)
from libs.units import CURRENCY
from services.gateway import convert, forms, spec_rules, whole
from services.gateway.attempts import Attempts
from services.gateway.books import Books
from services.gateway.checks import Checked, Checks
from services.gateway.domain import Charged, Opening
from services.gateway.limits import Limits
from services.gateway.placement import Placed, Placer
from services.gateway.quotas import Need, Quotas, Ticket
from services.gateway.replay import Budget
from services.gateway.running import Generation, engine_failure
from services.gateway.salt import Salts
from services.gateway.slices import Hold, Purse
from services.gateway.terms import Terms, Times

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

    @property
    def api_key(self) -> str:
        """Resource name of the key that it came with."""
        return f"apiKeys/{self.principal.key_id}"


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
    checked: Checked
    hold: Hold
    quota: Ticket | None


class Admission:
    """Admits requests."""

    def __init__(
        self,
        *,
        instance: str,
        rules: Rules,
        books: Books,
        budget: Budget,
        checks: Checks,
        limits: Limits,
        quotas: Quotas,
        placer: Placer,
        salts: Salts,
        find_charged: FindCharged,
        is_revoked: Callable[[str], bool],
        random_bits: Callable[[int], int],
    ) -> None:
        self._instance = instance
        self._rules = rules
        self._books = books
        self._clock = books.clock
        self._budget = budget
        self._checks = checks
        self._limits = limits
        self._quotas = quotas
        self._placer = placer
        self._salts = salts
        self._find_charged = find_charged
        self._is_revoked = is_revoked
        self._random_bits = random_bits

    async def admit(self, asked: Asked, on_end: Callable[[Generation], None]) -> Generation:
        """Admits a request.

        Raises:
            MaasError: it is refused, or no worker takes it.
        """
        admitted = await self._hold(asked)
        try:
            async with _lookup(self._find, asked) as charged:
                return await self._start(asked, admitted, charged, on_end)
        except BaseException:
            self._books.slices.release(admitted.hold)
            if admitted.quota is not None:
                admitted.quota.cancel()
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
        spec, checked = asked.spec, admitted.checked
        sampling = spec.sampling
        seed = sampling.seed if sampling.HasField("seed") else self._random_bits(SEED_BITS)
        form = forms.form_of(spec, checked)
        attempts = self._attempts(asked, checked, form, generation_id, seed)
        placed = await attempts.first()
        try:
            if charged is not None:
                _refuse_repeat(asked, await charged)
            self.require_key(asked)
            _check_whole(asked, checked, placed.input_tokens)
            if admitted.quota is not None:
                admitted.quota.accepted(placed.input_tokens)
            most = self._fit(asked, admitted, placed)
            is_kept = asked.lives_on or bool(asked.request_id)
            return form.generation(
                books=self._books,
                opening=Opening(
                    generation_id=generation_id,
                    slice_id=admitted.hold.slice.slice_id,
                    account=asked.account,
                    project=asked.project,
                    api_key=asked.api_key,
                    offering=checked.offering.name,
                    model_version=checked.offering.model_version,
                    price=checked.price.name,
                    input_tokens=placed.input_tokens,
                    start_time=start_time,
                    request_id=asked.request_id,
                    request_sha256=asked.request_sha256,
                    labels=dict(spec.labels),
                    end_user=spec.end_user,
                    background=checked.is_background,
                ),
                terms=Terms(
                    price=checked.price,
                    max_output_tokens=most,
                    seed=seed,
                    with_ids=spec.output.return_token_ids,
                    lives_on=asked.lives_on,
                    is_kept=is_kept,
                    is_unary=asked.is_unary,
                    is_exact=form.is_exact,
                    quota=admitted.quota,
                ),
                hold=admitted.hold,
                attempts=attempts,
                placed=placed,
                times=Times(arrived_s=asked.arrived_s, accepted_s=self._clock.monotonic_s()),
                budget=self._budget,
                replay_bytes_max=self._rules.replay_bytes_max,
                on_end=on_end,
            )
        except BaseException:
            placed.abort()
            raise

    def _attempts(
        self, asked: Asked, checked: Checked, form: forms.Form, generation_id: str, seed: int
    ) -> Attempts:
        spec = asked.spec
        tenant = (asked.principal.organization, asked.principal.project)
        limit_s = spec_rules.max_duration_s(spec)
        return Attempts(
            placer=self._placer,
            clock=self._clock,
            execution=convert.execution_to_pb(
                spec,
                checked.offering,
                checked.price,
                seed=seed,
                max_output_tokens=checked.max_output_tokens,
                interval_s=UNARY_INTERVAL_S if asked.is_unary else asked.interval_s,
                adapter=checked.adapter,
                cache_salt=self._salts.cache_salt(*tenant, spec.cache.salt),
            ),
            generation_id=generation_id,
            project=asked.project,
            queue_wait_s=self._rules.queue_wait_s,
            deadline_s=asked.deadline_s,
            time_limit_s=None if limit_s is None else asked.arrived_s + limit_s,
            affinity=self._salts.affinity(
                *tenant, key=spec.cache.affinity_key, adapter=spec.adapter
            ),
            new_sink=form.new_sink,
        )

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
        checked = self._checks.check(asked.spec, asked.project)
        _check_whole(asked, checked)
        limits = self._limits.of(asked.account)
        if limits is None:
            # Nearly always.
            hold = await self._books.slices.reserve(Purse(asked.account), checked.most)
            return _Admitted(checked=checked, hold=hold, quota=None)
        scopes = (asked.account, asked.project, asked.api_key)
        rates = limits.rates(*scopes)
        quota = await self._quotas.take(rates, _need(asked, checked)) if rates else None
        try:
            hold = await self._books.slices.reserve(limits.purse(*scopes), checked.most)
        except BaseException:
            if quota is not None:
                quota.cancel()
            raise
        return _Admitted(checked=checked, hold=hold, quota=quota)

    def _fit(self, asked: Asked, admitted: _Admitted, placed: Placed) -> int:
        """Adjusts the hold to the exact prompt: the surplus goes back at once.

        Returns:
            The most output tokens that there can be, of all outputs together.

        Raises:
            Internal: the worker has accepted a prompt that leaves no room below max_charge.
            FailedPrecondition: the prompt is larger than its bound and the rest is not there. Only
                a template that adds more than its model version says can do that.
        """
        checked = admitted.checked
        price, most = checked.price, checked.count * checked.max_output_tokens
        if asked.spec.HasField("max_charge"):
            # The worker ends the output there; this is what it is held to.
            most = price.affordable(
                nanos=asked.spec.max_charge.nanos,
                input_tokens=placed.input_tokens,
                at_most=most,
                is_background=checked.is_background,
            )
            if most < 1:
                raise engine_failure(placed.link.worker)
        exact = price.rates.most(
            input_tokens=placed.input_tokens,
            output_tokens=most,
            is_background=checked.is_background,
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
        return most


def _need(asked: Asked, checked: Checked) -> Need:
    return Need(
        input_tokens=checked.input_bound,
        output_tokens=checked.count * checked.max_output_tokens,
        is_exact=checked.is_input_exact,
        input_field=f"spec.{asked.spec.WhichOneof('input')}",
    )


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


def _check_whole(asked: Asked, checked: Checked, input_tokens: int = 0) -> None:
    """Sees that a whole result can be one answer, as far as that is known."""
    if asked.is_unary:
        whole.check(
            asked.spec,
            count=checked.count,
            max_output_tokens=checked.max_output_tokens,
            input_tokens=input_tokens,
        )


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
