"""Limits: created, changed, deleted, listed, watched, and what is used of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime

import asyncpg

from libs.errors import FieldRule, already_exists, invalid_field, not_found
from libs.paging import Page
from libs.postgres import Connection, Database
from services.billing.domain import account_name
from services.billing.limits import (
    LIMITS_PER_SCOPE_MAX,
    Limit,
    LimitUsage,
    RateLimit,
    Scope,
    ScopeKind,
    Span,
    SpendAlert,
    SpendLimit,
    limit_name,
)
from services.billing.store.ledger import lock_balances, lock_head, number_after
from services.billing.store.opening import Count, count_spent, forget_windows, open_window
from services.billing.store.windows import raise_alerts

_LIMIT = """
    SELECT limit_id, account_id, scope_kind, scope_id, amount, span, alert_percents,
           requests_per_minute, input_tokens_per_minute, output_tokens_per_minute,
           concurrent_generations, counted_after, create_time, is_deleted, revision
      FROM usage_limit
"""
_ALERT = "SELECT number, limit_id, percent, window_start, spent, create_time FROM spend_alert"


class LimitStore:
    """Limits. Every method may be repeated; all raise Unavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_limit(self, limit: Limit) -> Limit:
        """Stores a limit, or returns the equal one that is there. Locks balance, then revision.

        A spend limit knows what was spent in its window before, and what is set aside in it. For
        that, and for its alerts, the head is locked, too, before the balance.

        Raises:
            NotFound: there is no such account.
            AlreadyExists: there is a limit with other content.
            InvalidArgument: its scope has too many limits.
        """
        ahead = await self._count_ahead(limit) if isinstance(limit.kind, SpendLimit) else None
        async with self._database.transaction() as connection:
            await _lock_head_for(connection, limit.kind)
            await _lock_account(connection, limit.account_id)
            await _lock_revision(connection)
            stored = await _find(connection, limit.limit_id)
            if stored is None or stored.is_deleted:
                await _check_room(connection, limit)
                stored = await _begin(connection, limit, ahead, limit.create_time)
                await _mark_account(connection, limit.account_id)
        if not limit.is_repeat_of(stored):
            raise already_exists(limit.name)
        return stored

    async def update_limit(
        self,
        limit_id: str,
        kind: SpendLimit | RateLimit,
        now: datetime,
        *,
        account_id: str,
        scope: Scope | None,
    ) -> Limit:
        """Replaces what a limit allows. Locks head, its account's balance, then the revision.

        Lowered below what is spent and held it only lets nothing new in, and tells at once what it
        crossed. With another span it counts what was spent in the window of that.

        Args:
            limit_id: which.
            kind: what it allows from now on.
            now: time of alerts.
            account_id: to be compared with its own; empty to leave that out.
            scope: likewise; None to leave that out.

        Raises:
            NotFound: there is none.
            InvalidArgument: its kind, its account or its scope is another one.
        """
        ahead = await self._count_for(limit_id, kind)
        async with self._database.transaction() as connection:
            await _lock_head_for(connection, kind)
            stored = await _lock(connection, limit_id)
            _check_same(stored, kind, account_id=account_id, scope=scope)
            if stored.kind == kind:
                return stored
            changed = dataclasses.replace(stored, kind=kind)
            if _span_of(kind) is not _span_of(stored.kind):
                return await _begin(connection, changed, ahead, now)
            changed = await _write(connection, changed)
            await raise_alerts(connection, limit_id, now)
            return changed

    async def _count_for(self, limit_id: str, kind: SpendLimit | RateLimit) -> Count | None:
        """Counts for a limit that shall have another span."""
        async with self._database.transaction() as connection:
            found = await _find(connection, limit_id)
        if found is None or found.is_deleted or _span_of(kind) in {None, _span_of(found.kind)}:
            return None
        return await self._count_ahead(dataclasses.replace(found, kind=kind))

    async def _count_ahead(self, limit: Limit) -> Count:
        async with self._database.transaction() as connection:
            return await count_spent(connection, limit)

    async def delete_limit(self, limit_id: str) -> None:
        """Deletes a limit; nothing happens when it was deleted before.

        Locks its account's balance, then the revision.

        Raises:
            NotFound: there was none.
        """
        async with self._database.transaction() as connection:
            found = await _find(connection, limit_id)
            if found is not None and found.is_deleted:
                return
            stored = await _lock(connection, limit_id)
            await forget_windows(connection, limit_id)
            await _write(connection, dataclasses.replace(stored, is_deleted=True))
            await _mark_account(connection, stored.account_id)
            # What is left of it here would only be in the way of another limit of that name. The
            # gate before the leases, as everybody takes them.
            await connection.execute("DELETE FROM quota_bucket WHERE limit_id = $1", limit_id)
            await connection.execute("DELETE FROM place_gate WHERE limit_id = $1", limit_id)
            await connection.execute("DELETE FROM place_lease WHERE limit_id = $1", limit_id)

    async def get_limit(self, limit_id: str, account_id: str | None) -> tuple[Limit, LimitUsage]:
        """Reads a limit and what is used of it.

        Args:
            limit_id: which.
            account_id: whose it has to be; None for anybody's.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            limit = await _find(connection, limit_id)
            if limit is None or limit.is_deleted or account_id not in {None, limit.account_id}:
                raise not_found(limit_name(limit_id))
            return limit, await _usage(connection, limit)

    async def list_limits(self, account_id: str | None, page: Page) -> list[Limit]:
        """Reads `page.read_size` limits by id: of an account, or of all with None."""
        rows = await self._database.fetch(
            f"""
            {_LIMIT}
             WHERE NOT is_deleted
               AND ($1::text IS NULL OR account_id = $1)
               AND limit_id > $2
             ORDER BY limit_id
             LIMIT $3
            """,
            account_id,
            page.after,
            page.read_size,
        )
        return [_limit_from_row(row) for row in rows]

    async def list_limits_after(self, revision: int, count: int) -> list[Limit]:
        """Reads at most `count` limits that changed after a revision, by revision."""
        rows = await self._database.fetch(
            f"{_LIMIT} WHERE revision > $1 ORDER BY revision LIMIT $2", revision, count
        )
        return [_limit_from_row(row) for row in rows]

    async def get_revision(self) -> int:
        """Reads how far the limits have changed."""
        row = await self._database.fetch_row("SELECT value FROM limit_revision")
        assert row is not None
        return int(row["value"])

    async def list_alerts(self, account_id: str | None, page: Page) -> list[SpendAlert]:
        """Reads `page.read_size` alerts by number: of an account, or of all with None.

        Raises:
            InvalidArgument: BAD_PAGE_TOKEN.
        """
        after = number_after(page)
        if account_id is None:
            rows = await self._database.fetch(
                f"{_ALERT} WHERE number > $1 ORDER BY number LIMIT $2", after, page.read_size
            )
        else:
            rows = await self._database.fetch(
                f"{_ALERT} WHERE account_id = $1 AND number > $2 ORDER BY number LIMIT $3",
                account_id,
                after,
                page.read_size,
            )
        return [_alert_from_row(row) for row in rows]


async def _lock_head_for(connection: Connection, kind: SpendLimit | RateLimit) -> None:
    # Who may raise an alert holds it; what a limit of rates allows is nothing that is counted.
    if isinstance(kind, SpendLimit):
        await lock_head(connection)


async def _lock_account(connection: Connection, account_id: str) -> None:
    if account_id not in await lock_balances(connection, [account_id]):
        raise not_found(account_name(account_id))


async def _lock_revision(connection: Connection) -> None:
    # Whoever creates a limit of the same name for another account waits here.
    await connection.execute("SELECT FROM limit_revision FOR UPDATE")


async def _lock(connection: Connection, limit_id: str) -> Limit:
    """Locks the balance of a limit's account and the revision; returns the limit."""
    found = await _find(connection, limit_id)
    if found is None:
        raise not_found(limit_name(limit_id))
    await _lock_account(connection, found.account_id)
    await _lock_revision(connection)
    locked = await _find(connection, limit_id)
    # Between the two readings it may have been deleted, and made anew for somebody else.
    if locked is None or locked.is_deleted or locked.account_id != found.account_id:
        raise not_found(limit_name(limit_id))
    return locked


