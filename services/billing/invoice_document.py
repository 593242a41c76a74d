"""Invoices as documents for people: one HTML file that loads nothing. Pure but for its template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jinja2

from libs.units import CURRENCY
from services.billing.invoices import Document, InvoiceLine, InvoiceState, text_of_month

_NANOS = 1_000_000_000
_DECIMALS_MIN = 2
# Names of accounts are the customer's text: everything that is put in is escaped.
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True, slots=True)
class _Row:
    """A line as it is shown: counts beside their prices, texts all."""

    offering: str
    price: str
    records: str
    tokens: list[tuple[str, str, str]]
    notes: list[str]
    charge: str


def render(document: Document) -> str:
    """Renders an invoice."""
    invoice = document.invoice
    issue_time = invoice.issue_time
    void_time = invoice.void_time
    template = _ENVIRONMENT.get_template("invoice.html.jinja")
    return template.render(
        name=invoice.name,
        number=invoice.name.rpartition("/")[2],
        account=invoice.name.partition("/invoices/")[0],
        customer=document.customer,
        month=text_of_month(invoice.month),
        is_void=invoice.state is InvoiceState.VOID,
        issued="" if issue_time is None else f"{issue_time:%Y-%m-%d %H:%M} UTC",
        voided="" if void_time is None else f"{void_time:%Y-%m-%d %H:%M} UTC",
        rows=[_row_of(line, document) for line in invoice.contents.lines],
        record_count=_count(invoice.contents.record_count),
        refunds=money_text(invoice.contents.refunds),
        total=money_text(invoice.contents.total),
        currency=CURRENCY,
    )


def money_text(nanos: int) -> str:
    """Writes an amount exactly, in the major unit: "-0.25", "0.000000001", "1,200.00"."""
    whole, rest = divmod(abs(nanos), _NANOS)
    decimals = f"{rest:09}".rstrip("0").ljust(_DECIMALS_MIN, "0")
    return f"{'-' if nanos < 0 else ''}{whole:,}.{decimals}"


def _count(number: int) -> str:
    return f"{number:,}"


def _row_of(line: InvoiceLine, document: Document) -> _Row:
    price = document.prices[line.price_id]
    cached = price.input_price if price.cached_input_price is None else price.cached_input_price
    reasoning = price.output_price if price.reasoning_price is None else price.reasoning_price
    tokens = [
        ("input", line.input_tokens - line.cached_input_tokens, price.input_price),
        ("cached input", line.cached_input_tokens, cached),
        ("output", line.output_tokens - line.reasoning_tokens, price.output_price),
        ("reasoning", line.reasoning_tokens, reasoning),
    ]
    notes = []
    if price.request_price:
        notes.append(f"{money_text(price.request_price)} {CURRENCY} for each request")
    if price.background_discount_percent:
        notes.append(f"{price.background_discount_percent} % less in the background")
    return _Row(
        offering=line.offering_id,
        price=line.price_id,
        records=_count(line.record_count),
        tokens=[(name, _count(count), money_text(nanos)) for name, count, nanos in tokens if count],
        notes=notes,
        charge=money_text(line.charge),
    )
