"""Invoices: computed, issued, made void.

Which records are on an invoice is kept as ranges of their numbers. One that is computed takes what
is numbered already, settled before its month's end, and in no range of one that is issued. The same
holds of refunds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

import asyncpg

from libs.errors import not_found
from libs.paging import Page
from libs.postgres import Connection, Database
from services.billing.domain import account_name
from services.billing.invoices import (
    LINES_MAX,
    Contents,
    Document,
    Invoice,
    InvoiceLine,
    InvoiceState,
    invoice_name,
    month_after,
    month_not_over,
    too_many_lines,
)
from services.billing.store.ledger import number_after
from services.billing.store.prices import find_prices
from services.billing.store.reports import Report, Reports

_ADVICE = "give the call more time"
_INVOICE = """
    SELECT account_id, number, month, state, lines, refunds, issue_time, void_time
      FROM invoice
"""
# What is on no issued invoice of the account, as ranges of numbers: the gaps between what is. Both
# by one statement, so of one moment: what comes later has higher numbers, and nothing changes.
_FREE = """
    SELECT 'usage_record' AS kind, lower(gap) AS first, upper(gap) AS behind
      FROM ledger_head, unnest(
               int8multirange(int8range(1, record_count + 1)) - (
                   SELECT coalesce(range_agg(taken), '{}')
                     FROM invoice, unnest(records) AS taken
                    WHERE account_id = $1
                      AND state = 'issued'
               )
           ) AS gap
     UNION ALL
    SELECT 'refund', lower(gap), upper(gap)
      FROM ledger_head, unnest(
               int8multirange(int8range(1, entry_count + 1)) - (
                   SELECT coalesce(range_agg(taken), '{}')
                     FROM invoice, unnest(refund_numbers) AS taken
                    WHERE account_id = $1
                      AND state = 'issued'
               )
           ) AS gap
"""
# An index gives what an account has in a range: years of records that are on invoices cost nothing.
CANDIDATES = """
      FROM unnest($2::bigint[], $3::bigint[]) AS gap (first, behind)
      JOIN {table}
        ON account_id = $1
       AND number >= first
       AND number < behind
"""
LINES = f"""
    SELECT offering_id, price_id, count(*) AS record_count,
           sum(input_tokens)::bigint AS input_tokens,
           sum(cached_input_tokens)::bigint AS cached_input_tokens,
           sum(output_tokens)::bigint AS output_tokens,
           sum(reasoning_tokens)::bigint AS reasoning_tokens,
           sum(amount - shortfall)::bigint AS charge
    {CANDIDATES.format(table="usage_record")}
     WHERE settle_time < $4
     GROUP BY offering_id, price_id
     ORDER BY offering_id COLLATE "C", price_id COLLATE "C"
     LIMIT {LINES_MAX + 1}
"""
_REFUNDS = f"""
    SELECT coalesce(sum(amount), 0)::bigint AS amount
    {CANDIDATES.format(table="refund")}
     WHERE create_time < $4
"""
# What is due, as ranges: from the first to the last of those that have nothing between them that is
# not due. Times follow numbers but for the clocks of replicas, so there are few.
_RANGES = """
    SELECT min(number) AS first, max(number) + 1 AS behind
      FROM (
               SELECT number, first, {time} < $4 AS is_due,
                      row_number() OVER (PARTITION BY first ORDER BY number)
                      - row_number() OVER (PARTITION BY first, {time} < $4 ORDER BY number) AS run
               {candidates}
           ) AS candidate
     WHERE is_due
     GROUP BY first, run
