"""Windows of spend limits: money set aside and spent in them, and their alerts.

Changed only under the lock of the account's balance, so windows need no locks of their own.
"""

from __future__ import annotations

from collections import Counter
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
        charges = _charges_of(records)
        if not charges:
            return
        # Each window changes once: second versions of its row in one transaction find no room on
        # its page, and whoever looks for it later meets all that were left in the index.
        rows = await connection.fetch(
            """
            WITH part AS (
                SELECT l.limit_id, coalesce(s.window_start, window_start(l.span, t.now))
                           AS window_start, c.charge, 0 AS freed
                  FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[])
                           AS c (slice_id, account_id, project_id, api_key_id, charge)
                 CROSS JOIN (SELECT lease_now() AS now) AS t
                  JOIN usage_limit AS l
                    ON l.account_id = c.account_id
                   AND NOT l.is_deleted
                   AND l.amount IS NOT NULL
                   AND (l.scope_kind, l.scope_id) IN (
                           ('account', c.account_id),
                           ('project', c.project_id),
                           ('api_key', c.api_key_id)
                       )
                  LEFT JOIN slice_window AS s
                    ON s.credit_slice_id = c.slice_id AND s.limit_id = l.limit_id
                 UNION ALL
                SELECT s.limit_id, s.window_start, 0, f.nanos
                  FROM unnest($6::text[], $7::bigint[]) AS f (credit_slice_id, nanos)
                  JOIN slice_window AS s USING (credit_slice_id)
            ), change AS (
                SELECT limit_id, window_start, sum(charge) AS charge, sum(freed) AS freed
                  FROM part
                 GROUP BY limit_id, window_start
            ), counted AS (
                UPDATE spend_window AS w
                   SET spent = w.spent + change.charge, held = w.held - change.freed
                  FROM change
                 WHERE w.limit_id = change.limit_id
                   AND w.window_start = change.window_start
                RETURNING w.limit_id, w.window_start, w.spent
            ), opened AS (
                INSERT INTO spend_window (limit_id, window_start, spent)
                SELECT limit_id, window_start, charge
                  FROM change
                 WHERE charge > 0
                   AND NOT EXISTS (
                           SELECT
                             FROM spend_window AS w
                            WHERE w.limit_id = change.limit_id
                              AND w.window_start = change.window_start
                       )
                RETURNING limit_id, window_start, spent
            )
            SELECT limit_id, l.account_id, l.span, l.counted_after, window_start, spent, percent
              FROM (SELECT * FROM counted UNION ALL SELECT * FROM opened) AS w
              JOIN usage_limit AS l USING (limit_id)
             CROSS JOIN unnest(l.alert_percents) AS percent
             WHERE NOT l.is_deleted
               AND spent::numeric * 100 >= l.amount::numeric * percent
             ORDER BY limit_id, window_start, percent
            """,
            *([key[place] for key in charges] for place in range(4)),
            list(charges.values()),
            list(consumed.keys()),
            list(consumed.values()),
        )
        if rows:
            await _write_alerts(connection, rows, records[0].settle_time)

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


def _charges_of(records: Sequence[UsageRecord]) -> Counter[tuple[str, str, str, str]]:
    """Sums charges by slice, account, project and key."""
    charges: Counter[tuple[str, str, str, str]] = Counter()
    for record in records:
        if record.charge:
            told = record.settlement
            key = (told.slice_id, told.account_id, told.project_id, told.api_key_id)
            charges[key] += record.charge
    return charges


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


async def raise_alerts(connection: Connection, limit_id: str, now: datetime) -> None:
    """Raises the alerts that a limit has crossed in the window that runs, without a new charge.

    A limit that begins, or is lowered, may have no room for a charge that would tell them. The head
    and the balance are locked.
    """
    rows = await connection.fetch(
        """
        SELECT limit_id, l.account_id, l.span, l.counted_after, w.window_start, w.spent, percent
          FROM usage_limit AS l
          JOIN spend_window AS w USING (limit_id)
         CROSS JOIN unnest(l.alert_percents) AS percent
         WHERE limit_id = $1
           AND w.window_start = window_start(l.span, lease_now())
           AND w.spent > 0
           AND w.spent::numeric * 100 >= l.amount::numeric * percent
         ORDER BY percent
        """,
        limit_id,
    )
    if rows:
        await _write_alerts(connection, rows, now)


async def _write_alerts(
    connection: Connection, rows: Sequence[asyncpg.Record], now: datetime
) -> None:
    """Writes alerts that were not raised in their windows before. The head is locked."""
    await connection.execute(
        """
        INSERT INTO spend_alert (
            number, limit_id, account_id, percent, window_start, counted_after, spent, span,
            create_time
        )
        SELECT (SELECT coalesce(max(number), 0) FROM spend_alert) + row_number() OVER (), a.*, $8
          FROM unnest(
                   $1::text[], $2::text[], $3::smallint[], $4::timestamptz[], $5::bigint[],
                   $6::bigint[], $7::text[]
               ) AS a (limit_id, account_id, percent, window_start, counted_after, spent, span)
         WHERE NOT EXISTS (
                   SELECT
                     FROM spend_alert AS s
                    WHERE (s.limit_id, s.window_start, s.percent, s.account_id)
                          = (a.limit_id, a.window_start, a.percent, a.account_id)
                      AND coalesce(s.span, a.span) = a.span
               )
        """,
        [row["limit_id"] for row in rows],
        [row["account_id"] for row in rows],
        [row["percent"] for row in rows],
        [row["window_start"] for row in rows],
        [row["counted_after"] for row in rows],
        [row["spent"] for row in rows],
        [row["span"] for row in rows],
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
