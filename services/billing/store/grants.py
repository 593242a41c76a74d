"""Grants: given, listed, and taken back when they expire."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import asyncpg

from libs.errors import FieldRule, already_exists, invalid_field, not_found
from libs.paging import Page, bad_page_token
from libs.postgres import Connection, Database
from services.billing import metrics
from services.billing.division import Head, movement
from services.billing.domain import (
    FUNDING,
    Balance,
    Entry,
    EntryKind,
    GrantKind,
    account_name,
    check_room,
)
from services.billing.grants import Grant, expired_parts, next_expiry, remaining_of
from services.billing.store.ledger import (
    BALANCE,
    advance_head,
    balance_from_row,
    change_posted,
    find_requested,
    insert_entries,
    lock_balances,
    lock_head,
)

# Accounts of one transaction of the sweeper: it holds the head of the ledger meanwhile.
EXPIRE_SIZE = 200

_GRANT = """
    SELECT account_id, grant_id, number, kind, amount, remaining, priority, expire_time,
           create_time, description
      FROM credit_grant
"""
_ENTRY_KINDS = {GrantKind.GIFT: EntryKind.GRANT, GrantKind.TOP_UP: EntryKind.TOP_UP}
# Before every key.
_FIRST_KEY = (False, -1, "-infinity", -1)
_KEY_PARTS = len(_FIRST_KEY)
_DIGITS_MAX = 18
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class GrantStore:
    """Grants. Every method may be repeated; all raise Unavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_grant(self, grant: Grant, now: datetime) -> Grant:
        """Gives credit, or returns the equal grant that is there. Locks the head and the balance.

        Args:
            grant: without number and remaining.
            now: time of grant and entries.

        Raises:
            NotFound: there is no such account.
            AlreadyExists: there is one with other content, or a request_id of the account is the
                same.
            InvalidArgument: it has expired, or the balance would leave 64 bits.
        """
        async with self._database.transaction() as connection:
            head = await lock_head(connection)
            balances = await lock_balances(connection, [grant.account_id])
            if grant.account_id not in balances:
                raise not_found(account_name(grant.account_id))
            stored = await _find_grant(connection, grant)
            if stored is not None:
                return stored
            await _check_new(connection, grant)
            head = await expire_due(connection, head, balances, now)
            balance = balances[grant.account_id]
            check_room(balance, grant.amount, "grant.amount.nanos")
            entries = movement(
                [(grant.account_id, grant.amount), (FUNDING, -grant.amount)],
                number=head.entry_count + 1,
                kind=_ENTRY_KINDS[grant.kind],
                source=grant.grant_id,
                description=grant.description,
                now=now,
                grant_id=grant.grant_id,
            )
            return await give(connection, balance, entries, grant)

    async def list_grants(
        self, account_id: str, page: Page, *, show_all: bool
    ) -> list[tuple[str, Grant]]:
        """Reads `page.read_size` grants of an account, each with its key for the next page.

        In the order in which they are used up; those that are used up or expired come last, and
        only with `show_all`.

        Raises:
            NotFound: there is no such account.
            InvalidArgument: BAD_PAGE_TOKEN.
        """
        after = _key_from_text(page.after)
        async with self._database.transaction() as connection:
            if not await connection.fetchval(
                "SELECT EXISTS (SELECT FROM account WHERE account_id = $1)", account_id
            ):
                raise not_found(account_name(account_id))
            rows = await connection.fetch(
                f"""
                SELECT *
                  FROM (
                           SELECT given.*,
                                  remaining = 0 OR coalesce(
                                      expire_time <= (SELECT lease_now()), false
                                  ) AS is_over
                             FROM ({_GRANT} WHERE account_id = $1) AS given
                       ) AS listed
                 WHERE (is_over, priority, coalesce(expire_time, 'infinity'), number)
                       > ($2, $3::bigint, $4::text::timestamptz, $5::bigint)
                   AND ($6 OR NOT is_over)
                 ORDER BY is_over, priority, coalesce(expire_time, 'infinity'), number
                 LIMIT $7
                """,  # noqa: S608 - made of constants
                account_id,
                *after,
                show_all,
                page.read_size,
            )
        grants = [grant_from_row(row) for row in rows]
        return [
            (_key_to_text(grant, is_over=row["is_over"]), grant)
            for row, grant in zip(rows, grants, strict=True)
        ]

    async def sweep(self, now: datetime) -> None:
        """Takes back what has expired and what nobody touches. Locks the head and balances.

        Balances that somebody else has locked come with the next sweep.
        """
        last: str | None = ""
        while last is not None:
            last = await self._sweep_behind(last, now)

    async def _sweep_behind(self, last: str, now: datetime) -> str | None:
        """Does some accounts; returns the last of them, None when there are no more."""
        rows = await self._database.fetch(
            """
            SELECT account_id
              FROM balance
             WHERE next_expire_time <= (SELECT lease_now())
               AND account_id > $1
             ORDER BY account_id
             LIMIT $2
            """,
            last,
            EXPIRE_SIZE,
        )
        account_ids = [row["account_id"] for row in rows]
        if account_ids:
            async with self._database.transaction() as connection:
                head = await lock_head(connection)
                locked = await connection.fetch(
                    f"""
                    {BALANCE}
                     WHERE account_id = ANY($1::text[])
                     ORDER BY account_id
                       FOR UPDATE
                      SKIP LOCKED
                    """,
                    account_ids,
                )
                balances = {row["account_id"]: balance_from_row(row) for row in locked}
                await expire_due(connection, head, balances, now)
        return account_ids[-1] if len(account_ids) == EXPIRE_SIZE else None


