"""Settlement: ended generations go to billing in batches, each until billing says it is durable.

Under no client's deadline. Nothing leaves the queue before the answer; an unknown outcome is sent
again and billing's key absorbs it. The same call renews the leases of the slices. A settlement
that billing refuses as wrong is a defect: it is set aside, loudly, so that it cannot hold up the
rest, and the journal keeps it for the next start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from libs import failpoints
from libs.clock import Clock
from libs.errors import InvalidArgument, MaasError
from services.gateway import metrics
from services.gateway.domain import Charged, Closing, Opening, usage_of
from services.gateway.journal import Journal
from services.gateway.meter import Meter
from services.gateway.slices import SliceBook

log = structlog.get_logger(__name__)

BATCH_MAX = 500
# Slices that one call renews: a limit of the contract. More would be no settlement's fault, and yet
# each would be set aside for it.
RENEW_MAX = 1000
BACKOFF_MAX_S = 1.0
# Renewals a lease: one may fail and the next is still in time.
RENEWALS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """One generation to settle.

    Attributes:
        ordinal: in this process's journal; None for one that was recovered.
        opening: from the acceptance.
        closing: from the end.
        owed: nanos owed on its slice in this process's book; 0 for one that was recovered.
        meter: what it took of engines: what workers say just after its end counts too. None for one
            that was recovered.
    """

    ordinal: int | None
    opening: Opening
    closing: Closing
    owed: int
    meter: Meter | None = None

    @property
    def engine_time_ns(self) -> int:
        """Nanoseconds of engines that are known of by now."""
        if self.meter is None:
            return self.closing.engine_time_ns
        return self.meter.engine_time_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What billing answers.

    Attributes:
        lost_slice_ids: slices that can no longer be spent from.
        lease_s: new length of the leases, counted from when it was asked for.
    """

    lost_slice_ids: list[str]
    lease_s: float


Settle = Callable[[list[Settlement], list[str]], Awaitable[Settled]]
"""Asks billing: settlements, slices to renew."""


