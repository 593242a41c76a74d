from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from maas.billing.v1 import ledger_pb2
from maas.common.v1 import money_pb2

from libs.units import Rates
from tools.export import focus

# The columns with feature level Mandatory in FOCUS 1.2.
MANDATORY = {
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ContractedCost",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ServiceCategory",
    "ServiceName",
}
MAY_BE_NULL = {
    "BillingAccountName",
    "ChargeClass",
    "Tags",
    "x_EndUser",
    "x_RequestId",
    "x_LedgerEntry",
    "x_EntryKind",
}
PRICES = st.one_of(st.just(0), st.integers(0, 10**10), st.integers(10**14, 10**15))
COUNTS = st.one_of(st.integers(0, 3), st.integers(0, 10**6), st.just(2**32))


def usd(nanos: int) -> money_pb2.Money:
    return money_pb2.Money(currency_code="USD", nanos=nanos)


@st.composite
def charges(draw: st.DrawFn) -> tuple[ledger_pb2.UsageRecord, ledger_pb2.Price]:
    """A record, charged as billing charges it, and its price; sometimes less was there to take."""
    rates = Rates(
        input_price=draw(PRICES),
        output_price=draw(PRICES),
        reasoning_price=draw(st.none() | PRICES),
        request_price=draw(PRICES),
        background_discount_percent=draw(st.integers(0, 100)),
    )
    cached_price = draw(st.none() | st.integers(0, rates.input_price))
    price = ledger_pb2.Price(
        name="prices/p",
        input_price_per_million=usd(rates.input_price),
        output_price_per_million=usd(rates.output_price),
        request_price=usd(rates.request_price),
        background_discount_percent=rates.background_discount_percent,
    )
    if cached_price is not None:
        price.cached_input_price_per_million.CopyFrom(usd(cached_price))
    if rates.reasoning_price is not None:
        price.reasoning_price_per_million.CopyFrom(usd(rates.reasoning_price))
    record = ledger_pb2.UsageRecord(
        name="accounts/acme/usageRecords/gen_1",
        generation_id="gen_1",
        offering="offerings/tiny",
        project="projects/demo",
        price="prices/p",
        background=draw(st.booleans()),
        end_cause=draw(st.sampled_from([value for value in ledger_pb2.EndCause.values() if value])),
    )
    usage = record.usage
    usage.input_tokens, usage.output_tokens = draw(COUNTS), draw(COUNTS)
    usage.cached_input_tokens = draw(st.integers(0, usage.input_tokens))
    usage.reasoning_tokens = draw(st.integers(0, usage.output_tokens))
    exact = Rates(
        input_price=rates.input_price,
        output_price=rates.output_price,
        cached_input_price=cached_price,
        reasoning_price=rates.reasoning_price,
        request_price=rates.request_price,
        background_discount_percent=rates.background_discount_percent,
    ).charge(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_input_tokens=usage.cached_input_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        is_background=record.background,
    )
    charged = exact if record.end_cause <= ledger_pb2.END_CAUSE_REVOKED else 0
    record.charge.CopyFrom(usd(min(charged, draw(st.sampled_from([2**63 - 1, exact // 2])))))
    return record, price


def rows_of(record: ledger_pb2.UsageRecord, price: ledger_pb2.Price) -> list[dict[str, str]]:
    text = focus.header() + focus.lines_of(record, price, customer="Acme", provider="Us")
    return list(csv.DictReader(io.StringIO(text, newline="")))


@given(charges())
def test_rows_of_a_record_sum_to_its_charge_exactly(
    charge: tuple[ledger_pb2.UsageRecord, ledger_pb2.Price],
) -> None:
    record, price = charge

    rows = rows_of(record, price)

    billed = [Decimal(row["BilledCost"]) for row in rows]
    assert sum(billed) == Decimal(record.charge.nanos).scaleb(-9)
    assert min(billed) >= 0
    assert [row["EffectiveCost"] for row in rows] == [row["BilledCost"] for row in rows]
    tokens = [int(row["ConsumedQuantity"]) for row in rows if row["ConsumedUnit"] == "Tokens"]
    assert sum(tokens) == record.usage.input_tokens + record.usage.output_tokens


@given(charges())
def test_costs_are_the_products_that_the_specification_demands(
    charge: tuple[ledger_pb2.UsageRecord, ledger_pb2.Price],
) -> None:
    for row in rows_of(*charge):
        quantity = Decimal(row["PricingQuantity"])
        assert Decimal(row["ListCost"]) == quantity * Decimal(row["ListUnitPrice"])
        assert Decimal(row["ContractedCost"]) == quantity * Decimal(row["ContractedUnitPrice"])
        # Rounded up, or less where the account had no more.
        nanos = (Decimal(row["BilledCost"]) - Decimal(row["ContractedCost"])).scaleb(9)
        assert nanos <= 1
        assert "E" not in "".join(row[name] for name in ("ListCost", "BilledCost"))


def example() -> tuple[ledger_pb2.UsageRecord, ledger_pb2.Price]:
    record = ledger_pb2.UsageRecord(
        name="accounts/acme/usageRecords/gen_1",
        generation_id="gen_1",
        project="projects/demo",
        api_key="apiKeys/k",
        offering="offerings/tiny",
        model_version="models/m/versions/1",
        price="prices/p",
        end_cause=ledger_pb2.END_CAUSE_COMPLETED,
        labels={"b": 'x,"y"\n', "a": "é"},
        charge=usd(450_001),
    )
    record.usage.input_tokens, record.usage.output_tokens = 1000, 500
    for field, time in (
        ("start_time", datetime(2026, 1, 31, 23, 59, 58, 1, tzinfo=UTC)),
        ("end_time", datetime(2026, 1, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        ("settle_time", datetime(2026, 12, 1, tzinfo=UTC)),
    ):
        getattr(record, field).FromDatetime(time)
    price = ledger_pb2.Price(
        input_price_per_million=usd(150_000_000), output_price_per_million=usd(600_000_001)
    )
    return record, price


def test_columns_are_complete() -> None:
    record, price = example()

    rows = rows_of(record, price)

    assert set(focus.COLUMNS) >= MANDATORY
    own = [name.startswith("x_") for name in focus.COLUMNS]
    assert own == sorted(own)
    for row in rows:
        assert {name for name, value in row.items() if not value} <= MAY_BE_NULL
        assert None not in row


def test_rows_say_what_was_used_at_which_price() -> None:
    record, price = example()

    first, second = rows_of(record, price)

    wanted = {
        "BilledCost": "0.00015",
        "BillingPeriodStart": "2026-12-01T00:00:00Z",
        "BillingPeriodEnd": "2027-01-01T00:00:00Z",
        "ChargePeriodStart": "2026-01-31T23:59:58Z",
        "ChargePeriodEnd": "2026-02-01T00:00:00Z",
        "ConsumedQuantity": "1000",
        "PricingQuantity": "0.001",
        "PricingUnit": "1000000 Tokens",
        "ListUnitPrice": "0.15",
        "SkuPriceId": "prices/p/input",
        "Tags": '{"a":"é","b":"x,\\"y\\"\\n"}',
    }
    assert {name: first[name] for name in wanted} == wanted
    assert (second["SkuMeter"], second["BilledCost"]) == ("Output Tokens", "0.000300001")


@pytest.mark.parametrize("cause", [ledger_pb2.END_CAUSE_WORKER_LOST, 99])
def test_what_is_not_charged_is_priced_for_nothing(cause: ledger_pb2.EndCause.ValueType) -> None:
    record, price = example()
    record.end_cause = cause
    record.charge.nanos = 0

    first, second = rows_of(record, price)

    assert (first["PricingQuantity"], second["ListCost"], second["BilledCost"]) == ("0", "0", "0")
    assert (first["ConsumedQuantity"], second["ConsumedQuantity"]) == ("1000", "500")


@pytest.mark.parametrize("text", ['=HYPERLINK("h")', "+1", "-1", "@x", "\t=1", "\r=1", "\n=1"])
def test_no_text_of_a_customer_is_a_formula_of_a_spreadsheet(text: str) -> None:
    record, price = example()
    record.end_user = record.request_id = text
    record.labels["a"] = text

    row = rows_of(record, price)[0]

    assert (row["x_EndUser"], row["x_RequestId"]) == (f"'{text}", f"'{text}")
    assert row["Tags"].startswith("{")
    assert json.loads(row["Tags"])["a"] == text
    assert focus.text_cell("user=1") == "user=1"
