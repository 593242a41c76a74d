"""Accounts, their balances and entries."""

from __future__ import annotations

import dataclasses
from datetime import datetime

import asyncpg

from libs.errors import InvalidArgument, Reason, already_exists, not_found
from libs.paging import Page
from libs.postgres import Connection, Database
from libs.units import CURRENCY
from services.billing.division import movement
from services.billing.domain import (
    FUNDING,
    Account,
    Balance,
    Entry,
    Posting,
    account_name,
    check_posting,
)
from services.billing.store.ledger import (
    advance_head,
    balance_from_row,
    change_balances,
    entry_from_row,
    insert_entries,
    lock_balances,
    lock_head,
    number_after,
)

_ACCOUNT = "SELECT account_id, display_name, create_time FROM account"
_ENTRY = """
    SELECT number, account_id, transaction_number, amount, kind, source, description, create_time
      FROM ledger_entry
"""


class AccountStore:
    """Accounts. Every method may be repeated; all raise Unavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_account(self, account: Account) -> Account:
        """Stores a customer's account, or returns the equal one that is there.

        Raises:
            AlreadyExists: there is one with other content.
        """
        async with self._database.transaction() as connection:
            await connection.execute(
                """
                INSERT INTO account (account_id, display_name, currency_code, create_time)
                VALUES ($1, $2, $3, $4)
                ON CONFLICT DO NOTHING
                """,
                account.account_id,
                account.display_name,
                CURRENCY,
                account.create_time,
            )
            await connection.execute(
                "INSERT INTO balance (account_id) VALUES ($1) ON CONFLICT DO NOTHING",
                account.account_id,
            )
            stored = await _get_account(connection, account.account_id)
        if dataclasses.replace(account, create_time=stored.create_time) != stored:
            raise already_exists(account.name)
        return stored

    async def get_account(self, account_id: str) -> Account:
        """Reads an account.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            return await _get_account(connection, account_id)

    async def list_accounts(self, page: Page) -> list[Account]:
        """Reads `page.read_size` accounts by id."""
        rows = await self._database.fetch(
            f"{_ACCOUNT} WHERE account_id > $1 ORDER BY account_id LIMIT $2",
            page.after,
            page.read_size,
        )
        return [_account_from_row(row) for row in rows]

    async def get_balance(self, account_id: str) -> Balance:
        """Reads the money of an account. Takes time by the number of entries for a system account.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            await _get_account(connection, account_id)
            row = await connection.fetchrow(
                "SELECT account_id, posted, held, floor FROM balance WHERE account_id = $1",
                account_id,
            )
            if row is not None:
                return balance_from_row(row)
            posted = await connection.fetchval(
                "SELECT coalesce(sum(amount), 0)::bigint FROM ledger_entry WHERE account_id = $1",
                account_id,
            )
        # Nothing can be set aside there.
        return Balance(account_id=account_id, posted=posted, held=0, floor=posted)

    async def list_entries(self, account_id: str | None, page: Page) -> list[Entry]:
        """Reads `page.read_size` entries by number: of an account, or all with None.

        Raises:
            NotFound: there is no such account.
            InvalidArgument: BAD_PAGE_TOKEN.
        """
        after = number_after(page)
        if account_id is None:
            rows = await self._database.fetch(
                f"{_ENTRY} WHERE number > $1 ORDER BY number LIMIT $2", after, page.read_size
            )
            return [entry_from_row(row) for row in rows]
        async with self._database.transaction() as connection:
            await _get_account(connection, account_id)
            rows = await connection.fetch(
                f"{_ENTRY} WHERE account_id = $1 AND number > $2 ORDER BY number LIMIT $3",
                account_id,
                after,
                page.read_size,
            )
        return [entry_from_row(row) for row in rows]

    async def post_entry(self, posting: Posting, now: datetime) -> Entry:
        """Moves money between a customer's account and system-funding.

        Locks the head and the balance. Returns the entry on the account; the first one when the
        request is a repeat.

        Raises:
            NotFound: there is no such account.
            InvalidArgument: REQUEST_ID_REUSED, or the balance would leave 64 bits.
            FailedPrecondition: INSUFFICIENT_CREDIT.
        """
        async with self._database.transaction() as connection:
            head = await lock_head(connection)
            balances = await lock_balances(connection, [posting.account_id])
            if posting.account_id not in balances:
                raise not_found(account_name(posting.account_id))
            stored = await _find_posted(connection, posting)
            if stored is not None:
                return stored
            check_posting(posting, balances[posting.account_id])
            entries = movement(
                [(posting.account_id, posting.amount), (FUNDING, -posting.amount)],
                number=head.entry_count + 1,
                kind=posting.kind,
                source=posting.request_id,
                description=posting.description,
                now=now,
            )
            await insert_entries(connection, entries)
            await change_balances(connection, posted={posting.account_id: posting.amount}, held={})
            await advance_head(connection, entries=len(entries), records=0)
        return entries[0]


async def _get_account(connection: Connection, account_id: str) -> Account:
    row = await connection.fetchrow(f"{_ACCOUNT} WHERE account_id = $1", account_id)
    if row is None:
        raise not_found(account_name(account_id))
    return _account_from_row(row)


async def _find_posted(connection: Connection, posting: Posting) -> Entry | None:
    row = await connection.fetchrow(
        f"""
        {_ENTRY}
         WHERE account_id = $1
           AND source = $2
           AND kind <> 'usage'
           AND account_id NOT LIKE 'system-%'
        """,
        posting.account_id,
        posting.request_id,
    )
    if row is None:
        return None
    entry = entry_from_row(row)
    if not posting.is_repeat_of(entry):
        raise InvalidArgument(
            "request_id: was used with other content",
            reason=Reason.REQUEST_ID_REUSED,
            metadata={"requestId": posting.request_id},
        )
    return entry


def _account_from_row(row: asyncpg.Record) -> Account:
    return Account(
        account_id=row["account_id"],
        display_name=row["display_name"],
        create_time=row["create_time"],
    )
