"""What a spend limit finds when it begins: spent in its window before, and set aside in it.

A window that runs for long may have many records. They are counted in pages, before anything is
locked; what was settled meanwhile is counted under the locks, so nothing is missed or doubled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from libs.postgres import Connection
from services.billing.limits import Limit, Scope, Span, SpendLimit

COUNT_SIZE = 10_000
"""Records of one statement."""
# The first record of a window by number may be a little later by time: replicas have own clocks.
FIRST_OF_WINDOW = """
    SELECT min(number + 0) - 1
      FROM usage_record
     WHERE account_id = $1
       AND settle_time >= $2
       AND settle_time < interval '1 minute' + (
               SELECT min(settle_time)
                 FROM usage_record
                WHERE account_id = $1
                  AND settle_time >= $2
           )
"""
COUNTED_PAGE = """
    SELECT count(*) AS count, coalesce(max(number), $2) AS last,
           coalesce(sum(amount - shortfall) FILTER (
               WHERE CASE $4
                     WHEN 'account' THEN account_id = $5
                     WHEN 'project' THEN project_id = $5
                     ELSE api_key_id = $5
                     END
           ), 0)::bigint AS spent
      FROM (
               SELECT number, account_id, project_id, api_key_id, amount, shortfall
                 FROM usage_record
                WHERE account_id = $1
                  AND number > $2
                ORDER BY number
                LIMIT $3
           ) AS page
"""
# Slices of a project or a key are those that were taken from windows of another limit of it, or of
# this one before it changed. What an account's slice pays for others is told by its settlement.
_SLICES = """
    SELECT s.credit_slice_id, s.granted - s.consumed AS rest
      FROM credit_slice AS s
     WHERE s.account_id = $1
       AND s.state IN ('open', 'expired')
       AND ($2 = 'account' OR EXISTS (
               SELECT
                 FROM slice_window AS w
                 JOIN usage_limit AS l USING (limit_id)
                WHERE w.credit_slice_id = s.credit_slice_id
                  AND NOT l.is_deleted
                  AND (l.account_id, l.scope_kind, l.scope_id) = ($1, $2, $3)
           ))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What was spent in the window that runs.

    Attributes:
        account_id: whose records were counted.
        scope: of which of them.
        span: how long the window is.
        start: its first moment.
        counted_after: number before its first record.
        last: number of the last record that was looked at.
        spent: nanos.
    """

    account_id: str
    scope: Scope
    span: Span
    start: datetime
    counted_after: int
    last: int
    spent: int


async def count_spent(
    connection: Connection, limit: Limit, ahead: Count | None = None, *, size: int = COUNT_SIZE
) -> Count:
    """Counts what was spent in the window of a spend limit that runs now.

    Args:
        connection: of a transaction, READ COMMITTED. Without a lock of the balance the records that
            are settled meanwhile may be missing.
        limit: of spending.
        ahead: what was counted before; it is gone on with if it is of the same window.
        size: records of one statement.
    """
    found = await _begin(connection, limit)
    if ahead is not None and _window_of(ahead) == _window_of(found):
        found = ahead
    while True:
        row = await connection.fetchrow(
            COUNTED_PAGE,
            found.account_id,
            found.last,
            size,
            found.scope.kind.value,
            found.scope.scope_id,
        )
        assert row is not None
        found = dataclasses.replace(found, last=row["last"], spent=found.spent + row["spent"])
        if row["count"] < size:
            return found


async def _begin(connection: Connection, limit: Limit) -> Count:
    assert isinstance(limit.kind, SpendLimit)
    span = limit.kind.span
    row = await connection.fetchrow(
        "SELECT window_start($1, lease_now()) AS start, record_count FROM ledger_head", span.value
    )
    assert row is not None
    # The head was read first: where no record of the window is seen now, all of its are behind.
    before = await connection.fetchval(FIRST_OF_WINDOW, limit.account_id, row["start"])
    counted_after = row["record_count"] if before is None else before
    return Count(
        account_id=limit.account_id,
        scope=limit.scope,
        span=span,
        start=row["start"],
        counted_after=counted_after,
        last=counted_after,
        spent=0,
    )


def _window_of(count: Count) -> tuple[str, Scope, Span, datetime]:
    return count.account_id, count.scope, count.span, count.start


async def open_window(connection: Connection, limit: Limit, ahead: Count | None) -> Limit:
    """Lets a spend limit begin in the window that runs now; returns it with where it counts from.

    Windows that it had are forgotten. The balance of its account is locked.

    Args:
        connection: of the transaction.
        limit: of spending.
        ahead: what was counted before the locks.
    """
    count = await count_spent(connection, limit, ahead)
    scope = (limit.account_id, limit.scope.kind.value, limit.scope.scope_id)
    slices = await connection.fetch(_SLICES, *scope)
    await forget_windows(connection, limit.limit_id)
    held = sum(row["rest"] for row in slices)
    if count.spent or held:
        await connection.execute(
            """
            INSERT INTO spend_window (limit_id, window_start, spent, held)
            VALUES ($1, $2, $3, $4)
            """,
            limit.limit_id,
            count.start,
            count.spent,
            held,
        )
    await _name(connection, limit, count.start, [row["credit_slice_id"] for row in slices])
    return dataclasses.replace(limit, counted_after=count.counted_after)


async def _name(
    connection: Connection, limit: Limit, start: datetime, slice_ids: Sequence[str]
) -> None:
    """Says which slices have something set aside in a window."""
    await connection.execute(
        """
        INSERT INTO slice_window (credit_slice_id, limit_id, window_start)
        SELECT slice_id, $2, $3
          FROM unnest($1::text[]) AS slice_id
        """,
        slice_ids,
        limit.limit_id,
        start,
    )


async def forget_windows(connection: Connection, limit_id: str) -> None:
    """Forgets what a limit has counted. What slices have set aside is not of it any more."""
    await connection.execute("DELETE FROM slice_window WHERE limit_id = $1", limit_id)
    await connection.execute("DELETE FROM spend_window WHERE limit_id = $1", limit_id)