"""
_RECORD_RANGES = _RANGES.format(
    time="settle_time", candidates=CANDIDATES.format(table="usage_record")
)
_REFUND_RANGES = _RANGES.format(time="create_time", candidates=CANDIDATES.format(table="refund"))


@dataclass(frozen=True, slots=True)
class Ranges:
    """Ranges of numbers.

    Attributes:
        first: first number of each.
        behind: the number behind the last one of each.
    """

    first: list[int]
    behind: list[int]


class InvoiceStore:
    """Invoices. Every method may be repeated; all raise Unavailable.

    Args:
        database: where they are.
        reports: for what may take long.
        delay_s: how long after its end a month can be invoiced.
    """

    def __init__(self, database: Database, reports: Reports, *, delay_s: float) -> None:
        self._database = database
        self._reports = reports
        self._delay = timedelta(seconds=delay_s)

    async def preview(self, account_id: str, month: date, *, timeout_s: float) -> Invoice:
        """Computes what an invoice of the month would say now.

        Args:
            account_id: whose.
            month: its first day.
            timeout_s: longest time that it may take.

        Raises:
            NotFound: there is no such account.
            FailedPrecondition: WRONG_STATE, it would have too many lines.
            DeadlineExceeded, ResourceExhausted: as Reports.open says.
        """
        async with self._reports.open(account_id, timeout_s, advice=_ADVICE) as report:
            await _get_customer(report.connection, account_id)
            records, refunds = await _find_free(report, account_id)
            contents = await _compute(report, account_id, month, records, refunds)
        return Invoice(
            account_id=account_id,
            number=0,
            month=month,
            state=InvoiceState.PREVIEW,
            contents=contents,
        )

    async def issue(
        self, account_id: str, month: date, now: datetime, *, timeout_s: float
    ) -> Invoice:
        """Issues the invoice of a month, or returns the one that is issued.

        Holds the account's row of invoices meanwhile; settlements go on.

        Args:
            account_id: whose.
            month: its first day.
            now: time of the invoice.
            timeout_s: longest time that it may take.

        Raises:
            NotFound: there is no such account.
            FailedPrecondition: WRONG_STATE, the month is not over, on the clock of the database, or
                the invoice would have too many lines.
            DeadlineExceeded, ResourceExhausted: as Reports.open says.
        """
        async with self._reports.open(account_id, timeout_s, advice=_ADVICE) as report:
            connection = report.connection
            await _get_customer(connection, account_id)
            count = await _lock_invoices(connection, account_id)
            row = await connection.fetchrow(
                f"{_INVOICE} WHERE account_id = $1 AND month = $2 AND state = 'issued'",
                account_id,
                month,
            )
            if row is not None:
                return _invoice_from_row(row)
            await self._check_over(connection, month)
            free_records, free_refunds = await _find_free(report, account_id)
            invoice = Invoice(
                account_id=account_id,
                number=count + 1,
                month=month,
                state=InvoiceState.ISSUED,
                contents=await _compute(report, account_id, month, free_records, free_refunds),
                issue_time=now,
            )
            records = await _find_due(report, _RECORD_RANGES, account_id, month, free_records)
            refunds = await _find_due(report, _REFUND_RANGES, account_id, month, free_refunds)
            await _insert(connection, invoice, records, refunds)
        return invoice

    async def _check_over(self, connection: Connection, month: date) -> None:
        due = _end_of(month) + self._delay
        if await connection.fetchval("SELECT lease_now()") < due:
            raise month_not_over(month, due)

    async def void(self, account_id: str, number: int, now: datetime) -> Invoice:
        """Makes an invoice void; one that is already stays as it is.

        Needs no lock: whoever computes another one meanwhile takes its records or leaves them.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            await connection.execute(
                """
                UPDATE invoice
                   SET state = 'void', void_time = $3
                 WHERE account_id = $1
                   AND number = $2
                   AND state = 'issued'
                """,
                account_id,
                number,
                now,
            )
            return await _get_invoice(connection, account_id, number)

    async def get_invoice(self, account_id: str, number: int) -> Invoice:
        """Reads an invoice.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            return await _get_invoice(connection, account_id, number)

    async def get_document(self, account_id: str, number: int) -> Document:
        """Reads an invoice and what a document says beside it.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            invoice = await _get_invoice(connection, account_id, number)
            customer = await _get_customer(connection, account_id)
        # They never change.
        prices = await find_prices(
            self._database, {line.price_id for line in invoice.contents.lines}
        )
        return Document(invoice=invoice, customer=customer, prices=prices)

    async def list_invoices(self, account_id: str, page: Page) -> list[Invoice]:
        """Reads `page.read_size` invoices of an account by number.

        Raises:
            NotFound: there is no such account.
            InvalidArgument: BAD_PAGE_TOKEN.
        """
        after = number_after(page)
        async with self._database.transaction() as connection:
            await _get_customer(connection, account_id)
            rows = await connection.fetch(
                f"{_INVOICE} WHERE account_id = $1 AND number > $2 ORDER BY number LIMIT $3",
                account_id,
                after,
                page.read_size,
            )
        return [_invoice_from_row(row) for row in rows]


async def _get_customer(connection: Connection, account_id: str) -> str:
    """Reads the name for people of an account.

    Raises:
        NotFound: there is no such account.
    """
    name: str | None = await connection.fetchval(
        "SELECT display_name FROM account WHERE account_id = $1", account_id
    )
    if name is None:
        raise not_found(account_name(account_id))
    return name


async def _lock_invoices(connection: Connection, account_id: str) -> int:
    """Locks the invoices of an account; returns how many there are."""
    await connection.execute(
        """
        INSERT INTO invoice_head (account_id, invoice_count)
        VALUES ($1, 0)
        ON CONFLICT DO NOTHING
        """,
        account_id,
    )
    return int(
        await connection.fetchval(
            "SELECT invoice_count FROM invoice_head WHERE account_id = $1 FOR UPDATE", account_id
        )
    )


