"""Accounts, postings and balances through real gRPC and a real PostgreSQL."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from maas.billing.v1 import account_service_pb2 as account_pb
from maas.billing.v1 import ledger_pb2
from maas.common.v1 import money_pb2

from libs.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    MaasError,
    NotFound,
    PermissionDenied,
    Reason,
)
from tests.integration.services.billing.world import Billing, Client, usd

ADJUSTMENT = ledger_pb2.ENTRY_KIND_ADJUSTMENT
GRANT = ledger_pb2.ENTRY_KIND_GRANT
NANOS_MAX = 2**63 - 1


async def create(billing: Billing, account_id: str, display_name: str = "") -> ledger_pb2.Account:
    response = await billing.admin.peer.call(
        billing.admin.accounts.CreateAccount,
        account_pb.CreateAccountRequest(account_id=account_id, display_name=display_name),
    )
    return response.account


async def get(caller: Client, name: str) -> ledger_pb2.Account:
    response = await caller.peer.call(
        caller.accounts.GetAccount, account_pb.GetAccountRequest(name=name)
    )
    return response.account


def fields(error: MaasError) -> list[str]:
    return [item.field for item in error.violations]


async def test_account_starts_at_zero(billing: Billing) -> None:
    account = await create(billing, "acme", "Acme Corp")

    assert account.name == "accounts/acme"
    assert account.display_name == "Acme Corp"
    assert account.currency_code == "USD"
    assert account.create_time.ToDatetime().year == 2026
    assert await billing.balance() == (0, 0, 0)


async def test_creating_an_account_again_returns_it(billing: Billing) -> None:
    first = await create(billing, "acme", "Acme Corp")
    billing.clock.advance(60)

    assert await create(billing, "acme", "Acme Corp") == first


async def test_creating_an_account_with_other_content_is_refused(billing: Billing) -> None:
    await create(billing, "acme", "Acme Corp")

    with pytest.raises(AlreadyExists):
        await create(billing, "acme", "Somebody else")


@pytest.mark.parametrize("account_id", ["system-revenue", "system-mine", "Acme", "-", "a"])
async def test_account_ids_that_are_refused(billing: Billing, account_id: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await create(billing, account_id)

    assert fields(caught.value) == ["account_id"]


async def test_accounts_are_listed_by_name_with_the_ledgers_own(billing: Billing) -> None:
    for account_id in ("zebra", "acme"):
        await create(billing, account_id)

    names: list[str] = []
    token = ""
    while True:
        response = await billing.admin.peer.call(
            billing.admin.accounts.ListAccounts,
            account_pb.ListAccountsRequest(page_size=2, page_token=token),
        )
        names += [account.name for account in response.accounts]
        token = response.next_page_token
        if not token:
            break

    assert names == [
        "accounts/acme",
        "accounts/system-bad-debt",
        "accounts/system-funding",
        "accounts/system-revenue",
        "accounts/zebra",
    ]


async def test_grant_moves_money_from_funding(billing: Billing) -> None:
    await create(billing, "acme")

    entry = await billing.post(500, description="welcome")

    assert entry.name == "accounts/acme/ledgerEntries/1"
    assert entry.amount == usd(500)
    assert entry.kind == GRANT
    assert entry.description == "welcome"
    assert await billing.balance() == (500, 0, 500)
    assert await billing.balance("accounts/system-funding") == (-500, 0, 0)


async def test_adjustment_takes_money_back(billing: Billing) -> None:
    await billing.open_account(500)

    await billing.post(-200, kind=ADJUSTMENT)

    assert await billing.balance() == (300, 0, 300)


async def test_posting_again_returns_the_first_entry(billing: Billing) -> None:
    await create(billing, "acme")

    first = await billing.post(500, request_id="once")
    billing.clock.advance(60)
    again = await billing.post(500, request_id="once")

    assert again == first
    assert await billing.balance() == (500, 0, 500)


async def test_concurrent_repeats_post_once(billing: Billing) -> None:
    await create(billing, "acme")

    entries = await asyncio.gather(*(billing.post(500, request_id="once") for _ in range(8)))

    assert len({entry.name for entry in entries}) == 1
    assert await billing.balance() == (500, 0, 500)


async def test_request_id_with_other_content_is_refused(billing: Billing) -> None:
    await create(billing, "acme")
    await billing.post(500, request_id="once")

    with pytest.raises(InvalidArgument) as caught:
        await billing.post(501, request_id="once")

    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    assert caught.value.metadata == {"requestId": "once"}
    assert await billing.balance() == (500, 0, 500)


async def test_request_ids_of_two_accounts_do_not_meet(billing: Billing) -> None:
    for account_id in ("acme", "other"):
        await create(billing, account_id)
        await billing.post(500, account=f"accounts/{account_id}", request_id="once")

    assert await billing.balance("accounts/other") == (500, 0, 500)


@pytest.mark.parametrize(
    ("nanos", "kind", "field"),
    [
        (0, GRANT, "amount.nanos"),
        (-1, GRANT, "amount.nanos"),
        (0, ADJUSTMENT, "amount.nanos"),
        (-(2**63), ADJUSTMENT, "amount.nanos"),
        (NANOS_MAX, GRANT, "amount.nanos"),
        (1, ledger_pb2.ENTRY_KIND_USAGE, "kind"),
        (1, ledger_pb2.ENTRY_KIND_UNSPECIFIED, "kind"),
    ],
)
async def test_amounts_and_kinds_that_are_refused(
    billing: Billing, nanos: int, kind: ledger_pb2.EntryKind.ValueType, field: str
) -> None:
    await billing.open_account(1)

    with pytest.raises(InvalidArgument) as caught:
        await billing.post(nanos, kind=kind)

    assert fields(caught.value) == [field]
    assert await billing.balance() == (1, 0, 1)


async def test_largest_balance_can_be_reached(billing: Billing) -> None:
    await create(billing, "acme")

    await billing.post(NANOS_MAX)

    assert await billing.balance() == (NANOS_MAX, 0, NANOS_MAX)


async def test_other_currency_is_refused(billing: Billing) -> None:
    await create(billing, "acme")
    request = account_pb.PostEntryRequest(
        account="accounts/acme",
        amount=money_pb2.Money(currency_code="EUR", nanos=1),
        kind=GRANT,
        request_id="euro",
    )

    with pytest.raises(InvalidArgument) as caught:
        await billing.admin.peer.call(billing.admin.accounts.PostEntry, request)

    assert caught.value.reason is Reason.CURRENCY_MISMATCH
    assert caught.value.metadata == {"left": "USD", "right": "EUR"}


async def test_nul_in_a_text_is_refused(billing: Billing) -> None:
    await create(billing, "acme")

    with pytest.raises(InvalidArgument) as caught:
        await billing.post(1, request_id="a\0b")

    assert fields(caught.value) == ["request_id"]


async def test_balance_does_not_fall_below_what_is_held(billing: Billing) -> None:
    await billing.open_account(500)
    await billing.acquire("s1", 400)

    with pytest.raises(FailedPrecondition) as caught:
        await billing.post(-101, kind=ADJUSTMENT)

    assert caught.value.reason is Reason.INSUFFICIENT_CREDIT
    assert caught.value.metadata == {
        "account": "accounts/acme",
        "requiredNanos": "101",
        "availableNanos": "100",
        "currency": "USD",
    }
    assert await billing.balance() == (500, 400, 100)


async def test_unknown_and_system_accounts_cannot_be_posted_to(billing: Billing) -> None:
    with pytest.raises(NotFound):
        await billing.post(1, account="accounts/nobody")
    with pytest.raises(InvalidArgument) as caught:
        await billing.post(1, account="accounts/system-revenue")

    assert fields(caught.value) == ["account"]


async def test_tenant_reaches_its_own_account_only(billing: Billing) -> None:
    """Another's account and one that is not there fail alike, in every word."""
    await create(billing, "other")
    await billing.open_account(500)

    assert (await get(billing.tenant, "accounts/acme")).name == "accounts/acme"
    texts = set()
    for name in ("accounts/other", "accounts/nobody", "accounts/system-revenue"):
        with pytest.raises(NotFound) as caught:
            await get(billing.tenant, name)
        texts.add(str(caught.value).replace(name, "X"))
        with pytest.raises(NotFound) as caught:
            await billing.tenant.peer.call(
                billing.tenant.accounts.GetBalance, account_pb.GetBalanceRequest(account=name)
            )
        texts.add(str(caught.value).replace(name, "X"))
    assert texts == {"X not found"}


