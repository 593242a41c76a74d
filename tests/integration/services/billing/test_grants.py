"""Grants: given, used up in their order, expired; accounts below zero."""

from __future__ import annotations

import asyncio
import base64
from datetime import timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from maas.billing.v1 import account_service_pb2 as account_pb
from maas.billing.v1 import ledger_pb2

from libs.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Reason,
)
from tests.integration.services.billing.world import Billing, Client, running, settlement, usd

ADJUSTMENT = ledger_pb2.ENTRY_KIND_ADJUSTMENT


async def in_s(billing: Billing, seconds: float) -> Timestamp:
    """A moment on the clock that grants expire on."""
    now = await billing.connection.fetchval("SELECT lease_now()")
    message = Timestamp()
    message.FromDatetime(now + timedelta(seconds=seconds))
    return message


async def give(
    billing: Billing,
    grant_id: str,
    nanos: int,
    *,
    priority: int = 50,
    life_s: float | None = None,
    kind: ledger_pb2.GrantKind.ValueType = ledger_pb2.GRANT_KIND_GIFT,
    account: str = "accounts/acme",
) -> ledger_pb2.Grant:
    """Creates a grant."""
    grant = ledger_pb2.Grant(
        amount=usd(nanos),
        priority=priority,
        kind=kind,
        description="why",
        expire_time=None if life_s is None else await in_s(billing, life_s),
    )
    return await create(billing, grant, grant_id, account)


async def create(
    billing: Billing, grant: ledger_pb2.Grant, grant_id: str, account: str = "accounts/acme"
) -> ledger_pb2.Grant:
    response = await billing.admin.peer.call(
        billing.admin.accounts.CreateGrant,
        account_pb.CreateGrantRequest(parent=account, grant_id=grant_id, grant=grant),
    )
    return response.grant


async def listed(
    billing: Billing, *, show_all: bool = False, page_size: int = 0, client: Client | None = None
) -> list[tuple[str, int]]:
    """Ids and what remains, in the order in which they come."""
    client = client or billing.admin
    found: list[tuple[str, int]] = []
    token = ""
    while True:
        response = await client.peer.call(
            client.accounts.ListGrants,
            account_pb.ListGrantsRequest(
                parent="accounts/acme", show_all=show_all, page_size=page_size, page_token=token
            ),
        )
        found += [(item.name.rpartition("/")[2], item.remaining.nanos) for item in response.grants]
        token = response.next_page_token
        if not token:
            return found


async def limit_credit(billing: Billing, nanos: int) -> ledger_pb2.Account:
    response = await billing.admin.peer.call(
        billing.admin.accounts.SetCreditLimit,
        account_pb.SetCreditLimitRequest(account="accounts/acme", credit_limit=usd(nanos)),
    )
    return response.account


async def entries(billing: Billing) -> list[ledger_pb2.LedgerEntry]:
    response = await billing.tenant.peer.call(
        billing.tenant.accounts.ListLedgerEntries,
        account_pb.ListLedgerEntriesRequest(parent="accounts/acme"),
    )
    return list(response.entries)


async def spend(billing: Billing, name: str, nanos: int) -> None:
    """Charges that much by a slice of its own, which is closed."""
    await billing.acquire(name, nanos, required=nanos)
    await billing.settle(settlement(f"gen_{name}", slice_id=name, tokens=nanos))
    await billing.close(name)


async def test_grant_and_top_up_are_entries_of_their_kinds(billing: Billing) -> None:
    await billing.open_account()

    gift = await give(billing, "welcome", 100)
    paid = await give(billing, "order-7", 50, kind=ledger_pb2.GRANT_KIND_TOP_UP)

    assert gift.name == "accounts/acme/grants/welcome"
    assert (gift.amount.nanos, gift.remaining.nanos, gift.description) == (100, 100, "why")
    assert paid.kind == ledger_pb2.GRANT_KIND_TOP_UP
    assert [(item.kind, item.amount.nanos, item.grant) for item in await entries(billing)] == [
        (ledger_pb2.ENTRY_KIND_GRANT, 100, "accounts/acme/grants/welcome"),
        (ledger_pb2.ENTRY_KIND_TOP_UP, 50, "accounts/acme/grants/order-7"),
    ]
    assert await billing.balance() == (150, 0, 150)


async def test_priority_that_is_not_said_is_that_of_other_grants(billing: Billing) -> None:
    await billing.open_account()

    silent = await create(billing, ledger_pb2.Grant(amount=usd(1)), "silent")
    first = await create(billing, ledger_pb2.Grant(amount=usd(1), priority=0), "first")

    assert (silent.priority, first.priority) == (50, 0)