async def _find_free(report: Report, account_id: str) -> tuple[Ranges, Ranges]:
    """Finds the numbers of records, and of refunds, that are on no issued invoice."""
    rows = await report.fetch(_FREE, [account_id])
    records = [row for row in rows if row["kind"] == "usage_record"]
    refunds = [row for row in rows if row["kind"] == "refund"]
    return _ranges_from_rows(records), _ranges_from_rows(refunds)


async def _compute(
    report: Report, account_id: str, month: date, records: Ranges, refunds: Ranges
) -> Contents:
    end = _end_of(month)
    rows = await report.fetch(LINES, [account_id, records.first, records.behind, end])
    if len(rows) > LINES_MAX:
        raise too_many_lines(account_id)
    (refunded,) = await report.fetch(_REFUNDS, [account_id, refunds.first, refunds.behind, end])
    lines = [
        InvoiceLine(
            offering_id=row["offering_id"],
            price_id=row["price_id"],
            record_count=row["record_count"],
            input_tokens=row["input_tokens"],
            cached_input_tokens=row["cached_input_tokens"],
            output_tokens=row["output_tokens"],
            reasoning_tokens=row["reasoning_tokens"],
            charge=row["charge"],
        )
        for row in rows
    ]
    return Contents(lines=lines, refunds=-refunded["amount"])


async def _find_due(
    report: Report, statement: str, account_id: str, month: date, free: Ranges
) -> Ranges:
    rows = await report.fetch(statement, [account_id, free.first, free.behind, _end_of(month)])
    return _ranges_from_rows(rows)


async def _insert(
    connection: Connection, invoice: Invoice, records: Ranges, refunds: Ranges
) -> None:
    """Writes an invoice with the next number, under the lock of the account's invoices."""
    contents = invoice.contents
    await connection.execute(
        """
        WITH head AS (
            UPDATE invoice_head SET invoice_count = $2 WHERE account_id = $1
        )
        INSERT INTO invoice (
            account_id, number, month, state, lines, refunds, total, record_count, records,
            refund_numbers, issue_time
        )
        SELECT $1, $2, $3, $4, $5::jsonb, $6, $7, $8,
               (SELECT coalesce(range_agg(int8range(first, behind)), '{}')
                  FROM unnest($9::bigint[], $10::bigint[]) AS part (first, behind)),
               (SELECT coalesce(range_agg(int8range(first, behind)), '{}')
                  FROM unnest($11::bigint[], $12::bigint[]) AS part (first, behind)),
               $13
        """,
        invoice.account_id,
        invoice.number,
        invoice.month,
        invoice.state.value,
        json.dumps([_line_to_json(line) for line in contents.lines]),
        contents.refunds,
        contents.total,
        contents.record_count,
        records.first,
        records.behind,
        refunds.first,
        refunds.behind,
        invoice.issue_time,
    )


async def _get_invoice(connection: Connection, account_id: str, number: int) -> Invoice:
    row = await connection.fetchrow(
        f"{_INVOICE} WHERE account_id = $1 AND number = $2", account_id, number
    )
    if row is None:
        raise not_found(invoice_name(account_id, number))
    return _invoice_from_row(row)


def _end_of(month: date) -> datetime:
    return datetime.combine(month_after(month), time(), UTC)


def _ranges_from_rows(rows: list[asyncpg.Record]) -> Ranges:
    return Ranges([row["first"] for row in rows], [row["behind"] for row in rows])


def _line_to_json(line: InvoiceLine) -> dict[str, str | int]:
    return {
        "offering": line.offering_id,
        "price": line.price_id,
        "records": line.record_count,
        "input_tokens": line.input_tokens,
        "cached_input_tokens": line.cached_input_tokens,
        "output_tokens": line.output_tokens,
        "reasoning_tokens": line.reasoning_tokens,
        "charge": line.charge,
    }


def _invoice_from_row(row: asyncpg.Record) -> Invoice:
    lines = [
        InvoiceLine(
            offering_id=line["offering"],
            price_id=line["price"],
            record_count=line["records"],
            input_tokens=line["input_tokens"],
            cached_input_tokens=line["cached_input_tokens"],
            output_tokens=line["output_tokens"],
            reasoning_tokens=line["reasoning_tokens"],
            charge=line["charge"],
        )
        for line in json.loads(row["lines"])
    ]
    return Invoice(
        account_id=row["account_id"],
        number=row["number"],
        month=row["month"],
        state=InvoiceState(row["state"]),
        contents=Contents(lines=lines, refunds=row["refunds"]),
        issue_time=row["issue_time"],
        void_time=row["void_time"],
    )