async def give(
    connection: Connection, balance: Balance, entries: Sequence[Entry], grant: Grant
) -> Grant:
    """Writes entries and the grant that they give, under the locks of the head and the balance.

    Args:
        connection: of the transaction.
        balance: of the account, before.
        entries: the first is that on the account.
        grant: without number and remaining. The balance has room for it.
    """
    given = dataclasses.replace(
        grant,
        number=entries[0].number,
        remaining=remaining_of(balance.posted, grant.amount),
    )
    await insert_entries(connection, entries)
    await connection.execute(
        """
        INSERT INTO credit_grant (
            account_id, grant_id, number, kind, amount, remaining, priority, expire_time,
            create_time, description, is_live
        )
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $6::bigint > 0)
        """,
        given.account_id,
        given.grant_id,
        given.number,
        given.kind.value,
        given.amount,
        given.remaining,
        given.priority,
        given.expire_time,
        given.create_time,
        given.description,
    )
    await change_posted(connection, {given.account_id: given.amount})
    if given.expire_time is not None and given.remaining:
        await connection.execute(
            """
            UPDATE balance
               SET next_expire_time = least(next_expire_time, $2)
             WHERE account_id = $1
            """,
            given.account_id,
            given.expire_time,
        )
    await advance_head(connection, entries=len(entries), records=0)
    return given


async def expire_due(
    connection: Connection, head: Head, balances: dict[str, Balance], now: datetime
) -> Head:
    """Takes back what has expired of accounts whose balances, and the head, are locked.

    Args:
        connection: of the transaction.
        head: how far the ledger is written.
        balances: locked ones; those that change are replaced in it.
        now: time of the entries.

    Returns:
        How far the ledger is written then.
    """
    due = [balance for balance in balances.values() if balance.is_due]
    if not due:
        return head
    state = await _read_expiry(connection, [balance.account_id for balance in due])
    entries: list[Entry] = []
    taken: list[tuple[Grant, int]] = []
    for balance in due:
        parts = state.parts(balance)
        taken += parts
        total = 0
        for grant, part in parts:
            entries += movement(
                [(grant.account_id, -part), (FUNDING, part)],
                number=head.entry_count + len(entries) + 1,
                kind=EntryKind.EXPIRY,
                source=grant.grant_id,
                description="",
                now=now,
                grant_id=grant.grant_id,
            )
            total += part
        balances[balance.account_id] = dataclasses.replace(
            balance, posted=balance.posted - total, is_due=False
        )
    if taken:
        await _take_back(connection, entries, taken)
    await _set_next_expiry(connection, state, [balance.account_id for balance in due], taken)
    return dataclasses.replace(head, entry_count=head.entry_count + len(entries))


