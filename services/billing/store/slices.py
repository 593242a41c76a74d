"""Credit slices: acquired, closed, swept. A slice changes only under its account's balance lock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from datetime import timedelta

import asyncpg
import structlog

from libs.errors import FailedPrecondition, Reason, already_exists
from libs.postgres import Connection, Database
from services.billing import metrics
from services.billing.domain import Slice, SliceState, grant_of, insufficient_credit
from services.billing.store.ledger import change_balances, lock_balances

log = structlog.get_logger(__name__)

# Of one transaction of the sweeper: it shall not hold many balances for long.
SWEEP_SIZE = 500

_SLICE = """
    SELECT credit_slice_id, account_id, holder, granted, consumed, state,
           state = 'open' AND expire_time > (SELECT lease_now()) AS is_leased
      FROM credit_slice
"""


class SliceStore:
    """Credit slices. Every method may be repeated; all raise Unavailable."""

    def __init__(self, database: Database, *, lease_s: float, grace_s: float) -> None:
        self._database = database
        self._lease = timedelta(seconds=lease_s)
        self._grace = timedelta(seconds=grace_s)

    async def acquire(
        self, *, slice_id: str, account_id: str, holder: str, required: int, wanted: int
    ) -> Slice:
        """Sets money aside. Locks the balance. A repeat renews the lease and returns the slice.

        Raises:
            FailedPrecondition: INSUFFICIENT_CREDIT, also when there is no such account; or
                SLICE_NOT_OPEN, the slice was closed before or its lease has run out.
            AlreadyExists: the id belongs to another account or holder.
        """
        async with self._database.transaction() as connection:
            balances = await lock_balances(connection, [account_id])
            found = (await read_slices(connection, [slice_id])).get(slice_id)
            if found is not None:
                _check_repeat(found, account_id=account_id, holder=holder)
                await renew(connection, [slice_id], self._lease)
                return found
            if account_id not in balances:
                raise insufficient_credit(account_id, required=required, available=0)
            granted = grant_of(balances[account_id], required=required, wanted=wanted)
            fresh = Slice(
                slice_id=slice_id,
                account_id=account_id,
                holder=holder,
                granted=granted,
                consumed=0,
                state=SliceState.OPEN,
                is_leased=True,
            )
            if not await _insert(connection, [fresh], self._lease):
                # It was closed in this very moment.
                raise _not_open(slice_id, SliceState.CLOSED)
            await change_balances(connection, posted={}, held={account_id: granted})
        return fresh

    async def close(self, slice_ids: Iterable[str], *, holder: str) -> None:
        """Gives the rest of slices back. Locks their accounts' balances.

        An id that is not known is marked as closed, so that it cannot be acquired later.
        """
        wanted = set(slice_ids)
        while wanted:
            wanted = await self._close(wanted, holder)

    async def _close(self, slice_ids: set[str], holder: str) -> set[str]:
        """Closes; returns the slices that were acquired in the meantime, to be closed again."""
        async with self._database.transaction() as connection:
            balances = await lock_balances(connection, [], slice_ids)
            slices = await read_slices(connection, slice_ids)
            holding = [item for item in slices.values() if item.state.holds_money]
            locked = [item for item in holding if item.account_id in balances]
            await _end(connection, locked, SliceState.CLOSED)
            marks = [_mark(slice_id, holder) for slice_id in sorted(slice_ids - slices.keys())]
            marked = await _insert(connection, marks, timedelta())
        overtaken = {mark.slice_id for mark in marks} - marked
        return overtaken | {item.slice_id for item in holding} - {item.slice_id for item in locked}

    async def sweep(self) -> None:
        """Marks slices whose lease has run out, and frees what is left of them after the grace.

        Locks balances that nobody else has locked; the others come with the next sweep.
        """
        while await self._expire() >= SWEEP_SIZE:
            pass
        while await self._reclaim() >= SWEEP_SIZE:
            pass

    async def _expire(self) -> int:
        async with self._database.transaction() as connection:
            due = await _lock_due(connection, SliceState.OPEN, timedelta())
            await _end(connection, due, SliceState.EXPIRED)
        for item in due:
            log.warning("slice expired", slice=item.slice_id, holder=item.holder)
        metrics.SLICES_EXPIRED.inc(len(due))
        return len(due)

    async def _reclaim(self) -> int:
        async with self._database.transaction() as connection:
            due = await _lock_due(connection, SliceState.EXPIRED, self._grace)
            await _end(connection, due, SliceState.RECLAIMED)
        for item in due:
            log.warning("slice reclaimed", slice=item.slice_id, freed_nanos=item.remaining)
        metrics.SLICES_RECLAIMED.inc(len(due))
        return len(due)


async def read_slices(connection: Connection, slice_ids: Collection[str]) -> dict[str, Slice]:
    """Reads slices by id; those that there are."""
    rows = await connection.fetch(
        f"{_SLICE} WHERE credit_slice_id = ANY($1::text[])", list(slice_ids)
    )
    return {row["credit_slice_id"]: _slice_from_row(row) for row in rows}


async def renew(connection: Connection, slice_ids: Collection[str], lease: timedelta) -> set[str]:
    """Prolongs the leases of slices whose balances are locked; returns those that still run."""
    rows = await connection.fetch(
        """
        UPDATE credit_slice
           SET expire_time = (SELECT lease_now()) + $2
         WHERE credit_slice_id = ANY($1::text[])
           AND state = 'open'
           AND expire_time > (SELECT lease_now())
        RETURNING credit_slice_id
        """,
        list(slice_ids),
        lease,
    )
    return {row["credit_slice_id"] for row in rows}


async def consume(connection: Connection, amounts: dict[str, int]) -> None:
    """Takes from slices whose balances are locked."""
    await connection.execute(
        """
        UPDATE credit_slice
           SET consumed = consumed + change.amount
          FROM unnest($1::text[], $2::bigint[]) AS change (credit_slice_id, amount)
         WHERE credit_slice.credit_slice_id = change.credit_slice_id
        """,
        list(amounts.keys()),
        list(amounts.values()),
    )


async def _insert(connection: Connection, slices: list[Slice], lease: timedelta) -> set[str]:
    """Inserts slices in order; returns the ids that were not there."""
    rows = await connection.fetch(
        """
        INSERT INTO credit_slice (
            credit_slice_id, account_id, holder, granted, state, expire_time
        )
        SELECT fresh.*, (SELECT lease_now()) + $6
          FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[]) AS fresh
        ON CONFLICT DO NOTHING
        RETURNING credit_slice_id
        """,
        [item.slice_id for item in slices],
        [item.account_id for item in slices],
        [item.holder for item in slices],
        [item.granted for item in slices],
        [item.state.value for item in slices],
        lease,
    )
    return {row["credit_slice_id"] for row in rows}


async def _end(connection: Connection, slices: list[Slice], state: SliceState) -> None:
    """Changes the state of slices whose balances are locked, freeing what no longer is held."""
    if not slices:
        return
    await connection.execute(
        "UPDATE credit_slice SET state = $2 WHERE credit_slice_id = ANY($1::text[])",
        [item.slice_id for item in slices],
        state.value,
    )
    if state.holds_money:
        return
    freed: Counter[str] = Counter()
    for item in slices:
        assert item.account_id is not None
        freed[item.account_id] -= item.remaining
    await change_balances(connection, posted={}, held=freed)


async def _lock_due(connection: Connection, state: SliceState, age: timedelta) -> list[Slice]:
    """Finds slices in a state whose lease ran out that long ago, and locks their balances."""
    rows = await connection.fetch(
        """
        SELECT account_id
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
          SKIP LOCKED
        """,
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
    return [_slice_from_row(row) for row in due]


def _check_repeat(found: Slice, *, account_id: str, holder: str) -> None:
    if not found.is_leased:
        state = SliceState.EXPIRED if found.state is SliceState.OPEN else found.state
        raise _not_open(found.slice_id, state)
    if (found.account_id, found.holder) != (account_id, holder):
        raise already_exists(f"creditSlices/{found.slice_id}")


def _not_open(slice_id: str, state: SliceState) -> FailedPrecondition:
    return FailedPrecondition(
        f"slice {slice_id} is {state.value}",
        reason=Reason.SLICE_NOT_OPEN,
        metadata={"slice": slice_id, "state": state.value.upper()},
    )


def _mark(slice_id: str, holder: str) -> Slice:
    return Slice(
        slice_id=slice_id,
        account_id=None,
        holder=holder,
        granted=0,
        consumed=0,
        state=SliceState.CLOSED,
        is_leased=False,
    )


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