async def test_repeated_grant_is_given_once(billing: Billing) -> None:
    await billing.open_account()
    grant = ledger_pb2.Grant(
        amount=usd(100), priority=50, expire_time=await in_s(billing, 60), description="why"
    )
    first = await create(billing, grant, "g")
    await spend(billing, "s", 30)
    await billing.pass_lease_time(61)

    again = await create(billing, grant, "g")

    assert (again.name, again.create_time, again.amount) == (
        first.name,
        first.create_time,
        first.amount,
    )
    with pytest.raises(AlreadyExists):
        await give(billing, "g", 101)


async def test_charges_use_grants_up_by_priority_then_expiry_then_age(billing: Billing) -> None:
    await billing.open_account()
    await give(billing, "never", 10)
    await give(billing, "late", 10, life_s=7200)
    await give(billing, "soon", 10, life_s=3600)
    await give(billing, "last", 10, priority=90, life_s=60)
    await give(billing, "first", 10, priority=0)
    await give(billing, "never-younger", 10)

    order = ["first", "soon", "late", "never", "never-younger", "last"]
    assert [name for name, _ in await listed(billing)] == order
    await spend(billing, "s1", 25)

    assert await listed(billing) == [
        ("late", 5),
        ("never", 10),
        ("never-younger", 10),
        ("last", 10),
    ]
    assert await listed(billing, page_size=1, show_all=True) == [
        ("late", 5),
        ("never", 10),
        ("never-younger", 10),
        ("last", 10),
        ("first", 0),
        ("soon", 0),
    ]
    await billing.post(-12, kind=ADJUSTMENT)
    assert (await listed(billing))[0] == ("never", 3)


async def test_expired_grant_cannot_be_set_aside_from_its_moment_on(billing: Billing) -> None:
    await billing.open_account()
    await give(billing, "kept", 40)
    await give(billing, "short", 100, life_s=60)
    await billing.pass_lease_time(61)

    assert await billing.balance() == (140, 0, 40)
    assert await listed(billing) == [("kept", 40)]
    with pytest.raises(FailedPrecondition) as caught:
        await billing.acquire("s1", 41, required=41)
    assert caught.value.reason is Reason.INSUFFICIENT_CREDIT
    assert await billing.acquire("s2", 100) == 40
    assert await billing.balance() == (40, 40, 0)


async def test_sweeper_takes_back_what_nobody_touches(billing: Billing) -> None:
    await billing.open_account()
    await give(billing, "short", 100, life_s=60)
    await spend(billing, "s1", 30)
    await billing.pass_lease_time(61)

    await billing.sweep()
    await billing.sweep()

    last = (await entries(billing))[-1]
    assert last.kind == ledger_pb2.ENTRY_KIND_EXPIRY
    assert (last.amount.nanos, last.grant) == (-70, "accounts/acme/grants/short")
    assert len(await entries(billing)) == 3
    assert await billing.balance() == (0, 0, 0)
    funding = await billing.connection.fetchval(
        "SELECT sum(amount)::bigint FROM ledger_entry WHERE account_id = 'system-funding'"
    )
    assert funding == -30


async def test_grants_expire_by_themselves(billing: Billing) -> None:
    await billing.open_account(10)
    await give(billing, "short", 100, life_s=60)
    await billing.pass_lease_time(61)

    async with asyncio.timeout(5):
        while (await billing.balance())[0] != 10:
            billing.clock.advance(5)
            await asyncio.sleep(0.01)

    assert (await entries(billing))[-1].kind == ledger_pb2.ENTRY_KIND_EXPIRY


async def test_sweeper_takes_many_accounts_in_rounds(billing: Billing) -> None:
    await billing.connection.execute(
        """
        INSERT INTO account
        SELECT 'many-' || n, '', 'USD', now() FROM generate_series(1, 450) AS n;
        INSERT INTO balance (account_id, posted, next_expire_time)
        SELECT 'many-' || n, 5, '2026-01-01T00:00:00Z' FROM generate_series(1, 450) AS n;
        INSERT INTO ledger_entry
        SELECT 2 * n - 1, 'many-' || n, 2 * n - 1, 5, 'grant', 'r', '', now(), 'g'
          FROM generate_series(1, 450) AS n;
        INSERT INTO ledger_entry
        SELECT 2 * n, 'system-funding', 2 * n - 1, -5, 'grant', 'r', '', now()
          FROM generate_series(1, 450) AS n;
        UPDATE ledger_head SET entry_count = 900;
        INSERT INTO credit_grant
        SELECT 'many-' || n, 'g', 2 * n - 1, 'gift', 5, 5, 50, '2026-01-01T00:00:00Z', now(), ''
          FROM generate_series(1, 450) AS n;
        """
    )

    await billing.sweep()

    left = await billing.connection.fetchval("SELECT sum(posted)::bigint FROM balance")
    assert left == 0