async def _find(connection: Connection, limit_id: str) -> Limit | None:
    row = await connection.fetchrow(f"{_LIMIT} WHERE limit_id = $1", limit_id)
    return None if row is None else _limit_from_row(row)


async def _check_room(connection: Connection, limit: Limit) -> None:
    count = await connection.fetchval(
        """
        SELECT count(*)
          FROM usage_limit
         WHERE NOT is_deleted AND account_id = $1 AND scope_kind = $2 AND scope_id = $3
        """,
        limit.account_id,
        limit.scope.kind.value,
        limit.scope.scope_id,
    )
    if count >= LIMITS_PER_SCOPE_MAX:
        raise invalid_field(
            "limit.scope", FieldRule.TOO_MANY, f"has {LIMITS_PER_SCOPE_MAX} limits already"
        )


def _check_same(
    stored: Limit, kind: SpendLimit | RateLimit, *, account_id: str, scope: Scope | None
) -> None:
    if account_id and account_id != stored.account_id:
        raise invalid_field("limit.account", FieldRule.CONFLICTING, "never changes")
    if scope is not None and scope != stored.scope:
        raise invalid_field("limit.scope", FieldRule.CONFLICTING, "never changes")
    if type(kind) is not type(stored.kind):
        field = "limit.spend" if isinstance(kind, SpendLimit) else "limit.rate"
        raise invalid_field(field, FieldRule.CONFLICTING, "the kind of a limit never changes")


def _span_of(kind: SpendLimit | RateLimit) -> Span | None:
    return kind.span if isinstance(kind, SpendLimit) else None


