"""What has to hold of the ledger at any moment, read from the tables themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import asyncpg

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = Any

# Each statement lists what is wrong: no rows when all is well.
BROKEN = {
    "all entries sum to zero": """
        SELECT sum(amount) FROM ledger_entry HAVING sum(amount) <> 0
    """,
    "the entries of a movement sum to zero": """
        SELECT transaction_number, sum(amount)
          FROM ledger_entry
         GROUP BY transaction_number
        HAVING sum(amount) <> 0
    """,
    "posted is the sum of the account's entries": """
        SELECT b.account_id, b.posted, coalesce(sum(e.amount), 0) AS entries
          FROM balance AS b
          LEFT JOIN ledger_entry AS e USING (account_id)
         GROUP BY b.account_id
        HAVING b.posted <> coalesce(sum(e.amount), 0)
    """,
    "held is what slices have left": """
        SELECT b.account_id, b.held, coalesce(sum(s.granted - s.consumed), 0) AS slices
          FROM balance AS b
          LEFT JOIN credit_slice AS s
            ON s.account_id = b.account_id AND s.state IN ('open', 'expired')
         GROUP BY b.account_id
        HAVING b.held <> coalesce(sum(s.granted - s.consumed), 0)
    """,
    "no balance is below its floor": """
        SELECT account_id
          FROM balance
         WHERE posted - held < floor OR held < 0 OR floor > -credit_limit
    """,
    "grants have left what is posted": """
        SELECT b.account_id, b.posted, coalesce(sum(g.remaining), 0) AS remaining
          FROM balance AS b
          LEFT JOIN credit_grant AS g USING (account_id)
         GROUP BY b.account_id
        HAVING greatest(b.posted, 0) <> coalesce(sum(g.remaining), 0)
    """,
    "a grant is what its entry gave": """
        SELECT g.account_id, g.grant_id
          FROM credit_grant AS g
          LEFT JOIN ledger_entry AS e ON e.number = g.number
         WHERE g.number > 0
           AND (g.account_id, g.grant_id, g.amount)
               IS DISTINCT FROM (e.account_id, e.grant_id, e.amount)
    """,
    "every gift has its grant": """
        SELECT e.number
          FROM ledger_entry AS e
         WHERE e.grant_id IS NOT NULL
           AND NOT EXISTS (
                   SELECT
                     FROM credit_grant AS g
                    WHERE (g.account_id, g.grant_id) = (e.account_id, e.grant_id)
               )
    """,
    "no grant expires before the account says": """
        SELECT b.account_id
          FROM balance AS b
          JOIN credit_grant AS g USING (account_id)
         WHERE g.is_live
           AND g.expire_time < coalesce(b.next_expire_time, 'infinity')
    """,
    "refunds of a generation are its charge at most": """
        SELECT r.generation_id
          FROM refund
          LEFT JOIN usage_record AS r USING (account_id, generation_id)
         GROUP BY r.generation_id
        HAVING r.generation_id IS NULL
            OR sum(refund.amount) > max(r.amount - r.shortfall)
    """,
    "a refund is what its entry gave back": """
        SELECT e.number
          FROM (SELECT * FROM ledger_entry WHERE kind = 'refund' AND amount > 0) AS e
          FULL JOIN refund USING (number)
         WHERE (e.account_id, e.amount) IS DISTINCT FROM (refund.account_id, refund.amount)
    """,
    "no slice is consumed beyond its grant": """
        SELECT credit_slice_id FROM credit_slice WHERE consumed > granted
    """,
    "the ledger's own accounts have no balance row": """
        SELECT account_id FROM balance WHERE account_id LIKE 'system-%'
    """,
    "entries are numbered without gaps": """
        SELECT entry_count
          FROM ledger_head
         WHERE entry_count <> (SELECT count(*) FROM ledger_entry)
            OR entry_count <> (SELECT coalesce(max(number), 0) FROM ledger_entry)
    """,
    "records are numbered without gaps": """
        SELECT record_count
          FROM ledger_head
         WHERE record_count <> (SELECT count(*) FROM usage_record)
            OR record_count <> (SELECT coalesce(max(number), 0) FROM usage_record)
    """,
    "a record has the entries that it says": """
        SELECT r.generation_id, r.amount, r.shortfall
          FROM usage_record AS r
          LEFT JOIN ledger_entry AS e ON e.source = r.generation_id AND e.kind = 'usage'
         GROUP BY r.generation_id
        HAVING coalesce(sum(e.amount) FILTER (WHERE e.account_id = r.account_id), 0)
               <> r.shortfall - r.amount
            OR coalesce(sum(e.amount) FILTER (WHERE e.account_id = 'system-bad-debt'), 0)
               <> -r.shortfall
            OR coalesce(sum(e.amount) FILTER (WHERE e.account_id = 'system-revenue'), 0)
               <> r.amount
    """,
    "usage entries have a record": """
        SELECT number
          FROM ledger_entry AS e
         WHERE kind = 'usage'
           AND NOT EXISTS (SELECT FROM usage_record AS r WHERE r.generation_id = e.source)
    """,
    "the amount is what the counts cost": """
        SELECT r.generation_id, r.amount
          FROM usage_record AS r
          JOIN price AS p USING (price_id)
         CROSS JOIN LATERAL (
                   SELECT CASE WHEN r.is_background
                               THEN 100 - p.background_discount_percent
                               ELSE 100
                          END / 100000000.0 AS paid,
                          p.input_price::numeric AS input,
                          coalesce(p.cached_input_price, p.input_price)::numeric AS cached,
                          p.output_price::numeric AS output,
                          coalesce(p.reasoning_price, p.output_price)::numeric AS thought,
                          CASE WHEN r.reasoning_tokens > 0
                               THEN greatest(p.output_price, p.reasoning_price)
                               ELSE p.output_price
                          END::numeric AS dearest
               ) AS x
         WHERE r.amount <> CASE WHEN r.end_cause <= 5
                                THEN least(
                                         ceil(r.input_tokens * input * paid),
                                         ceil((r.input_tokens - r.cached_input_tokens)
                                              * input * paid)
                                         + ceil(r.cached_input_tokens * cached * paid)
                                     )
                                   + least(
                                         ceil(r.output_tokens * dearest * paid),
                                         ceil((r.output_tokens - r.reasoning_tokens)
                                              * output * paid)
                                         + ceil(r.reasoning_tokens * thought * paid)
                                     )
                                   + ceil(p.request_price * 1000000.0 * paid)
                                ELSE 0
                           END
    """,
}


async def audit(connection: Connection) -> None:
    """Fails with the first rule that does not hold, and the rows that break it."""
    for rule, statement in BROKEN.items():
        rows = [dict(row) for row in await connection.fetch(statement)]
        assert not rows, f"broken: {rule}: {rows[:5]}"


async def count_waiting(connection: Connection) -> int:
    """Counts who waits for a lock of somebody else, in this database."""
    return int(
        await connection.fetchval(
            """
            SELECT count(*)
              FROM pg_stat_activity
             WHERE datname = current_database()
               AND wait_event_type = 'Lock'
            """
        )
    )
