"""Rows and events of what moves an account's money beside usage."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime

import pytest
from maas.billing.v1 import ledger_pb2
from maas.common.v1 import money_pb2

from tools.export import focus, movements

# FOCUS 1.2: what may be null where the category is neither Usage nor Purchase.
MAY_BE_NULL = {
    "BillingAccountName",
    "ChargeClass",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedUnitPrice",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "SkuId",
    "SkuMeter",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "Tags",
}


def entry(
    kind: ledger_pb2.EntryKind.ValueType, nanos: int, description: str = ""
) -> ledger_pb2.LedgerEntry:
    found = ledger_pb2.LedgerEntry(
        name="accounts/acme/ledgerEntries/7",
        account="accounts/acme",
        transaction_id="7",
        amount=money_pb2.Money(currency_code="USD", nanos=nanos),
        kind=kind,
        source="=request",
        description=description,
        grant="accounts/acme/grants/entry-7",
    )
    found.create_time.FromDatetime(datetime(2028, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC))
    return found


def row_of(item: ledger_pb2.LedgerEntry) -> dict[str, str]:
    line = movements.focus_line_of(item, customer="Acme", provider="Us")
    (row,) = csv.DictReader(io.StringIO(focus.header() + line, newline=""))
    return row


@pytest.mark.parametrize(
    ("kind", "nanos", "category", "cost"),
    [
        (ledger_pb2.ENTRY_KIND_GRANT, 5, "Credit", "-0.000000005"),
        (ledger_pb2.ENTRY_KIND_TOP_UP, 10**9, "Adjustment", "-1"),
        (ledger_pb2.ENTRY_KIND_REFUND, 2**63 - 1, "Credit", "-9223372036.854775807"),
        (ledger_pb2.ENTRY_KIND_ADJUSTMENT, -3, "Adjustment", "0.000000003"),
        (ledger_pb2.ENTRY_KIND_EXPIRY, -5, "Credit", "0.000000005"),
        (99, 5, "Adjustment", "-0.000000005"),
    ],
)
def test_row_costs_what_the_account_lost(
    kind: ledger_pb2.EntryKind.ValueType, nanos: int, category: str, cost: str
) -> None:
    row = row_of(entry(kind, nanos))

    costs = {row[f"{name}Cost"] for name in ("Billed", "Contracted", "Effective", "List")}
    assert (row["ChargeCategory"], costs) == (category, {cost})
    assert (row["ChargeFrequency"], row["ChargeClass"]) == ("One-Time", "")
    # Of usage alone.
    own = {name for name in row if name.startswith("x_")}
    missing = {name for name, value in row.items() if not value} - own
    assert missing <= MAY_BE_NULL
    assert row["x_LedgerEntry"] == "accounts/acme/ledgerEntries/7"


def test_row_is_of_the_moment_and_the_month_in_which_money_moved() -> None:
    row = row_of(entry(ledger_pb2.ENTRY_KIND_REFUND, 5, "=1+1, sorry"))

    wanted = {
        "BillingPeriodStart": "2028-02-01T00:00:00Z",
        "BillingPeriodEnd": "2028-03-01T00:00:00Z",
        "ChargePeriodStart": "2028-02-29T23:59:59Z",
        "ChargePeriodEnd": "2028-03-01T00:00:00Z",
        "ChargeDescription": "'=1+1, sorry",
        "x_RequestId": "'=request",
        "x_EntryKind": "REFUND",
    }
    assert {name: row[name] for name in wanted} == wanted
    assert row_of(entry(ledger_pb2.ENTRY_KIND_REFUND, 5))["ChargeDescription"] == "Refund"


def test_event_says_what_the_ledger_says() -> None:
    item = entry(ledger_pb2.ENTRY_KIND_REFUND, 2**63 - 1, "line\nline")

    event = json.loads(movements.event_line_of(item, source="/us"))

    assert event["type"] == "maas.ledger.posted.v1"
    assert (event["source"], event["id"], event["subject"]) == ("/us", "entry_7", "accounts/acme")
    assert event["data"] == {
        "entry": "accounts/acme/ledgerEntries/7",
        "transaction_id": "7",
        "kind": "REFUND",
        "amount_nanos": "9223372036854775807",
        "amount": "9223372036.854775807",
        "currency": "USD",
        "grant": "accounts/acme/grants/entry-7",
        "request_id": "=request",
        "description": "line\nline",
    }
