"""What moves an account's money beside usage, as CloudEvents 1.0 and as FOCUS 1.2. Pure.

Grants, top-ups, refunds, adjustments, and what expired. In FOCUS costs are the customer's, so what
is in favour of the account is negative: with the rows of usage, those of a month sum to what the
account lost in it. Grants, refunds and what expires are of category Credit; FOCUS has none for what
a customer pays, so top-ups are Adjustment, as corrections by the operator are. A refund counts in
the month in which it is given, as on invoices, and so corrects no earlier one: ChargeClass is null.
"""

from __future__ import annotations

import json
from datetime import UTC, timedelta

from maas.billing.v1 import ledger_pb2

from tools.export.amounts import decimal_of_nanos, text_of
from tools.export.focus import COLUMNS, columns_of, csv_of, text_cell, time_cell

TYPE = "maas.ledger.posted.v1"
_PREFIX = "ENTRY_KIND_"
# Category, and what the row is called where the operator gave no text.
_KINDS = {
    ledger_pb2.ENTRY_KIND_GRANT: ("Credit", "Grant"),
    ledger_pb2.ENTRY_KIND_TOP_UP: ("Adjustment", "Top-up"),
    ledger_pb2.ENTRY_KIND_ADJUSTMENT: ("Adjustment", "Adjustment"),
    ledger_pb2.ENTRY_KIND_REFUND: ("Credit", "Refund"),
    ledger_pb2.ENTRY_KIND_EXPIRY: ("Credit", "Expired credit"),
}
_OTHER = ("Adjustment", "Adjustment")


def kind_of(entry: ledger_pb2.LedgerEntry) -> str:
    """Names why money moved; a number where billing knows more reasons than this does."""
    number = entry.kind
    known = number in ledger_pb2.EntryKind.values()
    return ledger_pb2.EntryKind.Name(number).removeprefix(_PREFIX) if known else str(int(number))


def event_line_of(entry: ledger_pb2.LedgerEntry, *, source: str) -> str:
    """Writes the event of an entry, with the end of its line.

    Args:
        entry: on a customer's account.
        source: which deployment it comes from, a URI reference.
    """
    event = {
        "specversion": "1.0",
        "id": f"entry_{entry.name.rpartition('/')[2]}",
        "source": source,
        "type": TYPE,
        "subject": entry.account,
        "time": entry.create_time.ToJsonString(),
        "datacontenttype": "application/json",
        "data": {
            "entry": entry.name,
            "transaction_id": entry.transaction_id,
            "kind": kind_of(entry),
            "amount_nanos": str(entry.amount.nanos),
            "amount": text_of(decimal_of_nanos(entry.amount.nanos)),
            "currency": entry.amount.currency_code,
            "grant": entry.grant,
            "request_id": entry.source,
            "description": entry.description,
        },
    }
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n"


def focus_line_of(entry: ledger_pb2.LedgerEntry, *, customer: str, provider: str) -> str:
    """Writes the row of an entry.

    Args:
        entry: on a customer's account.
        customer: name for people of the account; may be empty.
        provider: who provides the service and issues the invoice.
    """
    time = entry.create_time.ToDatetime(tzinfo=UTC).replace(microsecond=0)
    category, name = _KINDS.get(entry.kind, _OTHER)
    cost = text_of(decimal_of_nanos(-entry.amount.nanos))
    row = columns_of(entry.account, time, customer=customer, provider=provider) | {
        "BilledCost": cost,
        "BillingCurrency": entry.amount.currency_code,
        "ChargeCategory": category,
        "ChargeDescription": text_cell(entry.description) or name,
        "ChargeFrequency": "One-Time",
        "ChargePeriodEnd": time_cell(time + timedelta(seconds=1)),
        "ChargePeriodStart": time_cell(time),
        # Without a unit price all costs are what is billed.
        "ContractedCost": cost,
        "EffectiveCost": cost,
        "ListCost": cost,
        "x_RequestId": text_cell(entry.source),
        "x_LedgerEntry": entry.name,
        "x_EntryKind": kind_of(entry),
    }
    return csv_of([[row.get(column, "") for column in COLUMNS]])
