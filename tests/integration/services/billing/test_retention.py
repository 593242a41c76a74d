"""Ended slices are deleted after a while, and what was closed stays closed."""

from __future__ import annotations

from datetime import timedelta

import pytest

from libs import ids
from libs.errors import FailedPrecondition, Reason
from services.billing.store import SliceStore
from services.billing.store.slices import RETENTION_S
from tests.integration.services.billing.world import (
    GRACE_S,
    LEASE_S,
    Billing,
    settlement,
)


async def new_id(billing: Billing, age_s: float = 0.0) -> str:
    """An id as gateways make them, that long ago."""
    now = await billing.connection.fetchval("SELECT lease_now()")
    return f"gateway-1.{ids.ulid(now - timedelta(seconds=age_s), 7)}"


async def prune(billing: Billing) -> set[str]:
    """Prunes; returns the slices that are left."""
    await SliceStore(billing.database, lease_s=LEASE_S, grace_s=GRACE_S).prune()
    rows = await billing.connection.fetch("SELECT credit_slice_id FROM credit_slice")
    return {row["credit_slice_id"] for row in rows}


async def test_ended_slices_are_deleted_after_the_retention(billing: Billing) -> None:
    await billing.open_account(100)
    closed, mark, kept = [await new_id(billing, age_s) for age_s in (1.0, 2.0, 3.0)]
    await billing.acquire(closed, 10)
    await billing.settle(settlement("gen_1", slice_id=closed, tokens=4))
    await billing.acquire(kept, 10)
    await billing.close(closed, mark)

    await billing.pass_lease_time(RETENTION_S - 10)
    assert await prune(billing) == {closed, mark, kept}
    await billing.pass_lease_time(20)

    assert await prune(billing) == {kept}
    assert await billing.balance() == (96, 10, 86)


async def test_slice_that_was_closed_and_deleted_cannot_be_acquired_late(
    billing: Billing,
) -> None:
    """The fence holds without its mark: the id itself is too old."""
    await billing.open_account(100)
    late = await new_id(billing)
    await billing.close(late)
    await billing.pass_lease_time(RETENTION_S + 10)
    assert await prune(billing) == set()

    with pytest.raises(FailedPrecondition) as caught:
        await billing.acquire(late, 10)

    assert caught.value.reason is Reason.SLICE_NOT_OPEN
    assert await billing.balance() == (100, 0, 100)


async def test_settlement_on_a_deleted_slice_is_paid_by_the_account(billing: Billing) -> None:
    await billing.open_account(100)
    late = await new_id(billing)
    await billing.acquire(late, 50)
    await billing.close(late)
    await billing.pass_lease_time(RETENTION_S + 10)
    await prune(billing)

    settled = await billing.settle(settlement("gen_1", slice_id=late, tokens=30))

    assert (settled.settled_count, list(settled.lost_slice_ids)) == (1, [late])
    assert await billing.balance() == (70, 0, 70)


async def test_slice_whose_id_is_from_a_clock_that_is_ahead_is_kept_until_it_is_old(
    billing: Billing,
) -> None:
    await billing.open_account(100)
    ahead = await new_id(billing, -3600.0)
    await billing.close(ahead)

    await billing.pass_lease_time(RETENTION_S + 10)
    assert await prune(billing) == {ahead}
    await billing.pass_lease_time(3600)

    assert await prune(billing) == set()


async def test_slice_whose_id_has_no_time_is_kept(billing: Billing) -> None:
    await billing.open_account(100)
    await billing.acquire("s1", 10)
    await billing.close("s1")

    await billing.pass_lease_time(2 * RETENTION_S)

    assert await prune(billing) == {"s1"}
    with pytest.raises(FailedPrecondition):
        await billing.acquire("s1", 10)


async def test_reclaimed_slices_are_deleted_too(billing: Billing) -> None:
    await billing.open_account(100)
    lost = await new_id(billing)
    await billing.acquire(lost, 10)
    await billing.pass_lease_time(LEASE_S + GRACE_S + 1)
    await billing.sweep()
    await billing.pass_lease_time(RETENTION_S)

    assert await prune(billing) == set()
    assert await billing.balance() == (100, 0, 100)
