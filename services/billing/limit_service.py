"""Methods of limits: parse, one call of the store, build. Who reaches what: see service.py."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from maas.billing.v1 import limit_service_pb2 as limit_pb
from maas.billing.v1 import limit_service_pb2_grpc
from typing_extensions import override

from libs import paging
from libs.clock import Clock
from libs.limits import WATCH_BOOKMARK_S
from libs.rpc import Hub, current_call
from libs.rpc.feed import changes
from services.billing import convert, limit_convert
from services.billing.service import ALL_ACCOUNTS, is_administrator, reachable_account
from services.billing.store.limits import LimitStore

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]


class LimitService(limit_service_pb2_grpc.LimitServiceServicer):
    """Limits: maas.billing.v1.LimitService.

    Args:
        store: where limits are kept.
        hub: wakes watchers when a limit has changed.
        clock: time of records.
        bookmark_s: longest time between two responses of a watch.
    """

    def __init__(
        self,
        store: LimitStore,
        hub: Hub,
        clock: Clock,
        *,
        bookmark_s: float = WATCH_BOOKMARK_S,
    ) -> None:
        self._store = store
        self._hub = hub
        self._clock = clock
        self._bookmark_s = bookmark_s

    @override
    async def CreateLimit(
        self, request: limit_pb.CreateLimitRequest, _: Context
    ) -> limit_pb.CreateLimitResponse:
        """Creates a limit."""
        wanted = limit_convert.limit_from_pb(request.limit_id, request.limit, self._clock.now())
        limit = await self._store.create_limit(wanted)
        self._hub.poke()
        return limit_pb.CreateLimitResponse(limit=limit_convert.limit_to_pb(limit))

    @override
    async def UpdateLimit(
        self, request: limit_pb.UpdateLimitRequest, _: Context
    ) -> limit_pb.UpdateLimitResponse:
        """Replaces what a limit allows."""
        message = request.limit
        limit = await self._store.update_limit(
            limit_convert.limit_id_of(message.name, "limit.name"),
            limit_convert.kind_from_pb(message),
            self._clock.now(),
            account_id=(
                convert.account_id_of(message.account, "limit.account") if message.account else ""
            ),
            scope=(limit_convert.scope_of(message.scope, "limit.scope") if message.scope else None),
        )
        self._hub.poke()
        return limit_pb.UpdateLimitResponse(limit=limit_convert.limit_to_pb(limit))

    @override
    async def DeleteLimit(
        self, request: limit_pb.DeleteLimitRequest, _: Context
    ) -> limit_pb.DeleteLimitResponse:
        """Deletes a limit."""
        await self._store.delete_limit(limit_convert.limit_id_of(request.name, "name"))
        self._hub.poke()
        return limit_pb.DeleteLimitResponse()

    @override
    async def GetLimit(
        self, request: limit_pb.GetLimitRequest, _: Context
    ) -> limit_pb.GetLimitResponse:
        """Reads a limit and what is used of it."""
        own = None if is_administrator() else current_call().require_principal().organization
        limit, usage = await self._store.get_limit(
            limit_convert.limit_id_of(request.name, "name"), own
        )
        return limit_pb.GetLimitResponse(
            limit=limit_convert.limit_to_pb(limit), usage=limit_convert.usage_to_pb(limit, usage)
        )

    @override
    async def ListLimits(
        self, request: limit_pb.ListLimitsRequest, _: Context
    ) -> limit_pb.ListLimitsResponse:
        """Lists limits by name."""
        page = paging.page_of(request.page_size, request.page_token)
        limits = await self._store.list_limits(_parent(request.parent), page)
        items, token = paging.cut_named(
            [limit_convert.limit_to_pb(limit) for limit in limits], page
        )
        return limit_pb.ListLimitsResponse(limits=items, next_page_token=token)

    @override
    async def ListSpendAlerts(
        self, request: limit_pb.ListSpendAlertsRequest, _: Context
    ) -> limit_pb.ListSpendAlertsResponse:
        """Lists alerts, oldest first."""
        page = paging.page_of(request.page_size, request.page_token)
        alerts = await self._store.list_alerts(_parent(request.parent), page)
        messages = [limit_convert.alert_to_pb(alert) for alert in alerts]
        numbers = {
            id(message): str(alert.number) for message, alert in zip(messages, alerts, strict=True)
        }
        items, token = paging.cut(messages, page, lambda item: numbers[id(item)])
        return limit_pb.ListSpendAlertsResponse(spend_alerts=items, next_page_token=token)

    @override
    async def WatchLimits(
        self, _request: limit_pb.WatchLimitsRequest, _: Context
    ) -> AsyncGenerator[limit_pb.WatchLimitsResponse, None]:
        """Streams every limit, then each change, then signs of life."""
        read_after = self._store.list_limits_after
        async with aclosing(changes(self._hub, read_after, bookmark_s=self._bookmark_s)) as feed:
            async for item in feed:
                yield limit_pb.WatchLimitsResponse(
                    limits=[limit_convert.limit_to_pb(limit) for limit in item.items],
                    snapshot_complete=item.completes_snapshot,
                )


def _parent(name: str) -> str | None:
    """Returns whose limits are listed; None for those of all.

    Raises:
        InvalidArgument: the name has another form.
        NotFound: it is not the tenant's own.
    """
    if is_administrator() and name in {"", ALL_ACCOUNTS}:
        return None
    return reachable_account(name, "parent")