async def test_what_a_slice_holds_when_its_grant_expires_can_still_be_spent(
    billing: Billing,
) -> None:
    await billing.open_account()
    await give(billing, "short", 100, life_s=30)
    await billing.acquire("s1", 60)
    await billing.pass_lease_time(31)
    await billing.sweep()

    # What nobody held is gone, the rest is not available to anybody else.
    assert await billing.balance() == (60, 60, 0)
    await give(billing, "new", 10)
    assert await billing.acquire("s2", 100) == 10
    await billing.settle(settlement("gen_1", slice_id="s1", tokens=25))
    assert await billing.balance() == (45, 45, 0)

    # What it did not spend goes when it closes, before anybody can set it aside.
    await billing.close("s1")
    assert await billing.balance() == (45, 10, 0)
    assert await billing.acquire("s3", 100) == 0
    assert await billing.balance() == (10, 10, 0)
    expired = [
        item.amount.nanos
        for item in await entries(billing)
        if item.kind == ledger_pb2.ENTRY_KIND_EXPIRY
    ]
    assert expired == [-40, -35]


async def test_money_of_a_younger_slice_does_not_keep_an_expired_grant(billing: Billing) -> None:
    await billing.open_account(50)
    await give(billing, "short", 100, priority=0, life_s=30)
    await billing.acquire("s1", 20)
    await billing.pass_lease_time(31)
    assert await billing.acquire("s2", 50) == 50

    await billing.close("s1")
    await billing.sweep()

    assert await billing.balance() == (50, 50, 0)
    assert [remaining for _, remaining in await listed(billing)] == [50]


async def test_account_with_a_credit_limit_spends_below_zero(billing: Billing) -> None:
    await billing.open_account(30)

    account = await limit_credit(billing, 100)

    assert account.credit_limit.nanos == 100
    assert await billing.balance() == (30, 0, 130)
    await spend(billing, "s1", 90)
    assert await billing.balance() == (-60, 0, 40)
    with pytest.raises(FailedPrecondition):
        await billing.acquire("s2", 41, required=41)


async def test_new_money_fills_what_is_owed_first(billing: Billing) -> None:
    await billing.open_account()
    await limit_credit(billing, 100)
    await spend(billing, "s1", 60)

    part = await give(billing, "part", 40, life_s=60)
    rest = await give(billing, "rest", 50, life_s=60)

    assert (part.remaining.nanos, rest.remaining.nanos) == (0, 30)
    await billing.pass_lease_time(61)
    await billing.sweep()
    assert await billing.balance() == (0, 0, 100)


async def test_limit_below_what_is_used_stops_new_slices_and_nothing_else(
    billing: Billing,
) -> None:
    await billing.open_account()
    await limit_credit(billing, 100)
    await billing.acquire("s1", 50)
    await spend(billing, "s2", 30)

    await limit_credit(billing, 20)

    assert await billing.balance() == (-30, 50, 0)
    assert await billing.acquire("s3", 10) == 0
    await billing.settle(settlement("gen_1", slice_id="s1", tokens=50))
    assert await billing.balance() == (-80, 0, 0)
    await billing.post(10)
    await billing.post(70)
    assert await billing.balance() == (0, 0, 20)
    assert await billing.acquire("s4", 100) == 20


async def test_limit_that_is_lowered_cannot_be_crossed_again(billing: Billing) -> None:
    """The floor in the table comes up with the account, so that no code could take it down."""
    await billing.open_account()
    await limit_credit(billing, 100)
    await spend(billing, "s1", 80)
    await limit_credit(billing, 20)
    await billing.post(50)

    assert await billing.connection.fetchval("SELECT floor FROM balance") == -30
    await billing.post(50)
    assert await billing.connection.fetchval("SELECT floor FROM balance") == -20


