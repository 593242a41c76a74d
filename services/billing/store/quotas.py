"""Quota and places of rate limits, shared by all gateways.

The tables are not written ahead: nothing here is worth a wait for the disk. After a crash of the
database they are empty, and every limit starts anew: one more burst at most, and places that are
in use are held again with the next renewals.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from libs.errors import unavailable
from libs.postgres import Connection, Database
from services.billing.quotas import (
    PLACES_LEASE_S,
    Bucket,
    Claim,
    PlaceWish,
    QuotaAmount,
    Refusal,
    Wish,
    grants_of,
    larger_than_limit,
    places_of,
)
from services.billing.store.limits import find_rates

# Rows that are missing are inserted by a transaction of their own, so that locks are always taken
# in one order. They are missing again only when the limit is deleted in that very moment.
_TRIES = 3
_PLACES_LEASE = timedelta(seconds=PLACES_LEASE_S)
# Calls for one limit wait for each other. Those above this wait without a connection, so that they
# leave some for money.
_TRANSACTIONS_MAX = 4

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class _Locked:
    """Buckets that are locked, at one moment of the database's clock."""

    buckets: dict[Key, Bucket]
    now: datetime


class QuotaStore:
    """Quota. No method may be repeated, but HoldPlaces; all raise Unavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turns = asyncio.Semaphore(_TRANSACTIONS_MAX)

    async def take(self, holder: str, amounts: Sequence[QuotaAmount]) -> list[int] | Refusal:
        """Takes from limits, all or nothing. Locks their buckets, by limit and metric.

        What no limit limits (any more) is granted as it is required.

        Args:
            holder: instance of the gateway.
            amounts: of different buckets.

        Returns:
            what each amount got, at least what it requires; or which has to wait how long.

        Raises:
            InvalidArgument: LARGER_THAN_LIMIT, more is required than the limit ever has.
        """
        for _ in range(_TRIES):
            async with self._transaction() as connection:
                rates = await _rates(connection, amounts)
                _check_sizes(amounts, rates)
                locked = await _lock_buckets(connection, rates)
                if rates.keys() == locked.buckets.keys():
                    return await _take(connection, holder, amounts, rates, locked)
            await self._add_buckets(rates.keys() - locked.buckets.keys())
        raise unavailable("quota")

    async def give_back(self, holder: str, amounts: Sequence[QuotaAmount]) -> None:
        """Gives back what was taken and not used, as far as it has not flowed back by itself.

        Locks buckets, by limit and metric.
        """
        async with self._transaction() as connection:
            rates = await _rates(connection, amounts)
            locked = await _lock_buckets(connection, rates)
            changed: dict[Key, Bucket] = {}
            for amount in amounts:
                if amount.key in locked.buckets:
                    bucket = locked.buckets[amount.key]
                    drained = bucket.drained(locked.now, per_minute=rates[amount.key])
                    changed[amount.key] = drained.given_back(holder, amount.required)
            await _write_buckets(connection, changed)

    async def hold_places(self, holder: str, wishes: Sequence[PlaceWish]) -> list[int]:
        """Holds places for a lease; returns how many of each limit. Locks gates, by limit.

        What is not named is given back. What no limit limits (any more) is held as it is wanted.

        Args:
            holder: instance of the gateway.
            wishes: of different limits.
        """
        for _ in range(_TRIES):
            async with self._transaction() as connection:
                limits = await find_rates(connection, [wish.limit_id for wish in wishes])
                totals = {
                    limit_id: limit.concurrent_generations
                    for limit_id, limit in limits.items()
                    if limit.concurrent_generations is not None
                }
                gates = await _lock_gates(connection, totals)
                if gates == totals.keys():
                    return await _hold_places(connection, holder, wishes, totals)
            await self._add_gates(totals.keys() - gates)
        raise unavailable("quota")

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Connection]:
        """Opens a transaction that does not wait for the disk."""
        async with self._turns, self._database.transaction() as connection:
            await connection.execute("SET LOCAL synchronous_commit = off")
            yield connection

    async def _add_buckets(self, keys: Iterable[Key]) -> None:
        ordered = sorted(keys)
        await self._database.fetch(
            """
            INSERT INTO quota_bucket (limit_id, metric, level, shares, drain_time)
            SELECT *, 0, '{}', lease_now()
              FROM unnest($1::text[], $2::smallint[])
                ON CONFLICT DO NOTHING
            """,
            [limit_id for limit_id, _ in ordered],
            [metric for _, metric in ordered],
        )

    async def _add_gates(self, limit_ids: Iterable[str]) -> None:
        await self._database.fetch(
            "INSERT INTO place_gate SELECT * FROM unnest($1::text[]) ON CONFLICT DO NOTHING",
            sorted(limit_ids),
        )


async def _rates(connection: Connection, amounts: Sequence[QuotaAmount]) -> dict[Key, int]:
    """Reads how many a minute are allowed, for the amounts that are limited."""
    limits = await find_rates(connection, sorted({amount.limit_id for amount in amounts}))
    rates: dict[Key, int] = {}
    for amount in amounts:
        rate = amount.metric.rate_of(limits.get(amount.limit_id))
        if rate is not None:
            rates[amount.key] = rate
    return rates


def _check_sizes(amounts: Sequence[QuotaAmount], rates: Mapping[Key, int]) -> None:
    for index, amount in enumerate(amounts):
        most = rates.get(amount.key)
        if most is not None and amount.required > most:
            raise larger_than_limit(amount, f"amounts[{index}].required", most=most)


async def _lock_buckets(connection: Connection, keys: Iterable[Key]) -> _Locked:
    """Locks buckets in order; those that there are."""
    wanted = list(keys)
    rows = await connection.fetch(
        """
        SELECT b.limit_id, b.metric, b.level, b.shares, b.drain_time
          FROM quota_bucket AS b
          JOIN unnest($1::text[], $2::smallint[]) AS wanted (limit_id, metric)
            ON (b.limit_id, b.metric) = (wanted.limit_id, wanted.metric)
         ORDER BY b.limit_id, b.metric
           FOR UPDATE OF b
        """,
        [limit_id for limit_id, _ in wanted],
        [metric for _, metric in wanted],
    )
    # After the wait for the locks.
    now = await connection.fetchval("SELECT lease_now()")
    buckets = {
        (row["limit_id"], row["metric"]): Bucket(
            row["level"], row["drain_time"], json.loads(row["shares"])
        )
        for row in rows
    }
    return _Locked(buckets, now)


async def _take(
    connection: Connection,
    holder: str,
    amounts: Sequence[QuotaAmount],
    rates: Mapping[Key, int],
    locked: _Locked,
) -> list[int] | Refusal:
    limited = [amount for amount in amounts if amount.key in rates]
    wishes = [
        Wish(
            bucket=locked.buckets[amount.key].drained(locked.now, per_minute=rates[amount.key]),
            per_minute=rates[amount.key],
            required=amount.required,
            wanted=amount.wanted,
        )
        for amount in limited
    ]
    grants = grants_of(wishes)
    if isinstance(grants, Refusal):
        return Refusal(amounts.index(limited[grants.index]), grants.wait)
    granted = {amount.key: count for amount, count in zip(limited, grants, strict=True)}
    await _write_buckets(
        connection,
        {
            amount.key: wish.bucket.taken(holder, granted[amount.key])
            for amount, wish in zip(limited, wishes, strict=True)
        },
    )
    return [granted.get(amount.key, amount.required) for amount in amounts]


async def _write_buckets(connection: Connection, buckets: Mapping[Key, Bucket]) -> None:
    if not buckets:
        return
    await connection.execute(
        """
        UPDATE quota_bucket AS b
           SET level = change.level, shares = change.shares, drain_time = change.drain_time
          FROM unnest($1::text[], $2::smallint[], $3::bigint[], $4::jsonb[], $5::timestamptz[])
                   AS change (limit_id, metric, level, shares, drain_time)
         WHERE (b.limit_id, b.metric) = (change.limit_id, change.metric)
        """,
        [limit_id for limit_id, _ in buckets],
        [metric for _, metric in buckets],
        [bucket.level for bucket in buckets.values()],
        [json.dumps(bucket.shares) for bucket in buckets.values()],
        [bucket.drain_time for bucket in buckets.values()],
    )


async def _lock_gates(connection: Connection, limit_ids: Iterable[str]) -> set[str]:
    rows = await connection.fetch(
        """
        SELECT limit_id
          FROM place_gate
         WHERE limit_id = ANY($1::text[])
         ORDER BY limit_id
           FOR UPDATE
        """,
        list(limit_ids),
    )
    return {row["limit_id"] for row in rows}


async def _hold_places(
    connection: Connection,
    holder: str,
    wishes: Sequence[PlaceWish],
    totals: Mapping[str, int],
) -> list[int]:
    claims = await _read_claims(connection, totals)
    held: dict[str, int] = {}
    for wish in wishes:
        if wish.limit_id not in totals:
            continue
        running = claims.get(wish.limit_id, {})
        before = running.get(holder)
        held[wish.limit_id] = places_of(
            Claim(
                holder=holder,
                held=0 if before is None else before.held,
                in_use=wish.in_use,
                wanted=wish.wanted,
            ),
            [claim for claim in running.values() if claim.holder != holder],
            total=totals[wish.limit_id],
        )
    limited = [wish for wish in wishes if wish.limit_id in held]
    await _write_claims(connection, holder, limited, held)
    return [held.get(wish.limit_id, max(wish.wanted, wish.in_use)) for wish in wishes]


async def _read_claims(
    connection: Connection, limit_ids: Iterable[str]
) -> dict[str, dict[str, Claim]]:
    """Reads the claims whose leases run, by limit and holder."""
    rows = await connection.fetch(
        """
        SELECT limit_id, holder, held, in_use, wanted
          FROM place_lease
         WHERE limit_id = ANY($1::text[]) AND expire_time > (SELECT lease_now())
        """,
        list(limit_ids),
    )
    claims: dict[str, dict[str, Claim]] = {}
    for row in rows:
        claims.setdefault(row["limit_id"], {})[row["holder"]] = Claim(
            holder=row["holder"], held=row["held"], in_use=row["in_use"], wanted=row["wanted"]
        )
    return claims


async def _write_claims(
    connection: Connection,
    holder: str,
    wishes: Sequence[PlaceWish],
    held: Mapping[str, int],
) -> None:
    limit_ids = [wish.limit_id for wish in wishes]
    # With those of gateways that are gone.
    await connection.execute(
        """
        DELETE FROM place_lease
         WHERE (holder = $1 AND limit_id <> ALL($2::text[]))
            OR (limit_id = ANY($2::text[]) AND expire_time <= (SELECT lease_now()))
        """,
        holder,
        limit_ids,
    )
    await connection.execute(
        """
        INSERT INTO place_lease (limit_id, holder, held, in_use, wanted, expire_time)
        SELECT claim.limit_id, $1, claim.held, claim.in_use, claim.wanted,
               (SELECT lease_now()) + $6
          FROM unnest($2::text[], $3::bigint[], $4::bigint[], $5::bigint[])
                   AS claim (limit_id, held, in_use, wanted)
            ON CONFLICT (limit_id, holder)
            DO UPDATE SET (held, in_use, wanted, expire_time)
                = (EXCLUDED.held, EXCLUDED.in_use, EXCLUDED.wanted, EXCLUDED.expire_time)
        """,
        holder,
        limit_ids,
        [held[limit_id] for limit_id in limit_ids],
        [wish.in_use for wish in wishes],
        [wish.wanted for wish in wishes],
        _PLACES_LEASE,
    )