async def _begin(connection: Connection, limit: Limit, ahead: Count | None, now: datetime) -> Limit:
    """Writes a limit that is new, or has another span, with all that it has to know."""
    if isinstance(limit.kind, SpendLimit):
        limit = await open_window(connection, limit, ahead)
    written = await _write(connection, limit)
    await raise_alerts(connection, limit.limit_id, now)
    return written


async def _write(connection: Connection, limit: Limit) -> Limit:
    """Writes a limit with the next revision; returns it."""
    spend = limit.kind if isinstance(limit.kind, SpendLimit) else None
    rate = limit.kind if isinstance(limit.kind, RateLimit) else RateLimit()
    revision = await connection.fetchval(
        "UPDATE limit_revision SET value = value + 1 RETURNING value"
    )
    await connection.execute(
        """
        INSERT INTO usage_limit (
            limit_id, account_id, scope_kind, scope_id, amount, span, alert_percents,
            requests_per_minute, input_tokens_per_minute, output_tokens_per_minute,
            concurrent_generations, counted_after, create_time, is_deleted, revision
        )
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
            ON CONFLICT (limit_id)
            DO UPDATE SET (
                account_id, scope_kind, scope_id, amount, span, alert_percents,
                requests_per_minute, input_tokens_per_minute, output_tokens_per_minute,
                concurrent_generations, counted_after, create_time, is_deleted, revision
            ) = ($2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
        """,
        limit.limit_id,
        limit.account_id,
        limit.scope.kind.value,
        limit.scope.scope_id,
        None if spend is None else spend.amount,
        None if spend is None else spend.span.value,
        [] if spend is None else list(spend.alert_percents),
        rate.requests,
        rate.input_tokens,
        rate.output_tokens,
        rate.concurrent_generations,
        limit.counted_after,
        limit.create_time,
        limit.is_deleted,
        revision,
    )
    return dataclasses.replace(limit, revision=revision)


async def _mark_account(connection: Connection, account_id: str) -> None:
    """Says at the account, whose balance is locked, whether it has spend limits."""
    await connection.execute(
        """
        UPDATE balance
           SET has_spend_limits = EXISTS (
                   SELECT
                     FROM usage_limit
                    WHERE account_id = $1 AND NOT is_deleted AND amount IS NOT NULL
               )
         WHERE account_id = $1
        """,
        account_id,
    )


async def _usage(connection: Connection, limit: Limit) -> LimitUsage:
    if isinstance(limit.kind, RateLimit):
        places = await connection.fetchval(
            """
            SELECT coalesce(sum(held), 0)::bigint
              FROM place_lease
             WHERE limit_id = $1 AND expire_time > (SELECT lease_now())
            """,
            limit.limit_id,
        )
        return LimitUsage(places=places)
    row = await connection.fetchrow(
        """
        SELECT coalesce(w.spent, 0) AS spent, coalesce(w.held, 0) AS held,
               window_end($2, t.now) AS window_end
          FROM (SELECT lease_now() AS now) AS t
          LEFT JOIN spend_window AS w
            ON w.limit_id = $1 AND w.window_start = window_start($2, t.now)
        """,
        limit.limit_id,
        limit.kind.span.value,
    )
    assert row is not None
    return LimitUsage(spent=row["spent"], held=row["held"], window_end=row["window_end"])


def _limit_from_row(row: asyncpg.Record) -> Limit:
    return Limit(
        limit_id=row["limit_id"],
        account_id=row["account_id"],
        scope=Scope(ScopeKind(row["scope_kind"]), row["scope_id"]),
        kind=_kind_from_row(row),
        create_time=row["create_time"],
        counted_after=row["counted_after"],
        is_deleted=row["is_deleted"],
        revision=row["revision"],
    )


def _kind_from_row(row: asyncpg.Record) -> SpendLimit | RateLimit:
    if row["amount"] is not None:
        return SpendLimit(
            amount=row["amount"],
            span=Span(row["span"]),
            alert_percents=tuple(row["alert_percents"]),
        )
    return RateLimit(
        requests=row["requests_per_minute"],
        input_tokens=row["input_tokens_per_minute"],
        output_tokens=row["output_tokens_per_minute"],
        concurrent_generations=row["concurrent_generations"],
    )


def _alert_from_row(row: asyncpg.Record) -> SpendAlert:
    return SpendAlert(
        number=row["number"],
        limit_id=row["limit_id"],
        percent=row["percent"],
        window_start=row["window_start"],
        spent=row["spent"],
        create_time=row["create_time"],
    )


async def find_rates(connection: Connection, limit_ids: Sequence[str]) -> dict[str, RateLimit]:
    """Reads the rate limits among limits, by id; those that there are."""
    rows = await connection.fetch(
        f"{_LIMIT} WHERE limit_id = ANY($1::text[]) AND NOT is_deleted", list(limit_ids)
    )
    limits = [_limit_from_row(row) for row in rows]
    return {item.limit_id: item.kind for item in limits if isinstance(item.kind, RateLimit)}
