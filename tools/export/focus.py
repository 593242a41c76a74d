"""Usage records as FOCUS 1.2, the FinOps Open Cost and Usage Specification: CSV. Pure.

A record has a row for each line of its price that counts: fresh input, cached input, output,
reasoning, the request. Costs:

    ListCost        count * list price, exact
    ContractedCost  the same with the discount of requests in the background, exact
    BilledCost      the line as it was charged, rounded up to a nano; EffectiveCost likewise

The rows of a record sum to its charge, to the nano. Where the charge is less than its lines - two
rounded parts, an account that had no more - the last rows have the less. A generation that is not
charged was priced for nothing: its PricingQuantity is zero, its ConsumedQuantity is what it took.

All columns are there that the specification demands, and those it asks for where there is something
to say; then ours, which start with x_. Refunds are rows of their own (movements.py), for they come
later.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, Decimal

from maas.billing.v1 import ledger_pb2

from tools.export.amounts import EXACT, decimal_of_nanos, text_of
from tools.export.cloudevents import end_cause_of

COLUMNS = (
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "ContractedUnitPrice",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "SkuId",
    "SkuMeter",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "Tags",
    "x_GenerationId",
    "x_ApiKeyId",
    "x_ModelVersion",
    "x_EndCause",
    "x_EndUser",
    "x_RequestId",
    "x_LedgerEntry",
    "x_EntryKind",
)
_MILLION = Decimal(10**6)
_TOKENS = ("1000000 Tokens", "Tokens")
_REQUESTS = ("Requests", "Requests")
_MONTHS = 12
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_CHARGED = frozenset(
    {
        ledger_pb2.END_CAUSE_COMPLETED,
        ledger_pb2.END_CAUSE_CLIENT_CANCELLED,
        ledger_pb2.END_CAUSE_DEADLINE,
        ledger_pb2.END_CAUSE_STALLED,
        ledger_pb2.END_CAUSE_REVOKED,
    }
)


@dataclass(frozen=True, slots=True)
class Meter:
    """A line of a price with something to count.

    Attributes:
        name: for people.
        sku: last part of its SKU price.
        count: tokens or requests.
        nanos: price of a unit.
        units: what is priced, what is counted.
        quantity: how many units.
    """

    name: str
    sku: str
    count: int
    nanos: int
    units: tuple[str, str]
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class Cost:
    """What a row costs, in the major unit: see the module."""

    unit_price: Decimal
    contracted_unit_price: Decimal
    quantity: Decimal
    billed: Decimal


def header() -> str:
    """Writes the names of the columns."""
    return csv_of([COLUMNS])


def lines_of(
    record: ledger_pb2.UsageRecord, price: ledger_pb2.Price, *, customer: str, provider: str
) -> str:
    """Writes the rows of a record.

    Args:
        record: a settled generation.
        price: at which it was charged.
        customer: name for people of its account; may be empty.
        provider: who provides the service and issues the invoice.
    """
    common = _common(record, customer=customer, provider=provider)
    meters = meters_of(record, price)
    rows = []
    for meter, cost in zip(meters, costs_of(meters, record, price), strict=True):
        row = common | _of_meter(meter, cost, record)
        rows.append([row.get(column, "") for column in COLUMNS])
    return csv_of(rows)


def meters_of(record: ledger_pb2.UsageRecord, price: ledger_pb2.Price) -> list[Meter]:
    """Lists the lines with something to count; the request, when there is no other."""
    usage = record.usage
    fresh, cached = usage.input_tokens - usage.cached_input_tokens, usage.cached_input_tokens
    plain, reasoning = usage.output_tokens - usage.reasoning_tokens, usage.reasoning_tokens
    input_price = price.input_price_per_million.nanos
    output_price = price.output_price_per_million.nanos
    cached_price = input_price
    if price.HasField("cached_input_price_per_million"):
        cached_price = price.cached_input_price_per_million.nanos
    reasoning_price = output_price
    if price.HasField("reasoning_price_per_million"):
        reasoning_price = price.reasoning_price_per_million.nanos
    tokens = [
        ("Input Tokens", "input", fresh, input_price),
        ("Cached Input Tokens", "cached-input", cached, cached_price),
        ("Output Tokens", "output", plain, output_price),
        ("Reasoning Tokens", "reasoning", reasoning, reasoning_price),
    ]
    found = [
        Meter(name, sku, count, nanos, _TOKENS, EXACT.divide(Decimal(count), _MILLION))
        for name, sku, count, nanos in tokens
        if count
    ]
    if price.request_price.nanos or not found:
        nanos = price.request_price.nanos
        found.append(Meter("Requests", "request", 1, nanos, _REQUESTS, Decimal(1)))
    return found


def costs_of(
    meters: Iterable[Meter], record: ledger_pb2.UsageRecord, price: ledger_pb2.Price
) -> Iterator[Cost]:
    """Divides the charge of a record among its lines; what is billed sums to it exactly."""
    left = record.charge.nanos
    percent = 100 - price.background_discount_percent if record.background else 100
    share = EXACT.divide(Decimal(percent), Decimal(100))
    is_charged = record.end_cause in _CHARGED
    pending = list(meters)
    for index, meter in enumerate(pending):
        exact = EXACT.multiply(EXACT.multiply(meter.quantity, Decimal(meter.nanos)), share)
        nanos = min(int(exact.to_integral_value(ROUND_CEILING)), left)
        if index == len(pending) - 1:
            nanos = left
        left -= nanos
        unit_price = decimal_of_nanos(meter.nanos)
        yield Cost(
            unit_price,
            EXACT.multiply(unit_price, share),
            meter.quantity if is_charged else Decimal(0),
            decimal_of_nanos(nanos),
        )


def columns_of(account: str, time: datetime, *, customer: str, provider: str) -> dict[str, str]:
    """Fills the columns that all rows of an account have.

    Args:
        account: "accounts/{account}".
        time: in the billing period, UTC.
        customer: name for people of the account; may be empty.
        provider: who provides the service and issues the invoice.
    """
    month = datetime(time.year, time.month, 1, tzinfo=UTC)
    years, index = divmod(month.month, _MONTHS)
    return {
        "BillingAccountId": account,
        "BillingAccountName": text_cell(customer),
        "BillingPeriodEnd": time_cell(datetime(month.year + years, index + 1, 1, tzinfo=UTC)),
        "BillingPeriodStart": time_cell(month),
        "InvoiceIssuerName": provider,
        "ProviderName": provider,
        "PublisherName": provider,
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "Model as a Service",
        "ServiceSubcategory": "Generative AI",
    }


def _common(record: ledger_pb2.UsageRecord, *, customer: str, provider: str) -> dict[str, str]:
    account = record.name.partition("/usageRecords/")[0]
    start, end = _charge_period(record)
    settled = record.settle_time.ToDatetime(tzinfo=UTC)
    labels = {key: record.labels[key] for key in sorted(record.labels)}
    tags = json.dumps(labels, ensure_ascii=False, separators=(",", ":")) if labels else ""
    return columns_of(account, settled, customer=customer, provider=provider) | {
        "BillingCurrency": record.charge.currency_code,
        "ChargeCategory": "Usage",
        "ChargeClass": "",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodEnd": time_cell(end),
        "ChargePeriodStart": time_cell(start),
        "PricingCategory": "Standard",
        "SkuId": record.offering,
        "SubAccountId": record.project,
        "SubAccountName": record.project.partition("/")[2],
        "Tags": tags,
        "x_GenerationId": record.generation_id,
        "x_ApiKeyId": record.api_key,
        "x_ModelVersion": record.model_version,
        "x_EndCause": end_cause_of(record),
        "x_EndUser": text_cell(record.end_user),
        "x_RequestId": text_cell(record.request_id),
    }


def _of_meter(meter: Meter, cost: Cost, record: ledger_pb2.UsageRecord) -> dict[str, str]:
    priced, counted = meter.units
    return {
        "BilledCost": text_of(cost.billed),
        "ChargeDescription": f"{meter.name} of {record.offering.partition('/')[2]}",
        "ConsumedQuantity": str(meter.count),
        "ConsumedUnit": counted,
        "ContractedCost": text_of(EXACT.multiply(cost.quantity, cost.contracted_unit_price)),
        "ContractedUnitPrice": text_of(cost.contracted_unit_price),
        "EffectiveCost": text_of(cost.billed),
        "ListCost": text_of(EXACT.multiply(cost.quantity, cost.unit_price)),
        "ListUnitPrice": text_of(cost.unit_price),
        "PricingQuantity": text_of(cost.quantity),
        "PricingUnit": priced,
        "SkuMeter": meter.name,
        "SkuPriceId": f"{record.price}/{meter.sku}",
    }


def _charge_period(record: ledger_pb2.UsageRecord) -> tuple[datetime, datetime]:
    """The seconds in which a generation ran, at least one: the specification has no finer time."""
    start = record.start_time.ToDatetime(tzinfo=UTC).replace(microsecond=0)
    last = record.end_time.ToDatetime(tzinfo=UTC).replace(microsecond=0)
    return start, max(start, last) + timedelta(seconds=1)


def time_cell(time: datetime) -> str:
    """Writes a time of UTC, in whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def text_cell(text: str) -> str:
    """Writes a text that others chose, so that no spreadsheet takes it for a formula.

    One that begins as formulas do has an apostrophe before it; events have texts as they are.
    """
    return f"'{text}" if text.startswith(_FORMULA) else text


def csv_of(rows: Iterable[Iterable[str]]) -> str:
    """Writes rows, each with the end of its line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue()