async def test_tenant_may_leave_its_account_unnamed(billing: Billing) -> None:
    await billing.open_account(500)

    response = await billing.tenant.peer.call(
        billing.tenant.accounts.GetBalance, account_pb.GetBalanceRequest()
    )

    assert response.account == "accounts/acme"
    assert response.balance.posted.nanos == 500


async def test_tenant_without_an_account_gets_not_found(billing: Billing) -> None:
    with pytest.raises(NotFound) as caught:
        await billing.stranger.peer.call(
            billing.stranger.accounts.GetBalance, account_pb.GetBalanceRequest()
        )

    assert caught.value.metadata == {"resource": "accounts/other"}


async def test_administrator_has_to_name_an_account(billing: Billing) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await billing.balance("")

    assert fields(caught.value) == ["account"]


async def test_tenant_cannot_post(billing: Billing) -> None:
    await billing.open_account(500)
    request = account_pb.PostEntryRequest(
        account="accounts/acme", amount=usd(1), kind=GRANT, request_id="mine"
    )

    with pytest.raises(PermissionDenied):
        await billing.tenant.peer.call(billing.tenant.accounts.PostEntry, request)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM ledger_entry",
        "UPDATE ledger_entry SET amount = 1",
        "TRUNCATE ledger_entry",
        "DELETE FROM usage_record",
        "UPDATE usage_record SET amount = 1",
        "TRUNCATE usage_record",
        "DELETE FROM price",
        "UPDATE price SET input_price = 1",
        "TRUNCATE price",
    ],
)
async def test_what_was_written_cannot_be_changed(billing: Billing, statement: str) -> None:
    """The role owns its tables; a trigger refuses even a statement that would hit no row."""
    with pytest.raises(asyncpg.RestrictViolationError, match="is immutable"):
        await billing.connection.execute(statement)


async def test_balance_of_the_ledger_that_fits_no_64_bits_is_refused(billing: Billing) -> None:
    for account_id in ("acme", "other"):
        await billing.open_account(9 * 10**18, account_id)

    with pytest.raises(FailedPrecondition) as caught:
        await billing.balance("accounts/system-funding")

    assert caught.value.metadata == {
        "resource": "accounts/system-funding",
        "state": "OUT_OF_RANGE",
    }
    assert (await billing.balance())[0] == 9 * 10**18
