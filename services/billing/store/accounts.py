"""Accounts, their balances and entries."""

from __future__ import annotations

import dataclasses
from datetime import datetime

import asyncpg

from libs.errors import FailedPrecondition, Reason, already_exists, not_found
from libs.paging import Page
from libs.postgres import Connection, Database
from libs.units import CURRENCY, NANOS_MAX
from services.billing.division import movement
from services.billing.domain import (
    FUNDING,
    Account,
    Balance,
    Entry,
    Posting,
    account_name,
    check_posting,
    check_room,
)
from services.billing.grants import grant_by_entry, grant_of_entry, request_id_reused
from services.billing.store.grants import expire_due, give, with_expired
from services.billing.store.ledger import (
    BALANCE,
    ENTRY,
    advance_head,
    balance_from_row,
    change_posted,
    entry_from_row,
    find_requested,
    insert_entries,
    lock_balances,
    lock_head,
    number_after,
)

_ACCOUNT = """
    SELECT account_id, display_name, create_time, coalesce(credit_limit, 0) AS credit_limit
      FROM account
      LEFT JOIN balance USING (account_id)
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
        wanted = dataclasses.replace(
            account, create_time=stored.create_time, credit_limit=stored.credit_limit
        )
        if wanted != stored:
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
            FailedPrecondition: WRONG_STATE, it is the ledger's own and does not fit 64 bits.
        """
        async with self._database.transaction() as connection:
            await _get_account(connection, account_id)
            row = await connection.fetchrow(f"{BALANCE} WHERE account_id = $1", account_id)
            if row is not None:
                return await with_expired(connection, balance_from_row(row))
            posted = await connection.fetchval(
                "SELECT coalesce(sum(amount), 0) FROM ledger_entry WHERE account_id = $1",
                account_id,
            )
        if abs(posted) > NANOS_MAX:
            # Of customers each fits, but not the sum of all.
            raise FailedPrecondition(
                f"the balance of {account_name(account_id)} does not fit 64 bits",
                reason=Reason.WRONG_STATE,
                metadata={"resource": account_name(account_id), "state": "OUT_OF_RANGE"},
            )
        return Balance(account_id=account_id, posted=int(posted), held=0)

    async def set_credit_limit(self, account_id: str, credit_limit: int) -> Account:
        """Says how far an account may go below zero. Locks the balance.

        What is used already may be more: then nothing is available until the account is above.

        Args:
            account_id: a customer's.
            credit_limit: nanos, zero or more.

        Raises:
            NotFound: there is no such account.
            InvalidArgument: the balance with its limit would leave 64 bits.
        """
        async with self._database.transaction() as connection:
            balances = await lock_balances(connection, [account_id])
            if account_id not in balances:
                raise not_found(account_name(account_id))
            balance = dataclasses.replace(balances[account_id], credit_limit=0)
            check_room(balance, credit_limit, "credit_limit.nanos")
            await connection.execute(
                """
                UPDATE balance
                   SET credit_limit = $2, floor = least(-$2::bigint, posted - held)
                 WHERE account_id = $1
                """,
                account_id,
                credit_limit,
            )
            return await _get_account(connection, account_id)

    async def list_entries(self, account_id: str | None, page: Page) -> list[Entry]:
        """Reads `page.read_size` entries by number: of an account, or all with None.

        Raises:
            NotFound: there is no such account.
            InvalidArgument: BAD_PAGE_TOKEN.
        """
        after = number_after(page)
        if account_id is None:
            rows = await self._database.fetch(
                f"{ENTRY} WHERE number > $1 ORDER BY number LIMIT $2", after, page.read_size
            )
            return [entry_from_row(row) for row in rows]
        async with self._database.transaction() as connection:
            await _get_account(connection, account_id)
            rows = await connection.fetch(
                f"{ENTRY} WHERE account_id = $1 AND number > $2 ORDER BY number LIMIT $3",
                account_id,
                after,
                page.read_size,
            )
        return [entry_from_row(row) for row in rows]

    async def post_entry(self, posting: Posting, now: datetime) -> Entry:
        """Moves money between a customer's account and system-funding.

        Locks the head and the balance. Returns the entry on the account; the first one when the
        request is a repeat. A positive one makes a grant that does not expire.

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
            stored = await find_requested(connection, posting.account_id, posting.request_id)
            if stored is not None:
                # A grant of its own has an id where other entries have a request_id.
                is_other = stored.grant_id not in {None, grant_of_entry(stored.number)}
                if is_other or not posting.is_repeat_of(stored):
                    raise request_id_reused(posting.request_id)
                return stored
            head = await expire_due(connection, head, balances, now)
            balance = balances[posting.account_id]
            check_posting(posting, balance)
            number = head.entry_count + 1
            entries = movement(
                [(posting.account_id, posting.amount), (FUNDING, -posting.amount)],
                number=number,
                kind=posting.kind,
                source=posting.request_id,
                description=posting.description,
                now=now,
                grant_id=grant_of_entry(number) if posting.amount > 0 else None,
            )
            if posting.amount > 0:
                await give(connection, balance, entries, grant_by_entry(entries[0]))
            else:
                await insert_entries(connection, entries)
                await change_posted(connection, {posting.account_id: posting.amount})
                await advance_head(connection, entries=len(entries), records=0)
        return entries[0]


async def _get_account(connection: Connection, account_id: str) -> Account:
    row = await connection.fetchrow(f"{_ACCOUNT} WHERE account_id = $1", account_id)
    if row is None:
        raise not_found(account_name(account_id))
    return _account_from_row(row)


def _account_from_row(row: asyncpg.Record) -> Account:
    return Account(
        account_id=row["account_id"],
        display_name=row["display_name"],
        create_time=row["create_time"],
        credit_limit=row["credit_limit"],
    )
