"""Invoices: what an account used in a month, and the numbers of what is on them.

Pure: no gRPC, no SQL, no clock. Amounts are nanos of USD.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime

from libs.errors import FailedPrecondition, FieldRule, Reason, invalid_field
from libs.ids import bad_name
from services.billing.domain import Price, account_name

LINES_MAX = 5000
"""Of an invoice, so that it and its document fit into a message."""

_PREFIX = "INV-"
_DIGITS = 6
_NUMBER = re.compile(rf"{_PREFIX}([0-9]{{{_DIGITS},18}})")
_MONTHS = 12


class InvoiceState(enum.Enum):
    """Whether an invoice counts."""

    PREVIEW = "preview"
    ISSUED = "issued"
    VOID = "void"


@dataclass(frozen=True, slots=True, kw_only=True)
class InvoiceLine:
    """Usage of an offering at a price.

    Attributes:
        offering_id: what was called.
        price_id: at which price.
        record_count: how many usage records.
        input_tokens: of prompts, cached ones among them.
        cached_input_tokens: part of them that the prefix cache had.
        output_tokens: released, reasoning among them.
        reasoning_tokens: part of them that is reasoning.
        charge: what was taken from the account.
    """

    offering_id: str
    price_id: str
    record_count: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    reasoning_tokens: int
    charge: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What an invoice is about.

    Attributes:
        lines: in order of offering and price.
        refunds: what was given back; zero or negative.
    """

    lines: Sequence[InvoiceLine]
    refunds: int

    @property
    def total(self) -> int:
        """Sum of the lines and the refunds."""
        return sum(line.charge for line in self.lines) + self.refunds

    @property
    def record_count(self) -> int:
        """How many usage records it covers."""
        return sum(line.record_count for line in self.lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Invoice:
    """An invoice, or what one would say.

    Attributes:
        account_id: whose.
        number: 1, 2, 3, ... of the account without gaps; 0 in a preview.
        month: its first day.
        state: whether it counts.
        contents: what it is about.
        issue_time: when it was issued; None in a preview.
        void_time: when it was made void; None while it counts.
    """

    account_id: str
    number: int
    month: date
    state: InvoiceState
    contents: Contents
    issue_time: datetime | None = None
    void_time: datetime | None = None

    @property
    def name(self) -> str:
        """Resource name; empty in a preview."""
        return invoice_name(self.account_id, self.number) if self.number else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What a document for people says.

    Attributes:
        invoice: what it is about.
        customer: name for people of the account; may be empty.
        prices: of all lines, by id.
    """

    invoice: Invoice
    customer: str
    prices: Mapping[str, Price]


def invoice_name(account_id: str, number: int) -> str:
    """Returns the resource name of an invoice."""
    return f"{account_name(account_id)}/invoices/{_PREFIX}{number:0{_DIGITS}}"


def number_of(text: str, field: str) -> int:
    """Reads the last part of an invoice's name.

    Raises:
        InvalidArgument: it is none, or has another number of digits than that number is written
            with.
    """
    match = _NUMBER.fullmatch(text)
    if match is None or (len(match[1]) > _DIGITS and match[1].startswith("0")) or not int(match[1]):
        raise bad_name("accounts/*/invoices/*", field=field)
    return int(match[1])


def month_of(text: str, field: str) -> date:
    """Reads a month, "YYYY-MM"; returns its first day.

    Raises:
        InvalidArgument: there is none like it, or none after it.
    """
    try:
        month = date.fromisoformat(f"{text}-01")
        month_after(month)
    except ValueError:
        raise invalid_field(field, FieldRule.BAD_FORMAT, "must be a month, YYYY-MM") from None
    return month


def month_after(month: date) -> date:
    """Returns the first day of the next month.

    Raises:
        ValueError: there is no later one.
    """
    years, index = divmod(month.month, _MONTHS)
    return date(month.year + years, index + 1, 1)


def text_of_month(month: date) -> str:
    """Writes a month as "YYYY-MM"."""
    return month.isoformat().rpartition("-")[0]


def month_not_over(month: date, due: datetime) -> FailedPrecondition:
    """Makes the error for a month that cannot be invoiced before a time."""
    text = text_of_month(month)
    return FailedPrecondition(
        f"{text} can be invoiced from {due.isoformat()} on",
        reason=Reason.WRONG_STATE,
        metadata={"resource": f"months/{text}", "state": "NOT_OVER"},
    )


def too_many_lines(account_id: str) -> FailedPrecondition:
    """Makes the error for an invoice that would have more than LINES_MAX lines."""
    return FailedPrecondition(
        f"{account_name(account_id)} used more than {LINES_MAX} prices in the month",
        reason=Reason.WRONG_STATE,
        metadata={"resource": account_name(account_id), "state": "TOO_MANY_LINES"},
    )
