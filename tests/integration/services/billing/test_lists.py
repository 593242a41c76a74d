"""Lists: who sees what, and that pages neither skip nor repeat while others write."""

from __future__ import annotations

import asyncio

import pytest
from maas.billing.v1 import account_service_pb2 as account_pb
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import usage_service_pb2 as usage_pb

from libs.errors import InvalidArgument, NotFound, Reason
from tests.integration.services.billing.world import Billing, Client, running, settlement


async def entries(
    caller: Client, parent: str, page_size: int = 0, token: str = ""
) -> account_pb.ListLedgerEntriesResponse:
    return await caller.peer.call(
        caller.accounts.ListLedgerEntries,
        account_pb.ListLedgerEntriesRequest(parent=parent, page_size=page_size, page_token=token),
    )


async def all_entries(caller: Client, parent: str, page_size: int) -> list[ledger_pb2.LedgerEntry]:
    found: list[ledger_pb2.LedgerEntry] = []
    token = ""
    while True:
        page = await entries(caller, parent, page_size, token)
        found += page.entries
        token = page.next_page_token
        if not token:
            return found


async def records(
    caller: Client, parent: str = "", *, token: str = "", page_size: int = 0, generation: str = ""
) -> usage_pb.ListUsageRecordsResponse:
    return await caller.peer.call(
        caller.usage.ListUsageRecords,
        usage_pb.ListUsageRecordsRequest(
            parent=parent, page_token=token, page_size=page_size, generation_id=generation
        ),
    )


async def spend(billing: Billing, count: int) -> None:
    """Settles that many generations of 1 nano on acme, in three batches."""
    await billing.open_account(1000)
    await billing.acquire("s1", 1000)
    for start in range(3):
        await billing.settle(
            *(settlement(f"gen_{number}", slice_id="s1") for number in range(start, count, 3))
        )


async def test_entries_of_all_accounts_sum_to_zero(billing: Billing) -> None:
    await spend(billing, 10)

    found = await all_entries(billing.admin, "accounts/-", 3)

    assert len(found) == 2 + 20
    assert sum(entry.amount.nanos for entry in found) == 0
    assert {entry.account for entry in found} == {
        "accounts/acme",
        "accounts/system-funding",
        "accounts/system-revenue",
    }
    by_transaction: dict[str, int] = {}
    for entry in found:
        by_transaction.setdefault(entry.transaction_id, 0)
        by_transaction[entry.transaction_id] += entry.amount.nanos
    assert len(by_transaction) == 11
    assert set(by_transaction.values()) == {0}


async def test_entries_of_an_account_come_oldest_first(billing: Billing) -> None:
    await spend(billing, 7)

    found = await all_entries(billing.tenant, "accounts/acme", 2)

    assert [entry.amount.nanos for entry in found] == [1000] + [-1] * 7
    assert found[0].kind == ledger_pb2.ENTRY_KIND_GRANT
    assert found[1].kind == ledger_pb2.ENTRY_KIND_USAGE
    assert found[1].source == "gen_0"
    numbers = [int(entry.name.rpartition("/")[2]) for entry in found]
    assert numbers == sorted(numbers)


async def test_entries_of_the_ledgers_own_accounts(billing: Billing) -> None:
    await spend(billing, 3)

    found = await all_entries(billing.admin, "accounts/system-revenue", 2)

    assert [entry.amount.nanos for entry in found] == [1, 1, 1]


@pytest.mark.parametrize("parent", ["accounts/-", "accounts/other", "accounts/system-revenue"])
async def test_tenant_lists_entries_of_its_own_account_only(billing: Billing, parent: str) -> None:
    await spend(billing, 3)
    await billing.open_account(0, "other")

    with pytest.raises(NotFound) as caught:
        await entries(billing.tenant, parent)

    assert str(caught.value) == f"{parent} not found"


async def test_records_come_in_order_of_settlement(billing: Billing) -> None:
    await spend(billing, 7)

    found: list[str] = []
    token = ""
    while True:
        page = await records(billing.tenant, token=token, page_size=2)
        found += [record.generation_id for record in page.usage_records]
        token = page.next_page_token
        if not token:
            break

    assert found == [f"gen_{number}" for number in (0, 3, 6, 1, 4, 2, 5)]


async def test_record_of_one_generation(billing: Billing) -> None:
    await spend(billing, 3)

    found = await records(billing.tenant, generation="gen_1")
    missing = await records(billing.tenant, generation="gen_none")

    assert [record.generation_id for record in found.usage_records] == ["gen_1"]
    assert list(missing.usage_records) == []


async def test_record_of_another_account_stays_hidden(billing: Billing) -> None:
    await spend(billing, 3)
    await billing.open_account(0, "other")

    assert not (await records(billing.stranger, generation="gen_1")).usage_records
    with pytest.raises(NotFound):
        await records(billing.stranger, "accounts/acme", generation="gen_1")
    with pytest.raises(NotFound):
        await records(billing.tenant, "accounts/other")
    with pytest.raises(NotFound):
        await records(billing.admin, "accounts/nobody")


@pytest.mark.parametrize("token", ["!", "bm8", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5", "LTE"])
async def test_page_tokens_that_are_not_ours(billing: Billing, token: str) -> None:
    """No base64; "no"; a number beyond 64 bits; "-1"."""
    await billing.open_account(1000)

    with pytest.raises(InvalidArgument) as caught:
        await entries(billing.tenant, "accounts/acme", token=token)
    assert caught.value.reason is Reason.BAD_PAGE_TOKEN
    with pytest.raises(InvalidArgument) as caught:
        await records(billing.tenant, token=token)
    assert caught.value.reason is Reason.BAD_PAGE_TOKEN


async def test_pages_skip_nothing_while_others_write(billing: Billing) -> None:
    """Writers on two replicas; a reader that follows the ledger page by page.

    Each walk sees whole movements only, and what all walks see together is the ledger.
    """
    for number in range(4):
        await billing.open_account(10_000, f"acme-{number}")
        await billing.acquire(f"s{number}", 10_000, account=f"accounts/acme-{number}")
    is_over = asyncio.Event()

    async def write(writer: Billing, number: int) -> None:
        for batch in range(15):
            await writer.settle(
                *(
                    settlement(
                        f"gen_{number}_{batch}_{index}",
                        slice_id=f"s{number}",
                        account=f"accounts/acme-{number}",
                    )
                    for index in range(5)
                )
            )

    async def read() -> list[str]:
        seen: list[str] = []
        total = 0
        token = ""
        while True:
            was_over = is_over.is_set()
            page = await entries(billing.admin, "accounts/-", 7, token)
            seen += [entry.name for entry in page.entries]
            total += sum(entry.amount.nanos for entry in page.entries)
            if page.next_page_token:
                token = page.next_page_token
                continue
            assert total == 0
            if was_over:
                return seen
            # The end for now: start this page anew, from behind the last token.
            for entry in page.entries:
                total -= entry.amount.nanos
                seen.pop()

    async with running(billing.dsn, connections_max=2) as replica:
        reader = asyncio.ensure_future(read())
        writers = [billing, replica, billing, replica]
        await asyncio.gather(*(write(writer, number) for number, writer in enumerate(writers)))
        is_over.set()
        seen = await reader

    numbers = [int(name.rpartition("/")[2]) for name in seen]
    assert numbers == list(range(1, 4 * 2 + 4 * 15 * 5 * 2 + 1))
