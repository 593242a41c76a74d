"""Methods of quotas, for gateways: parse, one call of the store, build."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.duration_pb2 import Duration
from maas.billing.v1 import quota_service_pb2 as quota_pb
from maas.billing.v1 import quota_service_pb2_grpc
from typing_extensions import override

from services.billing import convert, limit_convert
from services.billing.limits import limit_name
from services.billing.quotas import PLACES_LEASE_S, QUOTA_LEASE_S, Refusal
from services.billing.store.quotas import QuotaStore

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]


class QuotaService(quota_service_pb2_grpc.QuotaServiceServicer):
    """Shares of rate limits: maas.billing.v1.QuotaService."""

    def __init__(self, store: QuotaStore) -> None:
        self._store = store

    @override
    async def TakeQuota(
        self, request: quota_pb.TakeQuotaRequest, _: Context
    ) -> quota_pb.TakeQuotaResponse:
        """Takes from limits, all or nothing."""
        amounts = limit_convert.amounts_from_pb(request.amounts)
        holder = convert.text_of(request.holder, "holder")
        taken = await self._store.take(holder, amounts)
        if isinstance(taken, Refusal):
            retry_after = Duration()
            retry_after.FromTimedelta(taken.wait)
            return quota_pb.TakeQuotaResponse(
                granted=[0] * len(amounts), retry_after=retry_after, refused_index=taken.index
            )
        return quota_pb.TakeQuotaResponse(granted=taken, lease_duration=_duration(QUOTA_LEASE_S))

    @override
    async def GiveBackQuota(
        self, request: quota_pb.GiveBackQuotaRequest, _: Context
    ) -> quota_pb.GiveBackQuotaResponse:
        """Gives back what was taken and not used."""
        await self._store.give_back(
            convert.text_of(request.holder, "holder"),
            limit_convert.amounts_from_pb(request.amounts),
        )
        return quota_pb.GiveBackQuotaResponse()

    @override
    async def HoldPlaces(
        self, request: quota_pb.HoldPlacesRequest, _: Context
    ) -> quota_pb.HoldPlacesResponse:
        """Holds places of running generations for a lease."""
        wishes = limit_convert.places_from_pb(request.places)
        held = await self._store.hold_places(convert.text_of(request.holder, "holder"), wishes)
        return quota_pb.HoldPlacesResponse(
            places=[
                quota_pb.Places(limit=limit_name(wish.limit_id), count=count, in_use=wish.in_use)
                for wish, count in zip(wishes, held, strict=True)
            ],
            lease_duration=_duration(PLACES_LEASE_S),
        )


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message
