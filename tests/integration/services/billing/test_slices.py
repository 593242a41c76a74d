"""Credit slices: acquired, closed, renewed, swept."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from maas.billing.v1 import credit_slice_service_pb2 as slice_pb

from libs.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    MaasError,
    Reason,
    Unauthenticated,
)
from libs.testing import eventually
from services.billing.store.slices import STARVED
from tests.integration.services.billing.world import GRACE_S, LEASE_S, Billing, settlement


async def state_of(billing: Billing, slice_id: str) -> str:
    state = await billing.connection.fetchval(
        "SELECT state FROM credit_slice WHERE credit_slice_id = $1", slice_id
    )
    assert isinstance(state, str)
    return state


async def is_waited_for(billing: Billing) -> bool:
    """Whether somebody waits for a lock that the test's connection has."""
    found = await billing.connection.fetchval(
        """
        SELECT EXISTS (
            SELECT
              FROM pg_locks
             WHERE NOT granted
               AND pg_backend_pid() = ANY(pg_blocking_pids(pid))
        )
        """
    )
    assert isinstance(found, bool)
    return found


async def refusal(call: Awaitable[object]) -> MaasError:
    with pytest.raises(MaasError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize(
    ("required", "wanted", "granted"),
    [(0, 300, 300), (100, 5000, 1000), (1000, 0, 1000), (0, 0, 0), (0, 2**63 - 1, 1000)],
)
async def test_slice_gets_what_is_wanted_as_far_as_it_is_there(
    billing: Billing, required: int, wanted: int, granted: int
) -> None:
    await billing.open_account(1000)

    assert await billing.acquire("s1", wanted, required=required) == granted
    assert await billing.balance() == (1000, granted, 1000 - granted)


async def test_slice_below_what_is_required_is_refused(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 600)

    error = await refusal(billing.acquire("s2", 5000, required=401))

    assert isinstance(error, FailedPrecondition)
    assert error.reason is Reason.INSUFFICIENT_CREDIT
    assert error.metadata == {
        "account": "accounts/acme",
        "requiredNanos": "401",
        "availableNanos": "400",
        "currency": "USD",
    }
    assert await billing.balance() == (1000, 600, 400)


@pytest.mark.parametrize("account", ["accounts/nobody", "accounts/system-funding"])
async def test_missing_account_has_no_credit(billing: Billing, account: str) -> None:
    """A tenant sees this error: "no credit" tells it what to do, "not found" would not."""
    error = await refusal(billing.acquire("s1", 10, required=5, account=account))

    assert error.reason is Reason.INSUFFICIENT_CREDIT
    assert error.metadata["availableNanos"] == "0"


async def test_acquiring_again_returns_the_slice_and_renews_it(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 300)
    await billing.pass_lease_time(LEASE_S - 10)

    assert await billing.acquire("s1", 900, required=900) == 300

    await billing.pass_lease_time(LEASE_S - 10)
    await billing.sweep()
    assert await state_of(billing, "s1") == "open"
    assert await billing.balance() == (1000, 300, 700)


@pytest.mark.parametrize("other", [{"account": "accounts/other"}, {"holder": "gateway-2"}])
async def test_slice_of_somebody_else_is_refused(billing: Billing, other: dict[str, str]) -> None:
    await billing.open_account(1000, "other")
    await billing.open_account(1000)
    await billing.acquire("s1", 300)

    with pytest.raises(AlreadyExists):
        await billing.acquire("s1", 300, **other)  # type: ignore[arg-type] # of both kinds


async def test_concurrent_acquires_admit_exactly_what_the_credit_is_for(
    billing: Billing,
) -> None:
    """64 at once, credit for 23 of them."""
    await billing.open_account(23 * 10 + 9)

    results = await asyncio.gather(
        *(billing.acquire(f"s{number}", 10, required=10) for number in range(64)),
        return_exceptions=True,
    )

    assert sum(result == 10 for result in results) == 23
    refused = [result for result in results if isinstance(result, MaasError)]
    assert {error.reason for error in refused} == {Reason.INSUFFICIENT_CREDIT}
    assert await billing.balance() == (239, 230, 9)


async def test_concurrent_repeats_of_one_acquire_hold_once(billing: Billing) -> None:
    await billing.open_account(1000)

    grants = await asyncio.gather(*(billing.acquire("s1", 300) for _ in range(16)))

    assert set(grants) == {300}
    assert await billing.balance() == (1000, 300, 700)


async def test_close_gives_the_rest_back(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 300)
    await billing.settle(settlement("gen_1", slice_id="s1", tokens=120))

    await billing.close("s1")
    await billing.close("s1")

    assert await billing.balance() == (880, 0, 880)


async def test_close_of_slices_of_many_accounts(billing: Billing) -> None:
    accounts = [f"acme-{number}" for number in range(5)]
    for account_id in accounts:
        await billing.open_account(100, account_id)
        await billing.acquire(f"s-{account_id}", 100, account=f"accounts/{account_id}")

    await billing.close(*(f"s-{account_id}" for account_id in accounts))

    for account_id in accounts:
        assert await billing.balance(f"accounts/{account_id}") == (100, 0, 100)


async def test_slice_closed_before_it_was_acquired_stays_closed(billing: Billing) -> None:
    await billing.open_account(1000)

    await billing.close("s1")
    error = await refusal(billing.acquire("s1", 300))

    assert error.reason is Reason.SLICE_NOT_OPEN
    assert error.metadata == {"slice": "s1", "state": "CLOSED"}
    assert await billing.balance() == (1000, 0, 1000)


async def test_acquire_and_close_at_once_leave_nothing_held(billing: Billing) -> None:
    """Whoever comes first, the slice ends closed: Close finds it, or Acquire finds the mark."""
    await billing.open_account(1000)

    for number in range(30):
        slice_id = f"s{number}"
        pair: list[Callable[[], Awaitable[object]]] = [
            lambda slice_id=slice_id: billing.acquire(slice_id, 10),  # type: ignore[misc]
            lambda slice_id=slice_id: billing.close(slice_id),  # type: ignore[misc]
        ]
        if number % 2:
            pair.reverse()
        await asyncio.gather(*(call() for call in pair), return_exceptions=True)
        assert await state_of(billing, slice_id) == "closed"

    assert await billing.balance() == (1000, 0, 1000)


@pytest.mark.parametrize("slice_ids", [[], ["s1", ""], ["a\0b"], ["s"] * 1001])
async def test_lists_of_slices_that_are_refused(billing: Billing, slice_ids: list[str]) -> None:
    with pytest.raises(InvalidArgument):
        await billing.close(*slice_ids)


async def test_renewal_keeps_a_slice_open(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 300)

    for _ in range(3):
        await billing.pass_lease_time(LEASE_S - 10)
        response = await billing.settle(renew=("s1",))
        assert list(response.lost_slice_ids) == []
        assert response.lease_duration.seconds == LEASE_S

    await billing.sweep()
    assert await state_of(billing, "s1") == "open"


async def test_settling_on_a_slice_renews_it_too(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 300)
    await billing.pass_lease_time(LEASE_S - 10)

    await billing.settle(settlement("gen_1", slice_id="s1"))
    await billing.pass_lease_time(LEASE_S - 10)
    await billing.sweep()

    assert await state_of(billing, "s1") == "open"


async def test_renewal_says_which_slices_are_lost(billing: Billing) -> None:
    """A lease that has run out is over, whether the sweeper has been there or not."""
    await billing.open_account(1000)
    for slice_id in ("closed", "expired", "late"):
        await billing.acquire(slice_id, 10)
    await billing.close("closed")
    await billing.connection.execute(
        "UPDATE credit_slice SET state = 'expired' WHERE credit_slice_id = 'expired'"
    )
    await billing.pass_lease_time(LEASE_S)
    await billing.acquire("open", 10)

    response = await billing.settle(renew=("open", "closed", "expired", "late", "unknown"))

    assert list(response.lost_slice_ids) == ["closed", "expired", "late", "unknown"]
    error = await refusal(billing.acquire("late", 10))
    assert error.metadata == {"slice": "late", "state": "EXPIRED"}


async def test_sweeper_expires_then_reclaims(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 300)
    await billing.settle(settlement("gen_1", slice_id="s1", tokens=100))

    await billing.sweep()
    assert await state_of(billing, "s1") == "open"

    await billing.pass_lease_time(LEASE_S)
    await billing.sweep()
    assert await state_of(billing, "s1") == "expired"
    assert await billing.balance() == (900, 200, 700)

    await billing.pass_lease_time(GRACE_S - 1)
    await billing.sweep()
    assert await state_of(billing, "s1") == "expired"

    await billing.pass_lease_time(1)
    await billing.sweep()
    assert await state_of(billing, "s1") == "reclaimed"
    assert await billing.balance() == (900, 0, 900)


async def test_sweeper_runs_by_itself(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 300)
    await billing.pass_lease_time(LEASE_S + GRACE_S)

    async with asyncio.timeout(5):
        while await state_of(billing, "s1") != "reclaimed":
            billing.clock.advance(5)
            await asyncio.sleep(0.01)

    assert await billing.balance() == (1000, 0, 1000)


async def test_sweeper_takes_more_than_one_round(billing: Billing) -> None:
    await billing.open_account(1200)
    await billing.connection.execute(
        """
        INSERT INTO credit_slice (
            credit_slice_id, account_id, holder, granted, state, expire_time
        )
        SELECT 's' || n, 'acme', 'gone', 1, 'open', lease_now() FROM generate_series(1, 1200) AS n
        """
    )
    await billing.connection.execute("UPDATE balance SET held = 1200")
    await billing.pass_lease_time(GRACE_S)

    await billing.sweep()

    assert await billing.balance() == (1200, 0, 1200)


async def test_sweeper_passes_by_accounts_that_are_locked(billing: Billing) -> None:
    for account_id in ("acme", "busy"):
        await billing.open_account(100, account_id)
        await billing.acquire(f"s-{account_id}", 100, account=f"accounts/{account_id}")
    await billing.pass_lease_time(LEASE_S)

    async with billing.connection.transaction():
        await billing.connection.execute("SELECT FROM balance WHERE account_id = 'busy' FOR UPDATE")
        await billing.sweep()

    assert await state_of(billing, "s-acme") == "expired"
    assert await state_of(billing, "s-busy") == "open"


async def test_sweeper_waits_for_an_account_that_was_locked_whenever_it_came(
    billing: Billing,
) -> None:
    """An account that is settled all the time is locked nearly always."""
    await billing.open_account(100)
    await billing.acquire("s1", 100)
    await billing.pass_lease_time(LEASE_S + STARVED.total_seconds())

    async with billing.connection.transaction():
        await billing.connection.execute("SELECT FROM balance FOR UPDATE")
        sweep = asyncio.create_task(billing.sweep())
        await eventually(lambda: is_waited_for(billing))
    await sweep

    assert await state_of(billing, "s1") == "expired"


async def test_two_sweepers_free_money_once(billing: Billing) -> None:
    await billing.open_account(1000)
    for number in range(20):
        await billing.acquire(f"s{number}", 50)
    await billing.pass_lease_time(LEASE_S + GRACE_S)

    await asyncio.gather(*(billing.sweep() for _ in range(4)))
    await billing.sweep()

    assert await billing.balance() == (1000, 0, 1000)


async def test_tenants_cannot_take_slices(billing: Billing) -> None:
    request = slice_pb.AcquireSliceRequest(
        slice_id="s1", account="accounts/acme", holder="me", wanted_nanos=1
    )

    with pytest.raises(Unauthenticated):
        await billing.tenant.peer.call(billing.tenant.slices.AcquireSlice, request)


async def test_negative_amounts_are_refused(billing: Billing) -> None:
    await billing.open_account(1000)

    with pytest.raises(InvalidArgument):
        await billing.acquire("s1", -1)
    with pytest.raises(InvalidArgument):
        await billing.acquire("s1", 1, required=-1)
