"""What the stores share: the head of the ledger, balances and their locks, entries."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import asyncpg

from libs.paging import Page, bad_page_token
from libs.postgres import Connection
from services.billing.division import Head
from services.billing.domain import Balance, Entry, EntryKind

_NUMBER_DIGITS_MAX = 18


async def lock_head(connection: Connection) -> Head:
    """Locks the head: until the commit nobody else writes entries or usage records."""
    row = await connection.fetchrow("SELECT entry_count, record_count FROM ledger_head FOR UPDATE")
    assert row is not None
    return Head(entry_count=row["entry_count"], record_count=row["record_count"])


async def advance_head(connection: Connection, *, entries: int, records: int) -> None:
    """Says that numbers were given."""
    await connection.execute(
        """
        UPDATE ledger_head
           SET entry_count = entry_count + $1, record_count = record_count + $2
        """,
        entries,
        records,
    )


async def lock_balances(
    connection: Connection, account_ids: Collection[str], slice_ids: Collection[str] = ()
) -> dict[str, Balance]:
    """Locks the balances of accounts and of the accounts of slices; those that there are."""
    rows = await connection.fetch(
        """
        SELECT account_id, posted, held, floor
          FROM balance
         WHERE account_id IN (
                   SELECT unnest($1::text[])
                    UNION
                   SELECT account_id FROM credit_slice WHERE credit_slice_id = ANY($2::text[])
               )
         ORDER BY account_id
           FOR UPDATE
        """,
        list(account_ids),
        list(slice_ids),
    )
    return {row["account_id"]: balance_from_row(row) for row in rows}


async def change_balances(
    connection: Connection, *, posted: Mapping[str, int], held: Mapping[str, int]
) -> None:
    """Adds to posted and held of accounts, whose balances are locked."""
    account_ids = [*{**posted, **held}]
    await connection.execute(
        """
        UPDATE balance
           SET posted = balance.posted + change.posted, held = balance.held + change.held
          FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS change (account_id, posted, held)
         WHERE balance.account_id = change.account_id
        """,
        account_ids,
        [posted.get(account_id, 0) for account_id in account_ids],
        [held.get(account_id, 0) for account_id in account_ids],
    )


async def insert_entries(connection: Connection, entries: Sequence[Entry]) -> None:
    """Writes entries, under the lock of the head."""
    await connection.execute(
        """
        INSERT INTO ledger_entry (
            number, account_id, transaction_number, amount, kind, source, description, create_time
        )
        SELECT *
          FROM unnest(
                   $1::bigint[], $2::text[], $3::bigint[], $4::bigint[], $5::text[], $6::text[],
                   $7::text[], $8::timestamptz[]
               )
        """,
        [entry.number for entry in entries],
        [entry.account_id for entry in entries],
        [entry.transaction_number for entry in entries],
        [entry.amount for entry in entries],
        [entry.kind.value for entry in entries],
        [entry.source for entry in entries],
        [entry.description for entry in entries],
        [entry.create_time for entry in entries],
    )


def balance_from_row(row: asyncpg.Record) -> Balance:
    """Reads a balance."""
    return Balance(
        account_id=row["account_id"], posted=row["posted"], held=row["held"], floor=row["floor"]
    )


def entry_from_row(row: asyncpg.Record) -> Entry:
    """Reads an entry."""
    return Entry(
        number=row["number"],
        account_id=row["account_id"],
        transaction_number=row["transaction_number"],
        amount=row["amount"],
        kind=EntryKind(row["kind"]),
        source=row["source"],
        description=row["description"],
        create_time=row["create_time"],
    )


def number_after(page: Page) -> int:
    """Returns the number that a page of numbered rows starts behind.

    Raises:
        InvalidArgument: BAD_PAGE_TOKEN.
    """
    if not page.after:
        return 0
    if not (page.after.isascii() and page.after.isdecimal()):
        raise bad_page_token()
    if len(page.after) > _NUMBER_DIGITS_MAX:
        raise bad_page_token()
    return int(page.after)