class Settler:
    """The queue and its one worker.

    Attributes:
        refused: settlements that billing called wrong.
    """

    def __init__(
        self,
        *,
        settle: Settle,
        book: SliceBook,
        journal: Journal,
        clock: Clock,
        interval_s: float,
        idle_s: float,
    ) -> None:
        self._settle = settle
        self._book = book
        self._journal = journal
        self._clock = clock
        self._interval_s = interval_s
        self._idle_s = idle_s
        self._queue: list[Settlement] = []
        # Settlements that have left the queue.
        self._taken = 0
        # Of those in the queue: charged, with an idempotency key.
        self._by_request: dict[tuple[str, str], Settlement] = {}
        self._wake = asyncio.Event()
        self._renew_at_s = 0.0
        self._lock = asyncio.Lock()
        self.refused = 0

    @property
    def queued(self) -> int:
        """Settlements that are not known to be durable."""
        return len(self._queue)

    def put(self, settlement: Settlement) -> None:
        """Queues a settlement. The queue is bounded by what slices can pay for."""
        self._queue.append(settlement)
        if settlement.opening.request_id and settlement.closing.cause.is_charged:
            self._by_request[_request_of(settlement)] = settlement
        metrics.SETTLEMENTS_QUEUED.set(len(self._queue))
        self._wake.set()

    def find_charged(self, project: str, request_id: str) -> Charged | None:
        """Finds what is charged under an idempotency key and not known to be durable."""
        found = self._by_request.get((project, request_id))
        if found is None:
            return None
        return Charged(
            generation_id=found.opening.generation_id,
            request_sha256=found.opening.request_sha256,
            usage=usage_of(found.opening, found.closing),
            nanos=found.owed,
        )

    async def run(self) -> None:
        """Settles, renews and gives back, for ever."""
        backoff_s = self._interval_s
        while True:
            try:
                async with asyncio.timeout(self._interval_s if self._queue else self._idle_s / 4):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            # What ends within the interval goes together.
            await self._clock.sleep_s(self._interval_s)
            try:
                await self.flush()
                await self._book.close_idle(self._idle_s)
                backoff_s = self._interval_s
            except MaasError as error:
                log.warning("settlement waits", cause=error.reason.value, queued=len(self._queue))
                await self._clock.sleep_s(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def flush(self) -> None:
        """Settles what is queued now, and renews leases that are due.

        Raises:
            Unavailable: billing is away; everything stays queued.
        """
        async with self._lock:
            await self._flush()

    async def _flush(self) -> None:
        # What is queued meanwhile waits for the next time: else batches would become small.
        until = self._taken + len(self._queue)
        while self._taken < until:
            await self._settle_batch(self._queue[: min(BATCH_MAX, until - self._taken)])
        if self._is_renewal_due() and self._book.open_ids():
            await self._settle_batch([])

    async def finish(self) -> None:
        """Settles everything and gives all slices back. For the drain; bounded by its caller."""
        while not await self._try_finish():
            await self._clock.sleep_s(self._interval_s)

    async def _try_finish(self) -> bool:
        try:
            await self.flush()
            return await self._book.close_all()
        except MaasError:
            return False

    async def _settle_batch(self, batch: list[Settlement]) -> None:
        # Each slice that is named costs billing a row: not with every batch, only when it is due.
        slice_ids = self._book.open_ids() if self._is_renewal_due() else []
        asked_at_s = self._clock.monotonic_s()
        lease_s = await self._settle_and_renew(batch, slice_ids[:RENEW_MAX])
        for start in range(RENEW_MAX, len(slice_ids), RENEW_MAX):
            lease_s = await self._settle_and_renew([], slice_ids[start : start + RENEW_MAX])
        if slice_ids and lease_s is not None:
            self._renew_at_s = asked_at_s + lease_s / RENEWALS

    def _is_renewal_due(self) -> bool:
        return self._clock.monotonic_s() >= self._renew_at_s

    async def _settle_and_renew(
        self, batch: list[Settlement], slice_ids: list[str]
    ) -> float | None:
        """Returns the seconds of a renewed lease; None where billing has refused the batch."""
        asked_at_s = self._clock.monotonic_s()
        try:
            settled = await self._settle(batch, slice_ids)
        except InvalidArgument as error:
            await self._isolate(batch, error)
            return None
        failpoints.hit(failpoints.Point.SETTLE_ANSWERED)
        self._book.renewed(slice_ids, asked_at_s, settled.lease_s)
        self._book.lost(settled.lost_slice_ids)
        self._acknowledge(batch)
        return settled.lease_s

    def _acknowledge(self, batch: list[Settlement]) -> None:
        ordinals = [item.ordinal for item in batch if item.ordinal is not None]
        if ordinals:
            self._journal.settled(ordinals)
        for item in batch:
            self._book.settled(item.opening.slice_id, item.owed)
            self._forget_request(item)
        # Only this task removes, so the batch is still the head of the queue.
        del self._queue[: len(batch)]
        self._taken += len(batch)
        metrics.SETTLEMENTS_QUEUED.set(len(self._queue))

    async def _isolate(self, batch: list[Settlement], error: MaasError) -> None:
        """Finds the settlement that billing refuses, by halves, and sets it aside."""
        if len(batch) > 1:
            await self._settle_batch(batch[: len(batch) // 2])
            return
        if not batch:
            raise error
        log.error(
            "settlement refused",
            generation_id=batch[0].opening.generation_id,
            cause=error.message,
        )
        metrics.SETTLEMENTS_REFUSED.inc()
        self.refused += 1
        self._book.settled(batch[0].opening.slice_id, batch[0].owed)
        self._forget_request(batch[0])
        del self._queue[:1]
        self._taken += 1

    def _forget_request(self, settlement: Settlement) -> None:
        """Frees an idempotency key, unless it is that of another generation by now."""
        request = _request_of(settlement)
        if self._by_request.get(request) is settlement:
            del self._by_request[request]


def _request_of(settlement: Settlement) -> tuple[str, str]:
    return settlement.opening.project, settlement.opening.request_id
