"""What the gateway asks of other services, in its own values."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import structlog
from google.protobuf.descriptor import ServiceDescriptor
from maas.billing.v1 import (
    credit_slice_service_pb2,
    credit_slice_service_pb2_grpc,
    limit_service_pb2,
    limit_service_pb2_grpc,
    price_service_pb2,
    price_service_pb2_grpc,
    quota_service_pb2,
    quota_service_pb2_grpc,
)
from maas.catalog.v1 import (
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    offering_service_pb2,
    offering_service_pb2_grpc,
)
from maas.scheduler.v1 import (
    placement_service_pb2,
    placement_service_pb2_grpc,
    worker_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)

from libs.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    MaasError,
    NotFound,
    Reason,
    ResourceExhausted,
    unavailable,
)
from libs.process import Background
from libs.rpc import Peer, follow
from services.gateway import convert
from services.gateway.domain import Charged
from services.gateway.journal import Journal
from services.gateway.limits import Limits
from services.gateway.links import LinkPool
from services.gateway.placement import Slot, Wanted
from services.gateway.places import Claim, Held
from services.gateway.quotas import Amount, Key, Taken
from services.gateway.settlement import Settled, Settlement
from services.gateway.slices import Grant, Purse
from services.gateway.spares import Lease, Spare
from services.gateway.tables import Adapters, Offerings, Prices, Workers

log = structlog.get_logger(__name__)

CATALOG_SERVICES: list[ServiceDescriptor] = [
    adapter_service_pb2.DESCRIPTOR.services_by_name["AdapterService"],
    offering_service_pb2.DESCRIPTOR.services_by_name["OfferingService"],
]
BILLING_SERVICES: list[ServiceDescriptor] = [
    credit_slice_service_pb2.DESCRIPTOR.services_by_name["CreditSliceService"],
    limit_service_pb2.DESCRIPTOR.services_by_name["LimitService"],
    price_service_pb2.DESCRIPTOR.services_by_name["PriceService"],
    quota_service_pb2.DESCRIPTOR.services_by_name["QuotaService"],
]
SCHEDULER_SERVICES: list[ServiceDescriptor] = [
    placement_service_pb2.DESCRIPTOR.services_by_name["PlacementService"],
    worker_service_pb2.DESCRIPTOR.services_by_name["WorkerService"],
]
CLOSE_MAX = 500
# Spares are asked for in the background; an answer that takes longer is not worth waiting for.
LEASE_WAIT_S = 1.0
# Quota is asked for while a client waits: billing that does not answer by then is away.
QUOTA_WAIT_S = 2.0
PLACES_WAIT_S = 1.0
# The library repeats a call 80 ms after it has failed, or later.
RETRY_MIN_S = 0.05


async def follow_offerings(peer: Peer, table: Offerings) -> None:
    """Feeds the table of offerings, for ever."""

    def apply(response: offering_service_pb2.WatchOfferingsResponse, is_snapshot: bool) -> None:  # noqa: ARG001, FBT001 - signature of follow
        table.apply(convert.offering_from_pb(message) for message in response.offerings)
        if response.snapshot_complete:
            table.complete()

    stub = offering_service_pb2_grpc.OfferingServiceStub(peer.channel)
    await follow(peer, stub.WatchOfferings, offering_service_pb2.WatchOfferingsRequest(), apply)


async def follow_adapters(peer: Peer, table: Adapters) -> None:
    """Feeds the table of adapters, for ever."""

    def apply(response: adapter_service_pb2.WatchAdaptersResponse, is_snapshot: bool) -> None:  # noqa: FBT001 - signature of follow
        table.apply(
            [convert.adapter_from_pb(message) for message in response.adapters],
            response.deleted_names,
            is_snapshot=is_snapshot,
            is_complete=response.snapshot_complete,
        )

    stub = adapter_service_pb2_grpc.AdapterServiceStub(peer.channel)
    request = adapter_service_pb2.WatchAdaptersRequest()
    await follow(peer, stub.WatchAdapters, request, apply, on_open=table.begin)


async def follow_prices(peer: Peer, table: Prices) -> None:
    """Feeds the price book, for ever."""

    def apply(response: price_service_pb2.WatchPricesResponse, is_snapshot: bool) -> None:  # noqa: ARG001, FBT001 - signature of follow
        table.apply(convert.price_from_pb(message) for message in response.prices)
        if response.snapshot_complete:
            table.complete()

    stub = price_service_pb2_grpc.PriceServiceStub(peer.channel)
    await follow(peer, stub.WatchPrices, price_service_pb2.WatchPricesRequest(), apply)


async def follow_limits(peer: Peer, table: Limits) -> None:
    """Feeds the table of limits, for ever."""

    def apply(response: limit_service_pb2.WatchLimitsResponse, is_snapshot: bool) -> None:  # noqa: FBT001 - signature of follow
        table.apply(
            [convert.limit_from_pb(message) for message in response.limits],
            is_snapshot=is_snapshot,
            is_complete=response.snapshot_complete,
        )

    stub = limit_service_pb2_grpc.LimitServiceStub(peer.channel)
    request = limit_service_pb2.WatchLimitsRequest()
    await follow(peer, stub.WatchLimits, request, apply, on_open=table.begin)


async def follow_workers(peer: Peer, table: Workers, links: LinkPool) -> None:
    """Feeds the table of workers and opens links to them ahead of their first use, for ever.

    A scheduler that has just restarted lists no worker until they are back; what was known before
    stays until the workers themselves say otherwise.
    """

    def apply(response: worker_service_pb2.WatchWorkersResponse, is_snapshot: bool) -> None:  # noqa: ARG001, FBT001 - signature of follow
        for message in response.workers:
            if message.state == worker_pb2.WORKER_STATE_READY:
                table.put(convert.worker_from_pb(message))
                links.get(message.name, message.endpoint)
            else:
                table.drop(message.name)
        if response.workers:
            links.retain(table.endpoints())
        if response.snapshot_complete:
            table.complete()

    stub = worker_service_pb2_grpc.WorkerServiceStub(peer.channel)
    await follow(peer, stub.WatchWorkers, worker_service_pb2.WatchWorkersRequest(), apply)


class BillingClient:
    """Credit slices and settlements. Notes slices in the journal before it asks for them."""

    def __init__(self, peer: Peer, journal: Journal, holder: str) -> None:
        self._peer = peer
        self._journal = journal
        self._holder = holder
        self._stub = credit_slice_service_pb2_grpc.CreditSliceServiceStub(peer.channel)

    async def acquire(self, slice_id: str, purse: Purse, required: int, wanted: int) -> Grant:
        """Sets money aside. Raises as AcquireSlice does.

        Raises:
            Unavailable: billing has not answered in time; it is not the time of the caller.
        """
        self._journal.slice_wanted(slice_id)
        request = credit_slice_service_pb2.AcquireSliceRequest(
            slice_id=slice_id,
            account=purse.account,
            project=purse.project,
            api_key=purse.api_key,
            holder=self._holder,
            required_nanos=required,
            wanted_nanos=wanted,
        )
        loop = asyncio.get_running_loop()
        asked_at_s = loop.time()
        try:
            response = await self._peer.call(self._stub.AcquireSlice, request)
        except (FailedPrecondition, NotFound, ResourceExhausted) as error:
            if not isinstance(error, ResourceExhausted) or (
                error.reason is Reason.SPEND_LIMIT_REACHED
            ):
                if loop.time() - asked_at_s < RETRY_MIN_S:
                    # Nothing was set aside, for sure.
                    self._journal.slices_closed([slice_id])
                else:
                    # A try before the one that was refused may still be on its way.
                    await self._fence(slice_id)
            raise
        except DeadlineExceeded as error:
            raise unavailable("billing") from error
        return Grant(response.granted_nanos, response.lease_duration.ToTimedelta().total_seconds())

    async def _fence(self, slice_id: str) -> None:
        """Sees to it that nothing is set aside for a slice any more, whatever comes late.

        Raises:
            Unavailable: that is not known.
        """
        try:
            await self.close([slice_id])
        except DeadlineExceeded as error:
            raise unavailable("billing") from error

    async def settle(self, settlements: list[Settlement], renew: list[str]) -> Settled:
        """Settles and renews. Raises as Settle does."""
        request = credit_slice_service_pb2.SettleRequest(
            settlements=[
                convert.settlement_to_pb(
                    item.opening, item.closing, engine_time_ns=item.engine_time_ns
                )
                for item in settlements
            ],
            renew_slice_ids=renew,
        )
        response = await self._peer.call(self._stub.Settle, request)
        return Settled(
            lost_slice_ids=list(response.lost_slice_ids),
            lease_s=response.lease_duration.ToTimedelta().total_seconds(),
        )

    async def find_charged(self, project: str, request_id: str) -> Charged | None:
        """Finds what was charged under an idempotency key. Raises as FindSettlement does.

        Raises:
            Unavailable: billing has not answered in time.
        """
        request = credit_slice_service_pb2.FindSettlementRequest(
            project=project, request_id=request_id
        )
        try:
            response = await self._peer.call(self._stub.FindSettlement, request)
        except DeadlineExceeded as error:
            raise unavailable("billing") from error
        return convert.charged_from_pb(response)

    async def close(self, slice_ids: list[str]) -> None:
        """Gives slices back. Raises as CloseSlices does."""
        for part in _parts(slice_ids):
            await self._peer.call(
                self._stub.CloseSlices,
                credit_slice_service_pb2.CloseSlicesRequest(slice_ids=part, holder=self._holder),
            )
            self._journal.slices_closed(part)


class QuotaClient:
    """Shares of rate limits."""

    def __init__(self, peer: Peer, holder: str) -> None:
        self._peer = peer
        self._holder = holder
        self._stub = quota_service_pb2_grpc.QuotaServiceStub(peer.channel)

    async def take(self, amounts: list[Amount]) -> Taken:
        """Takes from limits, all or nothing. Raises as TakeQuota does."""
        request = quota_service_pb2.TakeQuotaRequest(
            holder=self._holder,
            amounts=[convert.quota_to_pb(item.key, item.required, item.wanted) for item in amounts],
        )
        response = await self._peer.call(self._stub.TakeQuota, request, timeout_s=QUOTA_WAIT_S)
        if response.HasField("retry_after"):
            return Taken(
                retry_after_s=convert.seconds_of(response.retry_after),
                refused=response.refused_index,
            )
        return Taken(
            granted=tuple(response.granted), lease_s=convert.seconds_of(response.lease_duration)
        )

    async def give_back(self, amounts: Mapping[Key, int]) -> None:
        """Gives back what was not used, at most 64 amounts. Raises as GiveBackQuota does."""
        request = quota_service_pb2.GiveBackQuotaRequest(
            holder=self._holder,
            amounts=[convert.quota_to_pb(key, count, 0) for key, count in amounts.items()],
        )
        await self._peer.call(self._stub.GiveBackQuota, request, timeout_s=QUOTA_WAIT_S)

    async def hold(self, claims: list[Claim]) -> Held:
        """Holds places, and gives back what is not named. Raises as HoldPlaces does."""
        request = quota_service_pb2.HoldPlacesRequest(
            holder=self._holder,
            places=[
                quota_service_pb2.Places(limit=claim.limit, count=claim.wanted, in_use=claim.in_use)
                for claim in claims
            ],
        )
        response = await self._peer.call(self._stub.HoldPlaces, request, timeout_s=PLACES_WAIT_S)
        return Held(
            [item.count for item in response.places], convert.seconds_of(response.lease_duration)
        )


class SchedulerClient:
    """Places on workers."""

    def __init__(self, peer: Peer, background: Background) -> None:
        self._peer = peer
        self._background = background
        self._stub = placement_service_pb2_grpc.PlacementServiceStub(peer.channel)

    async def acquire(self, wanted: Wanted, execution_id: str, exclude: list[str]) -> Slot:
        """Waits for a place. Raises as AcquireSlot does."""
        request = placement_service_pb2.AcquireSlotRequest(
            execution_id=execution_id,
            model_version=wanted.model_version,
            project=wanted.project,
            exclude_workers=exclude,
            max_wait=convert.duration_to_pb(wanted.max_wait_s),
            spare_execution_ids=wanted.spare_ids,
            places=wanted.places,
            affinity=wanted.affinity,
            priority=wanted.priority,
        )
        response = await self._peer.call(self._stub.AcquireSlot, request)
        return convert.slot_from_pb(response)

    async def lease(self, model_version: str, execution_ids: list[str]) -> Lease:
        """Asks for slots for executions that may come, without waiting. Raises as AcquireSlot does.

        Args:
            model_version: "models/{model}/versions/{version}".
            execution_ids: two or more; the first of them may get slots.
        """
        request = placement_service_pb2.AcquireSlotRequest(
            execution_id=execution_ids[0],
            model_version=model_version,
            max_wait=convert.duration_to_pb(0),
            spare_execution_ids=execution_ids[1:],
        )
        response = await self._peer.call(self._stub.AcquireSlot, request, timeout_s=LEASE_WAIT_S)
        slot = convert.slot_from_pb(response)
        target = slot.targets[0]
        first = Spare(
            slot_id=response.slot_id,
            execution_id=execution_ids[0],
            worker=target.worker,
            endpoint=target.endpoint,
            epoch=target.epoch,
        )
        return Lease(spares=(first, *slot.spares), start_within_s=slot.start_within_s)

    def release(self, slot_id: str) -> None:
        """Gives a slot back in the background; if that fails the slot runs out by itself."""
        self._background.start(self._release(slot_id), name="release slot")

    async def _release(self, slot_id: str) -> None:
        try:
            await self.release_all([slot_id])
        except MaasError as error:
            log.warning("slot not released", cause=error.reason.value)

    async def release_all(self, slot_ids: list[str]) -> None:
        """Gives slots back, a thousand at most. Raises as ReleaseSlots does."""
        request = placement_service_pb2.ReleaseSlotsRequest(slot_ids=slot_ids)
        await self._peer.call(self._stub.ReleaseSlots, request)


def _parts(slice_ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(slice_ids), CLOSE_MAX):
        yield slice_ids[start : start + CLOSE_MAX]
