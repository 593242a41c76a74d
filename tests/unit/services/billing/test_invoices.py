from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import InvalidArgument
from libs.limits import PUBLIC_REQUEST_BYTES_MAX
from libs.paging import PAGE_BYTES_MAX
from services.billing.domain import PRICE_MAX, Price
from services.billing.invoice_convert import invoice_to_pb
from services.billing.invoice_document import money_text, render
from services.billing.invoices import (
    LINES_MAX,
    Contents,
    Document,
    Invoice,
    InvoiceLine,
    InvoiceState,
    invoice_name,
    month_after,
    month_of,
    number_of,
    text_of_month,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@given(st.integers(1, 10**18 - 1))
def test_numbers_survive_the_way_into_a_name_and_back(number: int) -> None:
    name = invoice_name("acme", number)

    assert number_of(name.rpartition("/")[2], "name") == number


@given(st.dates(date(1, 1, 1), date(9999, 11, 30)))
def test_month_after_is_the_next_one(day: date) -> None:
    month = day.replace(day=1)

    after = month_after(month)

    assert after.day == 1
    assert 28 <= (after - month).days <= 31
    assert month_of(text_of_month(month), "month") == month


@pytest.mark.parametrize("text", ["2026-13", "2026-00", "0000-05", "9999-12", "26-1", "", "x"])
def test_months_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        month_of(text, "month")

    assert caught.value.violations[0].field == "month"


@pytest.mark.parametrize(
    ("nanos", "text"),
    [
        (0, "0.00"),
        (1, "0.000000001"),
        (-250_000_000, "-0.25"),
        (1_200_000_000_000, "1,200.00"),
        (150_000_000, "0.15"),
    ],
)
def test_amounts_are_written_exactly(nanos: int, text: str) -> None:
    assert money_text(nanos) == text


@given(st.integers(-(2**63), 2**63 - 1))
def test_no_amount_is_rounded(nanos: int) -> None:
    assert Decimal(money_text(nanos).replace(",", "")) == Decimal(nanos).scaleb(-9)


def test_longest_invoice_fits_into_messages() -> None:
    most = 10**15
    price_ids = [f"{number:p<63}" for number in range(LINES_MAX)]
    lines = [
        InvoiceLine(
            offering_id="o" * 63,
            price_id=price_id,
            record_count=most,
            input_tokens=2 * most,
            cached_input_tokens=most,
            output_tokens=2 * most,
            reasoning_tokens=most,
            charge=PRICE_MAX + 1,
        )
        for price_id in price_ids
    ]
    price = Price(
        price_id="p",
        offering_id="o",
        input_price=PRICE_MAX - 1,
        output_price=PRICE_MAX - 1,
        cached_input_price=PRICE_MAX - 1,
        request_price=PRICE_MAX - 1,
        background_discount_percent=100,
        effective_time=NOW,
        create_time=NOW,
    )
    invoice = Invoice(
        account_id="acme",
        number=1,
        month=NOW.date(),
        state=InvoiceState.ISSUED,
        contents=Contents(lines=lines, refunds=0),
        issue_time=NOW,
    )

    html = render(Document(invoice=invoice, customer="", prices=dict.fromkeys(price_ids, price)))

    assert html.count("<tr>") > LINES_MAX
    assert len(html.encode()) < PUBLIC_REQUEST_BYTES_MAX
    assert invoice_to_pb(invoice).ByteSize() < PAGE_BYTES_MAX
