"""Embeddings: one call from admission to settlement.

    check -> hold the worst case -> a worker's answer -> journal, owe, settle -> our answer

What is charged is the exact input, once, and only with the answer at hand: a call that fails, or
whose caller has gone before, leaves no trace. From the worker's answer on nothing suspends, so
there is no moment between the charge and the answer in which a caller could go.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import structlog
from maas.common.v1 import usage_pb2
from maas.engine.v1 import engine_service_pb2
from maas.inference.v1 import embedding_service_pb2

from libs import capabilities, ids
from libs.errors import (
    FailedPrecondition,
    FieldRule,
    MaasError,
    Reason,
    invalid_field,
    unsupported,
)
from libs.rpc import Call
from libs.units import CURRENCY
from services.gateway import convert, vectors
from services.gateway.admission import revoked
from services.gateway.books import Books
from services.gateway.desks import engine_failed
from services.gateway.domain import (
    Closing,
    EndCause,
    Offering,
    Opening,
    Price,
    PromptSize,
    Usage,
    prompt_bound,
)
from services.gateway.embed_placement import ANSWER_WAIT_S, EmbedPlacer, Made
from services.gateway.limits import Limits
from services.gateway.meter import Meter
from services.gateway.quotas import Need, Quotas, Ticket
from services.gateway.receipts import signed_receipt
from services.gateway.settlement import Settlement
from services.gateway.slices import Hold
from services.gateway.tables import Offerings, Prices, Workers, no_ready_worker
from services.gateway.turnstile import Turnstile

log = structlog.get_logger(__name__)

ULID_BITS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """What a call that may be made is about.

    Attributes:
        offering: that was called.
        price: in force when the call came.
        dimensions: numbers of each embedding of the answer.
        input_bound: most tokens that the inputs can have.
        most: nanos that it can cost at most.
    """

    offering: Offering
    price: Price
    dimensions: int
    input_bound: int
    most: int


class Embeddings:
    """Embeds, and charges for it."""

    def __init__(
        self,
        *,
        instance: str,
        books: Books,
        offerings: Offerings,
        prices: Prices,
        workers: Workers,
        limits: Limits,
        quotas: Quotas,
        placer: EmbedPlacer,
        turnstile: Turnstile,
        is_revoked: Callable[[str], bool],
        random_bits: Callable[[int], int],
    ) -> None:
        self._instance = instance
        self._books = books
        self._clock = books.clock
        self._offerings = offerings
        self._prices = prices
        self._workers = workers
        self._limits = limits
        self._quotas = quotas
        self._placer = placer
        self._turnstile = turnstile
        self._is_revoked = is_revoked
        self._random_bits = random_bits
        # Calls in flight, by the id of their key.
        self._in_flight: dict[str, set[asyncio.Timeout]] = {}

    async def embed(
        self, request: embedding_service_pb2.EmbedRequest, call: Call
    ) -> embedding_service_pb2.EmbedResponse:
        """Embeds all inputs.

        Args:
            request: the caller's.
            call: that asks.

        Raises:
            MaasError: it is refused, or no worker does it. Nothing is charged.
        """
        principal = call.require_principal()
        project = f"projects/{principal.project}"
        with self._turnstile.passing(project):
            checked = self._check(request)
            scopes = (
                f"accounts/{principal.organization}",
                project,
                f"apiKeys/{principal.key_id}",
            )
            async with (
                self._until_revoked(principal.key_id),
                self._quota(scopes, checked) as quota,
            ):
                purse = self._limits.purse_of(*scopes)
                hold = await self._books.slices.reserve(purse, checked.most)
                try:
                    return await self._embed(request, call, checked, hold, quota)
                finally:
                    # What is owed is no part of it any more.
                    self._books.slices.release(hold)

    def revoke(self, key_id: str) -> None:
        """Ends all calls that were made with a key. They cost nothing."""
        for limit in self._in_flight.get(key_id, ()):
            limit.reschedule(asyncio.get_running_loop().time())

    async def drain(self) -> None:
        """Refuses new calls and waits for those in flight."""
        await self._turnstile.drain()

    @asynccontextmanager
    async def _quota(
        self, scopes: tuple[str, str, str], checked: _Checked
    ) -> AsyncIterator[Ticket | None]:
        """Takes quota for the block, which has used it when it ends well.

        Raises:
            MaasError: a rate limit has no room.
        """
        limits = self._limits.of(scopes[0])
        rates = () if limits is None else limits.rates(*scopes)
        if not rates:
            yield None
            return
        need = Need(input_tokens=checked.input_bound, input_field="inputs")
        ticket = await self._quotas.take(rates, need)
        try:
            yield ticket
        except BaseException:
            ticket.cancel()
            raise
        ticket.end(0)

    @asynccontextmanager
    async def _until_revoked(self, key_id: str) -> AsyncIterator[None]:
        """Ends the block when a key is revoked.

        Raises:
            Unauthenticated: it was.
        """
        limit = asyncio.timeout(None)
        limits = self._in_flight.setdefault(key_id, set())
        limits.add(limit)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise revoked() from None
        finally:
            limits.remove(limit)
            if not limits:
                del self._in_flight[key_id]

    async def _embed(
        self,
        request: embedding_service_pb2.EmbedRequest,
        call: Call,
        checked: _Checked,
        hold: Hold,
        quota: Ticket | None,
    ) -> embedding_service_pb2.EmbedResponse:
        principal = call.require_principal()
        project = f"projects/{principal.project}"
        start_time = self._clock.now()
        generation_id = f"gen_{self._instance}_{ids.ulid(start_time, self._random_bits(ULID_BITS))}"
        made = await self._placer.embed(
            engine_service_pb2.EmbedRequest(
                model_version=checked.offering.model_version,
                inputs=request.inputs,
                truncate=request.truncate,
            ),
            generation_id=generation_id,
            project=project,
            left_s=lambda: self._left_s(call),
        )
        if self._is_revoked(principal.key_id):
            # In this very turn of the event loop: the limit has not gone off yet.
            raise revoked()
        response = _answer(request, checked, made)
        input_tokens = sum(made.response.input_tokens)
        if quota is not None:
            quota.accepted(input_tokens)
        opening = Opening(
            generation_id=generation_id,
            slice_id=hold.slice.slice_id,
            account=hold.slice.account,
            project=project,
            api_key=f"apiKeys/{principal.key_id}",
            offering=checked.offering.name,
            model_version=checked.offering.model_version,
            price=checked.price.name,
            input_tokens=input_tokens,
            start_time=start_time,
            labels=dict(request.labels),
            end_user=request.end_user,
        )
        meter = Meter()
        meter.add(made.response.engine_time.ToNanoseconds())
        settlement = self._charge(opening, checked.price, hold, meter)
        response.usage.CopyFrom(usage_pb2.TokenUsage(input_tokens=input_tokens))
        response.charge.CopyFrom(convert.money_to_pb(settlement.owed))
        response.generation_id = generation_id
        if settlement.closing.receipt:
            response.receipt.ParseFromString(settlement.closing.receipt)
        return response

    def _check(self, request: embedding_service_pb2.EmbedRequest) -> _Checked:
        """Checks a call, its answer's size among the rest, before money moves.

        Raises:
            MaasError: it is refused.
        """
        for place, item in enumerate(request.inputs):
            if item.WhichOneof("input") is None:
                raise invalid_field(
                    f"inputs[{place}]", FieldRule.REQUIRED, "text or tokens is required"
                )
        offering = self._offerings.get(request.model)
        price = self._prices.get(offering.name, self._clock.now())
        made = self._dimensions(request, offering)
        dimensions = request.dimensions if request.HasField("dimensions") else made
        vectors.check_size(
            len(request.inputs), dimensions=dimensions, made=made, encoding=request.encoding
        )
        bound = sum(prompt_bound(_size(item), offering) for item in request.inputs)
        return _Checked(
            offering=offering,
            price=price,
            dimensions=dimensions,
            input_bound=bound,
            most=price.rates.most(input_tokens=bound, output_tokens=0),
        )

    def _dimensions(self, request: embedding_service_pb2.EmbedRequest, offering: Offering) -> int:
        """Returns how many numbers the model makes of an input."""
        able = self._workers.capabilities_of(offering.model_version)
        if able is None:
            self._workers.require()
            raise no_ready_worker(offering.model_version)
        capabilities.require(request, able, model=offering.name, prefix="")
        if not able.embedding_dimensions:
            raise unsupported(
                "model",
                "the model makes no embeddings (embedding_dimensions)",
                feature="embedding_dimensions",
                model=offering.name,
            )
        return able.embedding_dimensions

    def _charge(self, opening: Opening, price: Price, hold: Hold, meter: Meter) -> Settlement:
        """Journals, owes and queues the settlement; returns it.

        Raises:
            FailedPrecondition: the inputs are larger than their bound and the rest is not there.
            Unavailable: it cannot be journaled; nothing is charged.
        """
        books = self._books
        usage = Usage(input_tokens=opening.input_tokens, output_tokens=0)
        charge: int = price.charge(usage, is_background=False)
        missing = charge - hold.nanos
        if missing > 0 and not books.slices.try_grow(hold, missing):
            raise FailedPrecondition(
                "the credit set aside does not cover the inputs",
                reason=Reason.INSUFFICIENT_CREDIT,
                metadata={
                    "account": opening.account,
                    "requiredNanos": str(charge),
                    "availableNanos": str(hold.nanos + hold.slice.free),
                    "currency": CURRENCY,
                },
            )
        closing = Closing(
            output_tokens=0,
            cause=EndCause.COMPLETED,
            end_time=self._clock.now(),
            engine_time_ns=meter.engine_time_ns,
        )
        closing = replace(closing, receipt=signed_receipt(books.signer, opening, closing, charge))
        ordinal = books.journal.opened(opening)
        books.slices.owe(hold, charge)
        try:
            books.journal.closed(ordinal, closing)
        except MaasError:
            # It is settled from memory; after a crash it counts as cut, and costs nothing.
            log.error("journal lost an end", generation_id=opening.generation_id)  # noqa: TRY400
        settlement = Settlement(
            ordinal=ordinal, opening=opening, closing=closing, owed=charge, meter=meter
        )
        books.settler.put(settlement)
        return settlement

    def _left_s(self, call: Call) -> float:
        if call.deadline_s is None:
            return ANSWER_WAIT_S
        return max(call.deadline_s - self._clock.monotonic_s(), 0.001)


def _answer(
    request: embedding_service_pb2.EmbedRequest, checked: _Checked, made: Made
) -> embedding_service_pb2.EmbedResponse:
    try:
        embeddings = vectors.embeddings_to_pb(
            made.response,
            len(request.inputs),
            dimensions=checked.dimensions,
            encoding=request.encoding,
        )
    except ValueError as error:
        log.error("worker has embedded wrongly", worker=made.worker, cause=str(error))  # noqa: TRY400
        raise engine_failed(made.worker) from error
    return embedding_service_pb2.EmbedResponse(
        embeddings=embeddings,
        offering=checked.offering.name,
        model_version=checked.offering.model_version,
    )


def _size(item: embedding_service_pb2.EmbedInput) -> PromptSize:
    if item.WhichOneof("input") == "tokens":
        return PromptSize(content_units=len(item.tokens.ids), message_count=0)
    text = item.text
    units = len(text) if text.isascii() else len(text.encode("utf-8"))
    return PromptSize(content_units=units, message_count=0)
