"""What the stores share: the head of the ledger, balances and their locks, entries."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import asyncpg

from libs.paging import Page, bad_page_token
from libs.postgres import Connection
from services.billing.division import Head
from services.billing.domain import Balance, Entry, EntryKind

_NUMBER_DIGITS_MAX = 18
GRANTS_READ = 16
"""Grants of an account that a charge looks at first."""
# Whether a grant may have expired is told by the clock of the statement that locks.
BALANCE = """
    SELECT account_id, posted, held, credit_limit, has_spend_limits,
           coalesce(next_expire_time <= (SELECT lease_now()), false) AS is_due
      FROM balance
"""
_ENTRY_COLUMNS = (
    "number",
    "account_id",
    "transaction_number",
    "amount",
    "kind",
    "source",
    "description",
    "create_time",
    "grant_id",
)
ENTRY = f"""
    SELECT {", ".join(_ENTRY_COLUMNS)}
      FROM ledger_entry
"""  # noqa: S608 - made of constants


def _floor(free: str) -> str:
    """Writes the floor of a balance for what is posted and not held of it afterwards.

    Where a credit limit was lowered below what is used, the floor comes up as the account does.
    """
    return f"least(-balance.credit_limit, greatest(balance.floor, {free}))"


CHANGE_POSTED = f"""
    WITH changed AS (
        UPDATE balance
           SET posted = balance.posted + change.posted,
               held = balance.held + change.held,
               floor = {_floor("balance.posted + change.posted - balance.held - change.held")}
          FROM unnest($1::text[], $2::bigint[], $3::bigint[])
               AS change (account_id, posted, held)
         WHERE balance.account_id = change.account_id
        RETURNING balance.account_id, balance.posted, change.posted AS added
    ), ordered AS (
        SELECT account_id, posted, added, grant_id, remaining,
               count(*) OVER account AS live_count,
               sum(remaining) OVER account AS total,
               sum(remaining) OVER (
                   account ORDER BY priority, expire_time NULLS LAST, number
                            ROWS UNBOUNDED PRECEDING
               ) - remaining AS before
          FROM changed
         CROSS JOIN LATERAL (
                   SELECT grant_id, remaining, priority, expire_time, number
                     FROM credit_grant
                    WHERE is_live
                      AND credit_grant.account_id = changed.account_id
                    ORDER BY priority, expire_time NULLS LAST, number
                    LIMIT $4::bigint
               ) AS live
        WINDOW account AS (PARTITION BY account_id)
    ), owed AS (
        SELECT account_id, grant_id, remaining, before,
               CASE WHEN live_count = $4::bigint
                    THEN greatest(posted - added, 0) - greatest(posted, 0)
                    ELSE total - greatest(posted, 0)
               END AS excess
          FROM ordered
    ), used AS (
        UPDATE credit_grant
           SET remaining = credit_grant.remaining - least(credit_grant.remaining, excess - before),
               is_live = credit_grant.remaining > excess - before
          FROM owed
         WHERE excess > before
           AND credit_grant.account_id = owed.account_id
           AND credit_grant.grant_id = owed.grant_id
    )
    SELECT account_id
      FROM owed
     GROUP BY account_id
    HAVING max(excess) > sum(remaining)
"""  # noqa: S608 - made of constants


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
        f"""
        {BALANCE}
         WHERE account_id IN (
                   SELECT unnest($1::text[])
                    UNION
                   SELECT account_id FROM credit_slice WHERE credit_slice_id = ANY($2::text[])
               )
         ORDER BY account_id
           FOR UPDATE
        """,  # noqa: S608 - made of constants
        list(account_ids),
        list(slice_ids),
    )
    return {row["account_id"]: balance_from_row(row) for row in rows}


async def change_held(connection: Connection, held: Mapping[str, int]) -> None:
    """Adds to held of accounts, whose balances are locked."""
    await connection.execute(
        f"""
        UPDATE balance
           SET held = balance.held + change.held,
               floor = {_floor("balance.posted - balance.held - change.held")}
          FROM unnest($1::text[], $2::bigint[]) AS change (account_id, held)
         WHERE balance.account_id = change.account_id
        """,  # noqa: S608 - made of constants
        list(held.keys()),
        list(held.values()),
    )


async def change_posted(connection: Connection, posted: Mapping[str, int]) -> None:
    """Adds to posted of accounts, whose balances are locked, and uses up their grants.

    A new grant has to be there before, and one that goes has to be gone.
    """
    await _change_posted(connection, posted, held={}, grants_max=None)


async def charge(
    connection: Connection, *, posted: Mapping[str, int], held: Mapping[str, int]
) -> None:
    """Adds to posted and held of accounts, whose balances are locked, and uses up their grants.

    Nearly always the first grants pay it all, so only those are read, however many there are.
    """
    unpaid = await _change_posted(connection, posted, held, grants_max=GRANTS_READ)
    if unpaid:
        await change_posted(connection, dict.fromkeys(unpaid, 0))


async def _change_posted(
    connection: Connection,
    posted: Mapping[str, int],
    held: Mapping[str, int],
    *,
    grants_max: int | None,
) -> list[str]:
    """Changes balances and their grants by one statement; returns whom `grants_max` left unpaid.

    Taken from grants in their order is what all of them have left beyond posted. Of an account that
    has more than were read, it is what posted falls by: before, nothing was beyond it.
    """
    account_ids = [*{**posted, **held}]
    rows = await connection.fetch(
        CHANGE_POSTED,
        account_ids,
        [posted.get(account_id, 0) for account_id in account_ids],
        [held.get(account_id, 0) for account_id in account_ids],
        grants_max,
    )
    return [row["account_id"] for row in rows]


async def insert_entries(connection: Connection, entries: Sequence[Entry]) -> None:
    """Writes entries, under the lock of the head."""
    await connection.copy_records_to_table(
        "ledger_entry",
        columns=_ENTRY_COLUMNS,
        records=[
            (
                entry.number,
                entry.account_id,
                entry.transaction_number,
                entry.amount,
                entry.kind.value,
                entry.source,
                entry.description,
                entry.create_time,
                entry.grant_id,
            )
            for entry in entries
        ],
    )


async def find_requested(connection: Connection, account_id: str, request_id: str) -> Entry | None:
    """Reads the entry on an account that a request_id or the id of a grant posted, if any."""
    row = await connection.fetchrow(
        f"""
        {ENTRY}
         WHERE account_id = $1
           AND source = $2
           AND kind NOT IN ('usage', 'expiry')
           AND account_id NOT LIKE 'system-%'
        """,
        account_id,
        request_id,
    )
    return None if row is None else entry_from_row(row)


def balance_from_row(row: asyncpg.Record) -> Balance:
    """Reads a balance."""
    return Balance(
        account_id=row["account_id"],
        posted=row["posted"],
        held=row["held"],
        credit_limit=row["credit_limit"],
        is_due=row["is_due"],
        has_spend_limits=row["has_spend_limits"],
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
        grant_id=row["grant_id"],
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