async def with_expired(connection: Connection, balance: Balance) -> Balance:
    """Completes a balance that is only read by what has expired of it."""
    if not balance.is_due:
        return balance
    state = await _read_expiry(connection, [balance.account_id])
    return dataclasses.replace(balance, expired=sum(part for _, part in state.parts(balance)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expiry:
    """What decides about expiry.

    Attributes:
        now: on the clock of leases.
        live: grants with something left, by account.
        rests: when slices were acquired and what is left of them, by account.
    """

    now: datetime
    live: dict[str, list[Grant]] = field(default_factory=dict)
    rests: dict[str, list[tuple[datetime, int]]] = field(default_factory=dict)

    def parts(self, balance: Balance) -> list[tuple[Grant, int]]:
        """Tells what of which grants of an account can be taken back."""
        return expired_parts(
            balance,
            self.live.get(balance.account_id, []),
            now=self.now,
            held_since=self._held_since(balance.account_id),
        )

    def _held_since(self, account_id: str) -> Callable[[datetime], int]:
        rests = self.rests.get(account_id, [])
        return lambda time: sum(rest for acquired, rest in rests if acquired < time)


async def _read_expiry(connection: Connection, account_ids: Collection[str]) -> _Expiry:
    state = _Expiry(now=await connection.fetchval("SELECT lease_now()"))
    for row in await connection.fetch(
        f"{_GRANT} WHERE is_live AND account_id = ANY($1::text[])", list(account_ids)
    ):
        state.live.setdefault(row["account_id"], []).append(grant_from_row(row))
    for row in await connection.fetch(
        """
        SELECT account_id, acquire_time, granted - consumed AS rest
          FROM credit_slice
         WHERE account_id = ANY($1::text[])
           AND state IN ('open', 'expired')
           AND consumed < granted
        """,
        list(account_ids),
    ):
        rests = state.rests.setdefault(row["account_id"], [])
        rests.append((row["acquire_time"], row["rest"]))
    return state


async def _take_back(
    connection: Connection, entries: Sequence[Entry], taken: Sequence[tuple[Grant, int]]
) -> None:
    await insert_entries(connection, entries)
    await connection.execute(
        """
        UPDATE credit_grant
           SET remaining = remaining - part.amount, is_live = remaining > part.amount
          FROM unnest($1::text[], $2::text[], $3::bigint[]) AS part (account_id, grant_id, amount)
         WHERE credit_grant.account_id = part.account_id
           AND credit_grant.grant_id = part.grant_id
        """,
        [grant.account_id for grant, _ in taken],
        [grant.grant_id for grant, _ in taken],
        [part for _, part in taken],
    )
    posted: dict[str, int] = {}
    for grant, part in taken:
        posted[grant.account_id] = posted.get(grant.account_id, 0) - part
    await change_posted(connection, posted)
    await advance_head(connection, entries=len(entries), records=0)
    metrics.GRANTS_EXPIRED.inc(sum(part for _, part in taken))


async def _set_next_expiry(
    connection: Connection,
    state: _Expiry,
    account_ids: Sequence[str],
    taken: Sequence[tuple[Grant, int]],
) -> None:
    parts: Mapping[tuple[str, str], int] = {
        (grant.account_id, grant.grant_id): part for grant, part in taken
    }
    times: list[datetime | None] = []
    for account_id in account_ids:
        live = [
            grant
            for grant in state.live.get(account_id, [])
            if grant.remaining > parts.get((account_id, grant.grant_id), 0)
        ]
        times.append(next_expiry(live))
    await connection.execute(
        """
        UPDATE balance
           SET next_expire_time = change.time
          FROM unnest($1::text[], $2::timestamptz[]) AS change (account_id, time)
         WHERE balance.account_id = change.account_id
           AND balance.next_expire_time IS DISTINCT FROM change.time
        """,
        list(account_ids),
        times,
    )


async def _find_grant(connection: Connection, grant: Grant) -> Grant | None:
    row = await connection.fetchrow(
        f"{_GRANT} WHERE account_id = $1 AND grant_id = $2", grant.account_id, grant.grant_id
    )
    if row is None:
        return None
    stored = grant_from_row(row)
    if not grant.is_repeat_of(stored):
        raise already_exists(grant.name)
    return stored


async def _check_new(connection: Connection, grant: Grant) -> None:
    # Its id is the source of its entry, as request_ids are of theirs.
    if await find_requested(connection, grant.account_id, grant.grant_id) is not None:
        raise already_exists(grant.name)
    if grant.expire_time is None:
        return
    if await connection.fetchval("SELECT $1 <= lease_now()", grant.expire_time):
        raise invalid_field("grant.expire_time", FieldRule.OUT_OF_RANGE, "must be in the future")


def grant_from_row(row: asyncpg.Record) -> Grant:
    """Reads a grant."""
    return Grant(
        account_id=row["account_id"],
        grant_id=row["grant_id"],
        number=row["number"],
        kind=GrantKind(row["kind"]),
        amount=row["amount"],
        remaining=row["remaining"],
        priority=row["priority"],
        expire_time=row["expire_time"],
        create_time=row["create_time"],
        description=row["description"],
    )


def _key_to_text(grant: Grant, *, is_over: bool) -> str:
    expiry = "-"
    if grant.expire_time is not None:
        since = grant.expire_time - _EPOCH
        expiry = str(since.days * 86_400_000_000 + since.seconds * 1_000_000 + since.microseconds)
    return f"{int(is_over)}.{grant.priority}.{expiry}.{grant.number}"


def _key_from_text(text: str) -> tuple[bool, int, str, int]:
    if not text:
        return _FIRST_KEY
    parts = text.split(".")
    if len(parts) != _KEY_PARTS:
        raise bad_page_token()
    over, priority, expiry, number = parts
    for part in (over, priority, number) if expiry == "-" else parts:
        if not (part.isascii() and part.isdecimal() and len(part) <= _DIGITS_MAX):
            raise bad_page_token()
    return over != "0", int(priority), _expiry_from_text(expiry), int(number)


def _expiry_from_text(text: str) -> str:
    if text == "-":
        return "infinity"
    try:
        return (_EPOCH + timedelta(microseconds=int(text))).isoformat()
    except OverflowError:
        raise bad_page_token() from None
