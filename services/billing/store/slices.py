"""Credit slices: acquired, closed, swept. A slice changes only under its account's balance lock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from libs import failpoints
from libs.errors import FailedPrecondition, Reason, already_exists
from libs.postgres import Connection, Database
from services.billing import metrics
from services.billing.domain import Balance, Slice, SliceState, grant_of, insufficient_credit
from services.billing.store.grants import expire_due
from services.billing.store.ledger import change_held, lock_balances, lock_head
from services.billing.store.slice_rows import (
    SWEEP_SIZE,
    insert_slices,
    lock_due,
    make_time_of,
    read_slices,
    renew,
    set_granted,
)
from services.billing.store.spend import NoSpendWindows, SpendWindows, SpendWish

log = structlog.get_logger(__name__)

# An account that is always settled is always locked; so long after it was due, it is waited for.
STARVED = timedelta(seconds=30)
RETENTION_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceWish:
    """Money that a gateway wants to spend.

    Attributes:
        slice_id: made by the gateway.
        account_id: whose money.
        holder: the gateway's instance.
        required: nanos, the least that are of use.
        wanted: nanos.
        project_id: who alone may spend it; empty for the whole account.
        api_key_id: the key that alone may spend it; empty for all.
    """

    slice_id: str
    account_id: str
    holder: str
    required: int
    wanted: int
    project_id: str = ""
    api_key_id: str = ""


class SliceStore:
    """Credit slices. Every method may be repeated; all raise Unavailable.

    Args:
        database: where they are.
        lease_s: how long a slice may be spent from.
        grace_s: how long the money of an expired slice stays held.
        retention_s: how long ended slices are kept. No older id is ever given money, so what was
            closed stays closed when its row is gone.
        spend: spend limits, that are told of what slices hold.
    """

    def __init__(
        self,
        database: Database,
        *,
        lease_s: float,
        grace_s: float,
        retention_s: float = RETENTION_S,
        spend: SpendWindows | None = None,
    ) -> None:
        self._database = database
        self._lease = timedelta(seconds=lease_s)
        self._grace = timedelta(seconds=grace_s)
        self._retention = timedelta(seconds=retention_s)
        self._spend = spend or NoSpendWindows()

    async def acquire(self, wish: SliceWish, now: datetime) -> Slice:
        """Sets money aside. Locks the balance. A repeat renews the lease and returns the slice.

        Where a grant has expired, it is taken back first, for which the head is locked, too.

        Args:
            wish: what is wanted.
            now: time of entries.

        Raises:
            FailedPrecondition: INSUFFICIENT_CREDIT, also when there is no such account; or
                SLICE_NOT_OPEN, the slice was closed before or its lease has run out.
            AlreadyExists: the id belongs to another account or holder.
            MaasError: SPEND_LIMIT_REACHED.
        """
        async with self._database.transaction() as connection:
            balances = await lock_balances(connection, [wish.account_id])
            balance = balances.get(wish.account_id)
            if balance is None or not balance.is_due:
                return await self._acquire(connection, wish, balance)
        async with self._database.transaction() as connection:
            head = await lock_head(connection)
            balances = await lock_balances(connection, [wish.account_id])
            await expire_due(connection, head, balances, now)
            return await self._acquire(connection, wish, balances.get(wish.account_id))

    async def _acquire(
        self, connection: Connection, wish: SliceWish, balance: Balance | None
    ) -> Slice:
        found = (await read_slices(connection, [wish.slice_id])).get(wish.slice_id)
        if found is not None:
            _check_repeat(found, account_id=wish.account_id, holder=wish.holder)
            await renew(connection, [wish.slice_id], self._lease)
            if balance is None or not balance.has_spend_limits:
                return found
            return await set_granted(connection, found, found.granted)
        if balance is None:
            raise insufficient_credit(wish.account_id, required=wish.required, available=0)
        fresh = Slice(
            slice_id=wish.slice_id,
            account_id=wish.account_id,
            holder=wish.holder,
            granted=grant_of(balance, required=wish.required, wanted=wish.wanted),
            consumed=0,
            state=SliceState.OPEN,
            is_leased=True,
        )
        if not await insert_slices(connection, [fresh], self._lease, newer_than=self._retention):
            # It was closed in this very moment, or so long ago that nobody knows.
            raise _not_open(wish.slice_id, SliceState.CLOSED)
        if balance.has_spend_limits:
            fresh = await self._limit(connection, wish, fresh)
        await change_held(connection, {wish.account_id: fresh.granted})
        failpoints.hit(failpoints.Point.GRANT_WRITTEN)
        return fresh

    async def _limit(self, connection: Connection, wish: SliceWish, fresh: Slice) -> Slice:
        granted = await self._spend.hold(
            connection,
            SpendWish(
                slice_id=wish.slice_id,
                account_id=wish.account_id,
                project_id=wish.project_id,
                api_key_id=wish.api_key_id,
                required=wish.required,
                nanos=fresh.granted,
            ),
        )
        return await set_granted(connection, fresh, granted)

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
            limited = {name for name, item in balances.items() if item.has_spend_limits}
            await self._end(connection, locked, SliceState.CLOSED, limited)
            marks = [_mark(slice_id, holder) for slice_id in sorted(slice_ids - slices.keys())]
            marked = await insert_slices(connection, marks, timedelta())
            failpoints.hit(failpoints.Point.CLOSE_WRITTEN)
        failpoints.hit(failpoints.Point.CLOSE_COMMITTED)
        overtaken = {mark.slice_id for mark in marks} - marked
        return overtaken | {item.slice_id for item in holding} - {item.slice_id for item in locked}

    async def sweep(self) -> None:
        """Marks slices whose lease has run out, and frees what is left of them after the grace.

        Locks balances that nobody else has locked, then those that were due for long already.
        """
        for patience in (None, STARVED):
            while await self._expire(patience) >= SWEEP_SIZE:
                pass
            while await self._reclaim(patience) >= SWEEP_SIZE:
                pass

    async def _expire(self, patience: timedelta | None) -> int:
        async with self._database.transaction() as connection:
            due, limited = await lock_due(connection, SliceState.OPEN, timedelta(), patience)
            await self._end(connection, due, SliceState.EXPIRED, limited)
        for item in due:
            log.warning("slice expired", slice=item.slice_id, holder=item.holder)
        metrics.SLICES_EXPIRED.inc(len(due))
        return len(due)

    async def _reclaim(self, patience: timedelta | None) -> int:
        async with self._database.transaction() as connection:
            due, limited = await lock_due(connection, SliceState.EXPIRED, self._grace, patience)
            await self._end(connection, due, SliceState.RECLAIMED, limited)
        for item in due:
            log.warning("slice reclaimed", slice=item.slice_id, freed_nanos=item.remaining)
        metrics.SLICES_RECLAIMED.inc(len(due))
        return len(due)

    async def prune(self) -> None:
        """Deletes slices that ended longer ago than the retention, and whose ids are that old.

        Those whose ids have no time are kept for ever: nothing else would refuse them.
        """
        while await self._prune() >= SWEEP_SIZE:
            pass

    async def _prune(self) -> int:
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT credit_slice_id, (SELECT lease_now()) - $1::interval AS oldest
                  FROM credit_slice
                 WHERE end_time <= (SELECT lease_now()) - $1::interval
                 ORDER BY end_time
                 LIMIT $2
                """,
                self._retention,
                SWEEP_SIZE,
            )
            slice_ids = [row["credit_slice_id"] for row in rows]
            pruned = await connection.fetch(
                """
                DELETE FROM credit_slice
                 USING unnest($1::text[], $2::timestamptz[]) AS old (credit_slice_id, make_time)
                 WHERE credit_slice.credit_slice_id = old.credit_slice_id
                   AND old.make_time <= $3
                   AND credit_slice.end_time IS NOT NULL
                RETURNING 1
                """,
                slice_ids,
                [make_time_of(slice_id) for slice_id in slice_ids],
                rows[0]["oldest"] if rows else None,
            )
            # What stays is looked at again when its id is old enough, or never.
            await connection.execute(
                """
                UPDATE credit_slice
                   SET end_time = old.make_time
                  FROM unnest($1::text[], $2::timestamptz[]) AS old (credit_slice_id, make_time)
                 WHERE credit_slice.credit_slice_id = old.credit_slice_id
                """,
                slice_ids,
                [make_time_of(slice_id) for slice_id in slice_ids],
            )
        metrics.SLICES_PRUNED.inc(len(pruned))
        return len(rows)

    async def _end(
        self,
        connection: Connection,
        slices: list[Slice],
        state: SliceState,
        limited: Collection[str],
    ) -> None:
        """Changes the state of slices whose balances are locked, freeing what no longer is held.

        Args:
            connection: of the transaction.
            slices: which.
            state: that they have afterwards.
            limited: accounts with spend limits.
        """
        if not slices:
            return
        await connection.execute(
            """
            UPDATE credit_slice
               SET state = $2, end_time = CASE WHEN $3 THEN NULL ELSE (SELECT lease_now()) END
             WHERE credit_slice_id = ANY($1::text[])
            """,
            [item.slice_id for item in slices],
            state.value,
            state.holds_money,
        )
        if state.holds_money:
            return
        freed: Counter[str] = Counter()
        of_limits: dict[str, int] = {}
        for item in slices:
            assert item.account_id is not None
            freed[item.account_id] -= item.remaining
            if item.account_id in limited:
                of_limits[item.slice_id] = item.remaining
        await change_held(connection, freed)
        if of_limits:
            await self._spend.release(connection, of_limits)


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
