"""Limits and quotas of the billing service under test: made, read, taken."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta

import pytest
from maas.billing.v1 import credit_slice_service_pb2 as slice_pb
from maas.billing.v1 import limit_service_pb2 as limit_pb
from maas.billing.v1 import quota_service_pb2 as quota_pb

from libs.errors import MaasError
from tests.integration.services.billing.world import Billing, usd

DAY_S = 24 * 3600.0


async def refusal(call: Awaitable[object]) -> MaasError:
    with pytest.raises(MaasError) as caught:
        await call
    return caught.value


def spend(
    nanos: int,
    *,
    scope: str = "accounts/acme",
    account: str = "accounts/acme",
    window: limit_pb.SpendWindow.ValueType = limit_pb.SPEND_WINDOW_DAY,
    alerts: tuple[int, ...] = (),
    name: str = "",
) -> limit_pb.Limit:
    """A spend limit."""
    return limit_pb.Limit(
        name=name,
        account=account,
        scope=scope,
        spend=limit_pb.SpendLimit(amount=usd(nanos), window=window, alert_percents=alerts),
    )


def rate(
    *,
    requests: int | None = None,
    input_tokens: int | None = None,
    output_tokens: int | None = None,
    concurrent: int | None = None,
    name: str = "",
) -> limit_pb.Limit:
    """A rate limit of account acme."""
    return limit_pb.Limit(
        name=name,
        account="accounts/acme",
        scope="accounts/acme",
        rate=limit_pb.RateLimit(
            requests_per_minute=requests,
            input_tokens_per_minute=input_tokens,
            output_tokens_per_minute=output_tokens,
            concurrent_generations=concurrent,
        ),
    )


async def create(billing: Billing, limit: limit_pb.Limit, limit_id: str = "cap") -> limit_pb.Limit:
    response = await billing.admin.peer.call(
        billing.admin.limits.CreateLimit,
        limit_pb.CreateLimitRequest(limit_id=limit_id, limit=limit),
    )
    return response.limit


async def update(billing: Billing, limit: limit_pb.Limit) -> limit_pb.Limit:
    response = await billing.admin.peer.call(
        billing.admin.limits.UpdateLimit, limit_pb.UpdateLimitRequest(limit=limit)
    )
    return response.limit


async def delete(billing: Billing, limit_id: str = "cap") -> None:
    await billing.admin.peer.call(
        billing.admin.limits.DeleteLimit, limit_pb.DeleteLimitRequest(name=f"limits/{limit_id}")
    )


async def read(billing: Billing, limit_id: str = "cap") -> limit_pb.GetLimitResponse:
    return await billing.tenant.peer.call(
        billing.tenant.limits.GetLimit, limit_pb.GetLimitRequest(name=f"limits/{limit_id}")
    )


async def used(billing: Billing, limit_id: str = "cap") -> tuple[int, int]:
    """Reads what is spent and held in the window that runs."""
    usage = (await read(billing, limit_id)).usage
    return usage.spent.nanos, usage.held.nanos


async def alerts(billing: Billing) -> list[tuple[str, int, int]]:
    """Lists limit, percent and spent of all alerts."""
    response = await billing.tenant.peer.call(
        billing.tenant.limits.ListSpendAlerts, limit_pb.ListSpendAlertsRequest()
    )
    return [(item.limit, item.percent, item.spent.nanos) for item in response.spend_alerts]


async def acquire(
    billing: Billing,
    slice_id: str,
    wanted: int,
    *,
    required: int = 0,
    project: str = "",
    api_key: str = "",
    account: str = "accounts/acme",
    holder: str = "gateway-1",
) -> slice_pb.AcquireSliceResponse:
    """Acquires a slice that a project or a key may spend."""
    return await billing.gateway.peer.call(
        billing.gateway.slices.AcquireSlice,
        slice_pb.AcquireSliceRequest(
            slice_id=slice_id,
            account=account,
            holder=holder,
            required_nanos=required,
            wanted_nanos=wanted,
            project=project,
            api_key=api_key,
        ),
    )


async def lease_time(billing: Billing) -> datetime:
    """Reads the clock that leases and windows run on."""
    found = await billing.connection.fetchval("SELECT lease_now()")
    assert isinstance(found, datetime)
    return found


async def set_lease_time(billing: Billing, time: datetime) -> None:
    """Moves that clock forward to a time."""
    await billing.pass_lease_time((time - await lease_time(billing)).total_seconds())


async def set_all_clocks(billing: Billing, time: datetime) -> None:
    """Moves the clock of leases and that of records forward to a time."""
    await set_lease_time(billing, time)
    billing.advance((time - billing.clock.now()).total_seconds())


async def start_of_tomorrow(billing: Billing) -> datetime:
    today = (await lease_time(billing)).astimezone(UTC)
    return today.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)


async def at_noon(billing: Billing) -> datetime:
    """Moves the clock to noon of the first day of a month, so that no window ends by itself.

    Returns:
        the first moment of the next day.
    """
    today = (await lease_time(billing)).astimezone(UTC)
    month = (today.replace(day=1) + timedelta(days=40)).replace(day=1)
    noon = month.replace(hour=12, minute=0, second=0, microsecond=0)
    await set_lease_time(billing, noon)
    return noon + timedelta(hours=12)


def amount(
    required: int,
    *,
    limit_id: str = "pace",
    metric: quota_pb.QuotaMetric.ValueType = quota_pb.QUOTA_METRIC_REQUESTS,
    wanted: int = 0,
) -> quota_pb.QuotaAmount:
    return quota_pb.QuotaAmount(
        limit=f"limits/{limit_id}", metric=metric, required=required, wanted=wanted
    )


async def take(
    billing: Billing, *amounts: quota_pb.QuotaAmount, holder: str = "gateway-1"
) -> quota_pb.TakeQuotaResponse:
    return await billing.gateway.peer.call(
        billing.gateway.quotas.TakeQuota,
        quota_pb.TakeQuotaRequest(holder=holder, amounts=amounts),
    )


async def give_back(
    billing: Billing, *amounts: quota_pb.QuotaAmount, holder: str = "gateway-1"
) -> None:
    await billing.gateway.peer.call(
        billing.gateway.quotas.GiveBackQuota,
        quota_pb.GiveBackQuotaRequest(holder=holder, amounts=amounts),
    )


async def hold(
    billing: Billing, holder: str, wanted: int, *, in_use: int = 0, limit_id: str = "pace"
) -> int:
    """Holds places of one limit; returns how many."""
    response = await billing.gateway.peer.call(
        billing.gateway.quotas.HoldPlaces,
        quota_pb.HoldPlacesRequest(
            holder=holder,
            places=[quota_pb.Places(limit=f"limits/{limit_id}", count=wanted, in_use=in_use)],
        ),
    )
    (places,) = response.places
    return places.count
