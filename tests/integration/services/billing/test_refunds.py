"""Refunds: charges that are given back, as entries and grants of their own."""

from __future__ import annotations

import asyncio

import pytest
from maas.billing.v1 import account_service_pb2 as account_pb
from maas.billing.v1 import ledger_pb2

from libs.errors import FailedPrecondition, InvalidArgument, NotFound, Reason
from tests.integration.services.billing.world import Billing, settlement, usd

RECORD = "accounts/acme/usageRecords/gen_1"


async def refund(
    billing: Billing,
    nanos: int | None = None,
    *,
    request_id: str = "r",
    record: str = RECORD,
    description: str = "",
) -> ledger_pb2.LedgerEntry:
    response = await billing.admin.peer.call(
        billing.admin.accounts.RefundUsage,
        account_pb.RefundUsageRequest(
            usage_record=record,
            amount=None if nanos is None else usd(nanos),
            request_id=request_id,
            description=description,
        ),
    )
    return response.entry


async def charge(billing: Billing, nanos: int, *, credit: int = 100) -> None:
    """An account that was charged for gen_1."""
    await billing.open_account(credit)
    await billing.acquire("s1", credit)
    await billing.settle(settlement("gen_1", slice_id="s1", tokens=nanos))
    await billing.close("s1")


async def refunded(billing: Billing) -> tuple[int, int]:
    """Charge and refunds of the one record."""
    (record,) = await billing.records()
    return record.charge.nanos, record.refunded.nanos


async def test_refund_gives_the_charge_back_and_leaves_its_entries(billing: Billing) -> None:
    await charge(billing, 60)
    before = await billing.connection.fetch("SELECT * FROM ledger_entry ORDER BY number")

    entry = await refund(billing, description="sorry")

    assert (entry.kind, entry.amount.nanos) == (ledger_pb2.ENTRY_KIND_REFUND, 60)
    assert (entry.source, entry.description) == ("r", "sorry")
    assert await billing.balance() == (100, 0, 100)
    assert await refunded(billing) == (60, 60)
    after = await billing.connection.fetch("SELECT * FROM ledger_entry ORDER BY number")
    assert after[: len(before)] == before
    assert [(row["account_id"], row["amount"]) for row in after[len(before) :]] == [
        ("acme", 60),
        ("system-revenue", -60),
    ]
    grants = await billing.tenant.peer.call(
        billing.tenant.accounts.ListGrants, account_pb.ListGrantsRequest()
    )
    assert entry.grant in {grant.name for grant in grants.grants}


async def test_refunds_of_a_charge_never_sum_to_more(billing: Billing) -> None:
    await charge(billing, 60)
    await refund(billing, 25, request_id="r1")

    with pytest.raises(InvalidArgument) as caught:
        await refund(billing, 36, request_id="r2")
    assert [item.field for item in caught.value.violations] == ["amount.nanos"]
    await refund(billing, request_id="r3")

    assert await refunded(billing) == (60, 60)
    with pytest.raises(FailedPrecondition) as over:
        await refund(billing, request_id="r4")
    assert over.value.reason is Reason.WRONG_STATE
    assert await billing.balance() == (100, 0, 100)


async def test_refund_of_what_was_partly_bad_debt_gives_back_what_was_taken(
    billing: Billing,
) -> None:
    await charge(billing, 130)
    assert await billing.balance() == (0, 0, 0)

    await refund(billing)

    assert await refunded(billing) == (100, 100)
    assert await billing.balance() == (100, 0, 100)


async def test_repeated_refund_is_given_once(billing: Billing) -> None:
    await charge(billing, 60)
    first = await refund(billing, 20)

    assert await refund(billing, 20) == first
    whole = await refund(billing, request_id="rest")
    assert await refund(billing, request_id="rest") == whole
    for nanos, description in ((21, ""), (20, "x")):
        with pytest.raises(InvalidArgument) as caught:
            await refund(billing, nanos, description=description)
        assert caught.value.reason is Reason.REQUEST_ID_REUSED
    assert await billing.balance() == (100, 0, 100)


async def test_racing_refunds_give_back_no_more_than_the_charge(billing: Billing) -> None:
    await charge(billing, 60)

    results = await asyncio.gather(
        *(refund(billing, 25, request_id=f"r{index}") for index in range(6)),
        return_exceptions=True,
    )

    assert sum(not isinstance(item, BaseException) for item in results) == 2
    assert await refunded(billing) == (60, 50)


async def test_refund_fills_what_the_account_owes(billing: Billing) -> None:
    await charge(billing, 60)
    await billing.admin.peer.call(
        billing.admin.accounts.SetCreditLimit,
        account_pb.SetCreditLimitRequest(account="accounts/acme", credit_limit=usd(100)),
    )
    await billing.acquire("s2", 140)
    await billing.settle(settlement("gen_2", slice_id="s2", tokens=90))
    await billing.close("s2")

    await refund(billing)

    assert await billing.balance() == (10, 0, 110)


@pytest.mark.parametrize(
    "record",
    [
        "accounts/acme/usageRecords/gen_9",
        "accounts/other/usageRecords/gen_1",
        "accounts/nobody/usageRecords/gen_1",
    ],
)
async def test_refund_of_a_record_that_is_not_there_is_refused(
    billing: Billing, record: str
) -> None:
    await charge(billing, 60)
    await billing.open_account(account_id="other")

    with pytest.raises(NotFound):
        await refund(billing, record=record)


@pytest.mark.parametrize(
    ("record", "nanos", "field"),
    [
        ("gen_1", None, "usage_record"),
        ("accounts/acme/usageRecords/", None, "usage_record"),
        ("accounts/system-revenue/usageRecords/gen_1", None, "usage_record"),
        (RECORD, 0, "amount.nanos"),
        (RECORD, -1, "amount.nanos"),
    ],
)
async def test_bad_refund_is_refused_by_its_field(
    billing: Billing, record: str, nanos: int | None, field: str
) -> None:
    await charge(billing, 60)

    with pytest.raises(InvalidArgument) as caught:
        await refund(billing, nanos, record=record)

    assert [item.field for item in caught.value.violations] == [field]


async def test_nothing_is_given_back_of_what_was_not_charged(billing: Billing) -> None:
    await billing.open_account(100)
    await billing.settle(
        settlement("gen_1", slice_id="s1", end_cause=ledger_pb2.END_CAUSE_WORKER_LOST)
    )

    with pytest.raises(FailedPrecondition):
        await refund(billing)
