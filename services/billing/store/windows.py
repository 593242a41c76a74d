"""Windows of spend limits: money set aside and spent in them, and their alerts.

Changed only under the lock of the account's balance, so windows need no locks of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import asyncpg
from typing_extensions import override

from libs.postgres import Connection
from services.billing.domain import UsageRecord
from services.billing.limits import Window, room_of
from services.billing.store.spend import SpendWindows, SpendWish

# Gateways do not use the last seconds of a lease.
_LEASE_MIN = timedelta(seconds=5)


class SpendWindowStore(SpendWindows):
    """Windows of spend limits, for the stores of slices and settlements."""

    @override
    async def hold(self, connection: Connection, wish: SpendWish) -> int:
        """Sets money aside in every window that applies; returns how many nanos.

        Nothing is admitted on the slice after the first of its windows, so that its money is spent
        in it. In the last seconds of a window it may be spent a little longer, or it would be of no
        use; what it pays for counts in its own windows all the same.

        Raises:
            ResourceExhausted: SPEND_LIMIT_REACHED, not even `required` has room.
        """
        rows = await connection.fetch(
            """
            SELECT l.limit_id, l.amount, window_start(l.span, t.now) AS window_start,
                   window_end(l.span, t.now) AS window_end, coalesce(w.spent, 0) AS spent,
                   coalesce(w.held, 0) AS held, t.now
              FROM usage_limit AS l
             CROSS JOIN (SELECT lease_now() AS now) AS t
              LEFT JOIN spend_window AS w
                ON w.limit_id = l.limit_id AND w.window_start = window_start(l.span, t.now)
             WHERE l.account_id = $1
               AND NOT l.is_deleted
               AND l.amount IS NOT NULL
               AND (l.scope_kind, l.scope_id)
                   IN (('account', $1), ('project', $2), ('api_key', $3))
            """,
            wish.account_id,
            wish.project_id,
            wish.api_key_id,
        )
        if not rows:
            return wish.nanos
        room = room_of(
            [_window_from_row(row) for row in rows],
            required=wish.required,
            wanted=wish.nanos,
            now=rows[0]["now"],
        )
        await _hold(connection, wish.slice_id, room.windows, room.nanos, room.end)
        return room.nanos

    @override
    async def settle(
        self,
        connection: Connection,
        records: Sequence[UsageRecord],
        consumed: Mapping[str, int],
    ) -> None:
        """Counts charges: what slices had set aside becomes spent, and alerts are raised.

        A charge counts in the window that its slice was taken from, however late it is settled;
        without such a window, in the one that runs now. Nothing is refused here.
        """
        await self.release(connection, consumed)
        charged = [record for record in records if record.charge]
        if not charged:
            return
        rows = await connection.fetch(
            """
            WITH charge AS (
                SELECT l.limit_id, l.account_id, l.amount, l.alert_percents, l.counted_after,
                       coalesce(s.window_start, window_start(l.span, t.now)) AS window_start,
                       r.charge
                  FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[])
                           AS r (slice_id, account_id, project_id, api_key_id, charge)
                 CROSS JOIN (SELECT lease_now() AS now) AS t
                  JOIN usage_limit AS l
                    ON l.account_id = r.account_id
                   AND NOT l.is_deleted
                   AND l.amount IS NOT NULL
                   AND (l.scope_kind, l.scope_id) IN (
                           ('account', r.account_id),
                           ('project', r.project_id),
                           ('api_key', r.api_key_id)
                       )
                  LEFT JOIN slice_window AS s
                    ON s.credit_slice_id = r.slice_id AND s.limit_id = l.limit_id
            ), counted AS (
                INSERT INTO spend_window AS w (limit_id, window_start, spent)
                SELECT limit_id, window_start, sum(charge)
                  FROM charge
                 GROUP BY limit_id, window_start
                    ON CONFLICT (limit_id, window_start)
                    DO UPDATE SET spent = w.spent + EXCLUDED.spent
                RETURNING limit_id, window_start, spent
            )
            SELECT DISTINCT limit_id, account_id, counted_after, window_start, spent, percent
              FROM counted
              JOIN charge USING (limit_id, window_start)
             CROSS JOIN unnest(alert_percents) AS percent
             WHERE spent::numeric * 100 >= amount::numeric * percent
             ORDER BY limit_id, window_start, percent
            """,
            [record.settlement.slice_id for record in charged],
            [record.settlement.account_id for record in charged],
            [record.settlement.project_id for record in charged],
            [record.settlement.api_key_id for record in charged],
            [record.charge for record in charged],
        )
        if rows:
            await _raise_alerts(connection, rows, charged[0].settle_time)

    @override
    async def release(self, connection: Connection, freed: Mapping[str, int]) -> None:
        """Frees what slices do not hold any more in their windows."""
        if not freed:
            return
        await connection.execute(
            """
            UPDATE spend_window AS w
               SET held = w.held - change.nanos
              FROM (
                       SELECT s.limit_id, s.window_start, sum(f.nanos) AS nanos
                         FROM unnest($1::text[], $2::bigint[]) AS f (credit_slice_id, nanos)
                         JOIN slice_window AS s USING (credit_slice_id)
                        GROUP BY s.limit_id, s.window_start
                   ) AS change
             WHERE w.limit_id = change.limit_id
               AND w.window_start = change.window_start
            """,
            list(freed.keys()),
            list(freed.values()),
        )


async def _hold(
    connection: Connection,
    slice_id: str,
    windows: Sequence[Window],
    nanos: int,
    end: datetime,
) -> None:
    await connection.execute(
        """
        WITH held AS (
            INSERT INTO spend_window AS w (limit_id, window_start, held)
            SELECT *, $4::bigint
              FROM unnest($2::text[], $3::timestamptz[])
                ON CONFLICT (limit_id, window_start)
                DO UPDATE SET held = w.held + EXCLUDED.held
        ), named AS (
            INSERT INTO slice_window (credit_slice_id, limit_id, window_start)
            SELECT $1, *
              FROM unnest($2::text[], $3::timestamptz[])
        )
        UPDATE credit_slice
           SET window_end_time = greatest($5, lease_now() + $6::interval)
         WHERE credit_slice_id = $1
        """,
        slice_id,
        [window.limit_id for window in windows],
        [window.start for window in windows],
        nanos,
        end,
        _LEASE_MIN,
    )


async def _raise_alerts(
    connection: Connection, rows: Sequence[asyncpg.Record], now: datetime
) -> None:
    """Writes alerts that were not raised in their windows before. The head is locked."""
    await connection.execute(
        """
        INSERT INTO spend_alert (
            number, limit_id, account_id, percent, window_start, counted_after, spent, create_time
        )
        SELECT (SELECT coalesce(max(number), 0) FROM spend_alert) + row_number() OVER (), a.*, $7
          FROM unnest(
                   $1::text[], $2::text[], $3::smallint[], $4::timestamptz[], $5::bigint[],
                   $6::bigint[]
               ) AS a (limit_id, account_id, percent, window_start, counted_after, spent)
         WHERE NOT EXISTS (
                   SELECT
                     FROM spend_alert AS s
                    WHERE (s.limit_id, s.counted_after, s.window_start, s.percent)
                          = (a.limit_id, a.counted_after, a.window_start, a.percent)
               )
        """,
        [row["limit_id"] for row in rows],
        [row["account_id"] for row in rows],
        [row["percent"] for row in rows],
        [row["window_start"] for row in rows],
        [row["counted_after"] for row in rows],
        [row["spent"] for row in rows],
        now,
    )


def _window_from_row(row: asyncpg.Record) -> Window:
    return Window(
        limit_id=row["limit_id"],
        amount=row["amount"],
        start=row["window_start"],
        end=row["window_end"],
        spent=row["spent"],
        held=row["held"],
    )
