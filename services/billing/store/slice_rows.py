"""Rows of credit slices. A slice changes only under the lock of its account's balance."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta

import asyncpg

from libs.ids import time_of_ulid
from libs.postgres import Connection
from services.billing.domain import Slice, SliceState

# Of one transaction of the sweeper: it shall not hold many balances for long.
SWEEP_SIZE = 500
_ULID_LENGTH = 26
NOTHING: Mapping[str, int] = {}

_SLICE = """
    SELECT credit_slice_id, account_id, holder, granted, consumed, state,
           state = 'open' AND expire_time > (SELECT lease_now()) AS is_leased
      FROM credit_slice
"""


async def read_slices(connection: Connection, slice_ids: Collection[str]) -> dict[str, Slice]:
    """Reads slices by id; those that there are."""
    rows = await connection.fetch(
        f"{_SLICE} WHERE credit_slice_id = ANY($1::text[])", list(slice_ids)
    )
    return {row["credit_slice_id"]: _slice_from_row(row) for row in rows}


async def renew(
    connection: Connection,
    slice_ids: Collection[str],
    lease: timedelta,
    consumed: Mapping[str, int] = NOTHING,
) -> set[str]:
    """Prolongs the leases of slices whose balances are locked; returns those that still run.

    Takes from them by the same statement. Of windows that have ended, too: what runs stays held.

    Args:
        connection: of the transaction.
        slice_ids: which.
        lease: how long they may be spent from.
        consumed: what is taken from some of them.
    """
    rows = await connection.fetch(
        """
        UPDATE credit_slice
           SET consumed = consumed + change.amount,
               expire_time = CASE WHEN state = 'open' AND expire_time > (SELECT lease_now())
                                  THEN (SELECT lease_now()) + $3 ELSE expire_time END
          FROM unnest($1::text[], $2::bigint[]) AS change (slice_id, amount)
         WHERE credit_slice_id = change.slice_id
           AND (amount > 0 OR state = 'open' AND expire_time > (SELECT lease_now()))
        RETURNING slice_id, state = 'open' AND expire_time > (SELECT lease_now()) AS is_leased
        """,
        list(slice_ids),
        [consumed.get(slice_id, 0) for slice_id in slice_ids],
        lease,
    )
    return {row["slice_id"] for row in rows if row["is_leased"]}


async def set_granted(connection: Connection, item: Slice, granted: int) -> Slice:
    """Says what a slice holds; returns it with how long it may be spent from."""
    lease = await connection.fetchval(
        """
        UPDATE credit_slice
           SET granted = $2
         WHERE credit_slice_id = $1
        RETURNING greatest(least(expire_time, window_end_time) - lease_now(), interval '0')
        """,
        item.slice_id,
        granted,
    )
    return dataclasses.replace(item, granted=granted, lease=lease)


async def insert_slices(
    connection: Connection,
    slices: list[Slice],
    lease: timedelta,
    *,
    newer_than: timedelta | None = None,
) -> set[str]:
    """Inserts slices in order; returns the ids that were not there.

    Args:
        connection: of the transaction.
        slices: which.
        lease: how long they may be spent from.
        newer_than: how old an id may be, where that matters.
    """
    rows = await connection.fetch(
        """
        INSERT INTO credit_slice (
            credit_slice_id, account_id, holder, granted, state, expire_time, end_time
        )
        SELECT credit_slice_id, account_id, holder, granted, state, clock.now + $6,
               CASE WHEN state = 'closed' THEN clock.now END
          FROM unnest(
                   $1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[], $7::timestamptz[]
               ) AS fresh (credit_slice_id, account_id, holder, granted, state, make_time)
         CROSS JOIN (SELECT lease_now() AS now) AS clock
         WHERE coalesce(make_time > clock.now - $8::interval, true)
        ON CONFLICT DO NOTHING
        RETURNING credit_slice_id
        """,
        [item.slice_id for item in slices],
        [item.account_id for item in slices],
        [item.holder for item in slices],
        [item.granted for item in slices],
        [item.state.value for item in slices],
        lease,
        [make_time_of(item.slice_id) for item in slices],
        newer_than,
    )
    return {row["credit_slice_id"] for row in rows}


def make_time_of(slice_id: str) -> datetime | None:
    """When a gateway made an id; None when it has no time."""
    return time_of_ulid(slice_id[-_ULID_LENGTH:])


async def lock_due(
    connection: Connection, state: SliceState, age: timedelta, patience: timedelta | None
) -> tuple[list[Slice], set[str]]:
    """Finds slices in a state whose lease ran out that long ago, and locks their balances.

    Args:
        connection: of the transaction.
        state: of the slices.
        age: how long ago.
        patience: how much longer ago, to wait for balances that are locked; None to skip these.

    Returns: the slices, and those of their accounts that have spend limits.
    """
    age += patience or timedelta()
    skip = "SKIP LOCKED" if patience is None else ""
    rows = await connection.fetch(
        f"""
        SELECT account_id, has_spend_limits
          FROM balance
         WHERE account_id IN (
                   SELECT account_id
                     FROM credit_slice
                    WHERE state IN ('open', 'expired')
                      AND state = $1
                      AND expire_time + $2 <= (SELECT lease_now())
                    LIMIT $3
               )
         ORDER BY account_id
           FOR UPDATE
          {skip}
        """,  # noqa: S608 - made of constants
        state.value,
        age,
        SWEEP_SIZE,
    )
    due = await connection.fetch(
        f"""
        {_SLICE}
         WHERE account_id = ANY($1::text[])
           AND state IN ('open', 'expired')
           AND state = $2
           AND expire_time + $3 <= (SELECT lease_now())
         LIMIT $4
        """,
        [row["account_id"] for row in rows],
        state.value,
        age,
        SWEEP_SIZE,
    )
    limited = {row["account_id"] for row in rows if row["has_spend_limits"]}
    return [_slice_from_row(row) for row in due], limited


def _slice_from_row(row: asyncpg.Record) -> Slice:
    return Slice(
        slice_id=row["credit_slice_id"],
        account_id=row["account_id"],
        holder=row["holder"],
        granted=row["granted"],
        consumed=row["consumed"],
        state=SliceState(row["state"]),
        is_leased=row["is_leased"],
    )