@pytest.mark.parametrize(
    ("grant_id", "grant", "field"),
    [
        ("entry-7", ledger_pb2.Grant(amount=usd(1)), "grant_id"),
        ("a/b", ledger_pb2.Grant(amount=usd(1)), "grant_id"),
        ("g", ledger_pb2.Grant(), "grant.amount"),
        ("g", ledger_pb2.Grant(amount=usd(0)), "grant.amount.nanos"),
        ("g", ledger_pb2.Grant(amount=usd(-1)), "grant.amount.nanos"),
        ("g", ledger_pb2.Grant(amount=usd(2**63 - 1)), "grant.amount.nanos"),
        ("g", ledger_pb2.Grant(amount=usd(1), priority=101), "grant.priority"),
        ("g", ledger_pb2.Grant(amount=usd(1), expire_time=Timestamp()), "grant.expire_time"),
        ("g", ledger_pb2.Grant(amount=usd(1), description="a\0"), "grant.description"),
    ],
)
async def test_bad_grant_is_refused_by_its_field(
    billing: Billing, grant_id: str, grant: ledger_pb2.Grant, field: str
) -> None:
    await billing.open_account(1)

    with pytest.raises(InvalidArgument) as caught:
        await create(billing, grant, grant_id)

    assert [item.field for item in caught.value.violations] == [field]
    assert await billing.balance() == (1, 0, 1)


async def test_grants_of_accounts_that_are_not_there_or_the_ledgers_own_are_refused(
    billing: Billing,
) -> None:
    with pytest.raises(NotFound):
        await give(billing, "g", 1, account="accounts/nobody")
    with pytest.raises(InvalidArgument):
        await give(billing, "g", 1, account="accounts/system-revenue")


async def test_grant_with_the_id_of_a_request_is_refused_and_the_other_way_round(
    billing: Billing,
) -> None:
    await billing.open_account()
    await billing.post(5, request_id="one")
    await give(billing, "two", 5)

    with pytest.raises(AlreadyExists):
        await give(billing, "one", 5)
    with pytest.raises(InvalidArgument) as caught:
        await billing.post(5, request_id="two", description="why")
    assert caught.value.reason is Reason.REQUEST_ID_REUSED


@pytest.mark.parametrize(("nanos", "field"), [(-1, "nanos"), (2**63 - 1, "nanos")])
async def test_bad_credit_limit_is_refused(billing: Billing, nanos: int, field: str) -> None:
    await billing.open_account(1)

    with pytest.raises(InvalidArgument) as caught:
        await limit_credit(billing, nanos)

    assert [item.field for item in caught.value.violations] == [f"credit_limit.{field}"]


@pytest.mark.parametrize("account", ["accounts/nobody", "accounts/system-funding", "nobody"])
async def test_credit_limit_of_no_customer_is_refused(billing: Billing, account: str) -> None:
    request = account_pb.SetCreditLimitRequest(account=account, credit_limit=usd(1))

    with pytest.raises((NotFound, InvalidArgument)):
        await billing.admin.peer.call(billing.admin.accounts.SetCreditLimit, request)


async def test_tenant_sees_its_grants_and_gives_none(billing: Billing) -> None:
    await billing.open_account(7)

    assert [remaining for _, remaining in await listed(billing, client=billing.tenant)] == [7]
    with pytest.raises(NotFound):
        await listed(billing, client=billing.stranger)
    tenant = billing.tenant
    with pytest.raises(PermissionDenied):
        await tenant.peer.call(tenant.accounts.CreateGrant, account_pb.CreateGrantRequest())
    with pytest.raises(PermissionDenied):
        await tenant.peer.call(tenant.accounts.SetCreditLimit, account_pb.SetCreditLimitRequest())
    with pytest.raises(PermissionDenied):
        await tenant.peer.call(tenant.accounts.RefundUsage, account_pb.RefundUsageRequest())


@pytest.mark.parametrize(
    "key", ["x", "0.1.2", "0.50.-.x", "0.50.999999999999999999.1", "0.5.1.2.3"]
)
async def test_page_token_that_nobody_made_is_refused(billing: Billing, key: str) -> None:
    await billing.open_account(7)
    token = base64.urlsafe_b64encode(key.encode()).rstrip(b"=").decode()

    with pytest.raises(InvalidArgument) as caught:
        await billing.admin.peer.call(
            billing.admin.accounts.ListGrants,
            account_pb.ListGrantsRequest(parent="accounts/acme", page_token=token),
        )
    assert caught.value.reason is Reason.BAD_PAGE_TOKEN


async def test_racing_slices_never_set_expired_money_aside(billing: Billing) -> None:
    """The moment of expiry lies somewhere between them; what they hold is what there was."""
    await billing.open_account(20)
    await give(billing, "short", 100, life_s=30)
    await billing.acquire("before", 30)
    await billing.pass_lease_time(31)

    async with running(billing.dsn) as other:
        granted = await asyncio.gather(
            *((billing, other)[index % 2].acquire(f"s{index}", 9) for index in range(12))
        )

    assert sum(granted) == 20
    assert await billing.balance() == (50, 50, 0)
