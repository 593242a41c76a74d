"""Invoices as messages. Pure; what is wrong in a message is refused with its path."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from maas.billing.v1 import invoice_service_pb2 as invoice_pb
from maas.common.v1 import usage_pb2

from libs.errors import FieldRule, invalid_field
from services.billing import convert
from services.billing.domain import SYSTEM_PREFIX
from services.billing.invoices import Invoice, InvoiceLine, InvoiceState, number_of, text_of_month

_STATES = {
    InvoiceState.PREVIEW: invoice_pb.INVOICE_STATE_PREVIEW,
    InvoiceState.ISSUED: invoice_pb.INVOICE_STATE_ISSUED,
    InvoiceState.VOID: invoice_pb.INVOICE_STATE_VOID,
}


def invoice_ids_of(name: str, field: str) -> tuple[str, int]:
    """Reads the name of an invoice: the id of its account, and its number.

    Raises:
        InvalidArgument: it is none.
    """
    account_id, last = convert.ids_of(name, "accounts/*/invoices/*", field)
    return account_id, number_of(last, field)


def check_customer(account_id: str, field: str) -> str:
    """Returns the id of an account that may have invoices.

    Raises:
        InvalidArgument: it is one of the ledger's own.
    """
    if account_id.startswith(SYSTEM_PREFIX):
        raise invalid_field(field, FieldRule.BAD_FORMAT, "must be a customer's account")
    return account_id


def invoice_to_pb(invoice: Invoice) -> invoice_pb.Invoice:
    """Writes an invoice."""
    contents = invoice.contents
    return invoice_pb.Invoice(
        name=invoice.name,
        month=text_of_month(invoice.month),
        state=_STATES[invoice.state],
        lines=[_line_to_pb(line) for line in contents.lines],
        refunds=convert.money_to_pb(contents.refunds),
        total=convert.money_to_pb(contents.total),
        record_count=contents.record_count,
        issue_time=_time_to_pb(invoice.issue_time),
        void_time=_time_to_pb(invoice.void_time),
    )


def _time_to_pb(time: datetime | None) -> Timestamp | None:
    return None if time is None else convert.time_to_pb(time)


def _line_to_pb(line: InvoiceLine) -> invoice_pb.InvoiceLine:
    return invoice_pb.InvoiceLine(
        offering=f"offerings/{line.offering_id}",
        price=f"prices/{line.price_id}",
        record_count=line.record_count,
        usage=usage_pb2.TokenUsage(
            input_tokens=line.input_tokens,
            cached_input_tokens=line.cached_input_tokens,
            output_tokens=line.output_tokens,
            reasoning_tokens=line.reasoning_tokens,
        ),
        charge=convert.money_to_pb(line.charge),
    )
