"""Statements that list what is broken: no rows when all is well.

Each is read on one snapshot and gives `resource`, a resource name or "ledger", and `description`.
Arguments, each optional to a statement:

    $1  account id, or '' for all
    $2  number of the last usage record that need not be looked at
    $3  number of the last ledger entry before the entries of record $2 + 1
    $4  interval: how long after its lease a slice may hold money
    $5  ids of generations whose bad receipts an operator has looked at

They are written without the code that writes the tables, so that a mistake there shows here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Scope(enum.Enum):
    """What a statement reads, and so what it costs."""

    WINDOW = "entries and records behind a number"
    STATE = "balances, grants with something left, slices that hold money"
    HISTORY = "whole tables"


@dataclass(frozen=True, slots=True)
class Check:
    """One way to break an invariant.

    Attributes:
        invariant_id: "I1" to "I12".
        scope: what the statement reads.
        statement: lists what is broken.
    """

    invariant_id: str
    scope: Scope
    statement: str


OF_RECORD = "SELECT 'accounts/' || r.account_id || '/usageRecords/' || r.generation_id AS resource,"
OF_ENTRY = "SELECT 'accounts/' || e.account_id || '/ledgerEntries/' || e.number AS resource,"

_UNBALANCED = """
    SELECT transaction_number, sum(amount) AS total, min(number) AS number
      FROM ledger_entry
     WHERE number > $3
       AND ($1 = '' OR transaction_number IN (
               SELECT transaction_number FROM ledger_entry WHERE account_id = $1 AND number > $3))
     GROUP BY transaction_number
    HAVING sum(amount) <> 0
"""
_MOVEMENTS = f"""
    {OF_ENTRY}
           'the entries of transaction ' || broken.transaction_number || ' sum to '
           || broken.total || ' nanos, not to 0' AS description
      FROM ({_UNBALANCED}) AS broken
      JOIN ledger_entry AS e ON e.number = broken.number
"""
# What is before the window, or of other accounts: the movements above are all there is else.
_TOTAL = """
    SELECT 'ledger' AS resource,
           'all entries sum to ' || sum(amount) || ' nanos, not to 0' AS description
      FROM ledger_entry
     WHERE $1 <> '' OR $3 > 0
    HAVING sum(amount) <> 0
"""
_ENTRY_NUMBERS = """
    SELECT 'ledger' AS resource,
           'behind entry ' || $3 || ' there are ' || there.count || ' entries, the last is '
           || there.last || '; the head says ' || head.entry_count AS description
      FROM ledger_head AS head,
           (SELECT count(*) AS count, coalesce(max(number), $3) AS last
              FROM ledger_entry
             WHERE number > $3) AS there
     WHERE there.count <> head.entry_count - $3
        OR there.last <> head.entry_count
"""
_POSTED = """
    SELECT 'accounts/' || account_id AS resource,
           'posted is ' || coalesce(b.posted, 0) || ' nanos, its entries sum to '
           || coalesce(e.total, 0) AS description
      FROM balance AS b
      FULL JOIN (
               SELECT account_id, sum(amount) AS total
                 FROM ledger_entry
                WHERE account_id NOT LIKE 'system-%'
                  AND ($1 = '' OR account_id = $1)
                GROUP BY account_id
           ) AS e USING (account_id)
     WHERE ($1 = '' OR account_id = $1)
       AND coalesce(b.posted, 0) <> coalesce(e.total, 0)
"""
_SYSTEM_BALANCE = """
    SELECT 'accounts/' || account_id AS resource,
           'one of the ledger''s own accounts has a balance row' AS description
      FROM balance
     WHERE account_id LIKE 'system-%'
"""
# The version before grants (migration 4), which may write while this one starts, gave without a
# grant: at most what it gave then may be posted beyond grants, until it is used up.
_GRANTLESS = """
    SELECT coalesce(sum(e.amount), 0) AS total
      FROM ledger_entry AS e
     WHERE e.account_id = found.account_id
       AND e.amount > 0
       AND e.grant_id IS NULL
       AND e.kind IN ('grant', 'adjustment')
       AND e.create_time >= (SELECT apply_time FROM migration WHERE number = 4)
"""
_REMAINING = f"""
    SELECT 'accounts/' || found.account_id AS resource,
           'posted is ' || found.posted || ' nanos, its grants have ' || found.remaining
           || ' left' AS description
      FROM (
               SELECT b.account_id, b.posted, coalesce(sum(g.remaining), 0) AS remaining
                 FROM balance AS b
                 LEFT JOIN credit_grant AS g ON g.account_id = b.account_id AND g.is_live
                WHERE $1 = '' OR b.account_id = $1
                GROUP BY b.account_id
               HAVING coalesce(sum(g.remaining), 0) <> greatest(b.posted, 0)
           ) AS found
     WHERE greatest(found.posted, 0) - found.remaining NOT BETWEEN 0 AND ({_GRANTLESS})
"""  # noqa: S608 - made of constants
_HELD = """
    SELECT 'accounts/' || b.account_id AS resource,
           'held is ' || b.held || ' nanos, its slices have ' || coalesce(s.total, 0)
           || ' left' AS description
      FROM balance AS b
      LEFT JOIN (
               SELECT account_id, sum(granted - consumed) AS total
                 FROM credit_slice
                WHERE state IN ('open', 'expired')
                GROUP BY account_id
           ) AS s USING (account_id)
     WHERE ($1 = '' OR b.account_id = $1)
       AND b.held <> coalesce(s.total, 0)
"""
_FLOOR = """
    SELECT 'accounts/' || account_id AS resource,
           'posted ' || posted || ' less held ' || held || ' is below the floor ' || floor
           || ', or that is above -' || credit_limit || ' nanos' AS description
      FROM balance
     WHERE ($1 = '' OR account_id = $1)
       AND (posted - held < floor OR held < 0 OR floor > -credit_limit)
"""
_RECORD_NUMBERS = """
    SELECT 'ledger' AS resource,
           'behind record ' || $2 || ' there are ' || there.count || ' records, the last is '
           || there.last || '; the head says ' || head.record_count AS description
      FROM ledger_head AS head,
           (SELECT count(*) AS count, coalesce(max(number), $2) AS last
              FROM usage_record
             WHERE number > $2) AS there
     WHERE there.count <> head.record_count - $2
        OR there.last <> head.record_count
"""
_DOUBLED = """
    SELECT generation_id FROM usage_record GROUP BY generation_id HAVING count(*) > 1
"""
_ONE_RECORD = f"""
    {OF_RECORD}
           'its generation has several records' AS description
      FROM usage_record AS r
     WHERE r.generation_id IN ({_DOUBLED})
       AND ($1 = '' OR r.account_id = $1)
"""
_CONSUMED = """
    SELECT 'creditSlices/' || credit_slice_id AS resource,
           'consumed ' || consumed || ' of ' || granted || ' nanos' AS description
      FROM credit_slice
     WHERE ($1 = '' OR account_id = $1)
       AND consumed NOT BETWEEN 0 AND granted
"""
# The three sides of a charge, of one account each.
_CHARGES = """
    SELECT source,
           min(account_id) FILTER (WHERE account_id NOT LIKE 'system-%') AS account_id,
           count(*) AS entries,
           coalesce(sum(amount) FILTER (WHERE account_id NOT LIKE 'system-%'), 0) AS taken,
           coalesce(sum(amount) FILTER (WHERE account_id = 'system-bad-debt'), 0) AS owed,
           coalesce(sum(amount) FILTER (WHERE account_id = 'system-revenue'), 0) AS earned
      FROM ledger_entry
     WHERE kind = 'usage'
       AND number > $3
     GROUP BY source
"""
_ENTRIESOF_RECORDS = f"""
    {OF_RECORD}
           'amount ' || r.amount || ', shortfall ' || r.shortfall || ' nanos; its '
           || coalesce(e.entries, 0) || ' entries say ' || coalesce(e.taken, 0) || ' on '
           || coalesce('accounts/' || e.account_id, 'no account') || ', ' || coalesce(e.owed, 0)
           || ' on bad debt, ' || coalesce(e.earned, 0) || ' on revenue' AS description
      FROM usage_record AS r
      LEFT JOIN ({_CHARGES}) AS e ON e.source = r.generation_id
     WHERE r.number > $2
       AND ($1 = '' OR r.account_id = $1)
       AND (
               (coalesce(e.taken, 0), coalesce(e.owed, 0), coalesce(e.earned, 0))
               <> (r.shortfall - r.amount, -r.shortfall, r.amount)
            OR coalesce(e.account_id, r.account_id) <> r.account_id
            OR coalesce(e.entries, 0)
               <> (r.amount > r.shortfall)::int + (r.shortfall > 0)::int + (r.amount > 0)::int
           )
"""
_ENTRIES_WITHOUT_RECORD = f"""
    {OF_ENTRY}
           'there is no usage record of ' || e.source AS description
      FROM ledger_entry AS e
     WHERE e.kind = 'usage'
       AND e.number > $3
       AND ($1 = '' OR e.account_id = $1)
       AND NOT EXISTS (SELECT FROM usage_record AS r WHERE r.generation_id = e.source)
"""
_REFUSED_RECEIPTS = f"""
    {OF_RECORD}
           'the receipt that came with it was refused: ' || receipt.fault AS description
      FROM receipt
      JOIN usage_record AS r ON r.number = receipt.record_number
     WHERE receipt.record_number > $2
       AND receipt.fault <> ''
       AND r.generation_id <> ALL($5)
       AND ($1 = '' OR r.account_id = $1)
"""
_RECEIPTS_WITHOUT_RECORD = """
    SELECT 'ledger' AS resource,
           'the receipt of record ' || receipt.record_number || ' has no record' AS description
      FROM receipt
     WHERE receipt.record_number > $2
       AND NOT EXISTS (
               SELECT
                 FROM usage_record AS r
                WHERE r.number = receipt.record_number
           )
"""
_COUNTS = f"""
    {OF_RECORD}
           'counts ' || r.input_tokens || ' in, ' || r.cached_input_tokens || ' of them cached, '
           || r.output_tokens || ' out, ' || r.reasoning_tokens || ' of them reasoning, '
           || r.engine_time_us || ' us of engine time' AS description
      FROM usage_record AS r
     WHERE r.number > $2
       AND ($1 = '' OR r.account_id = $1)
       AND NOT (
               r.cached_input_tokens BETWEEN 0 AND r.input_tokens
           AND r.reasoning_tokens BETWEEN 0 AND r.output_tokens
           AND r.engine_time_us >= 0
           )
"""


def _line(nano_tokens: str) -> str:
    """A line of tokens times price: of paid percent, rounded up to whole nanos."""
    return f"div(({nano_tokens}) * paid.percent + 99999999, 100000000)"


def _split_line(tokens: str, price: str, part: str, part_price: str) -> str:
    """A line of which a part may have its own price: never more than all at the dearer one."""
    whole = _line(f"r.{tokens}::numeric * p.{price}")
    rest = _line(f"(r.{tokens} - r.{part})::numeric * p.{price}")
    own = _line(f"r.{part}::numeric * p.{part_price}")
    dearer = _line(f"r.{tokens}::numeric * greatest(p.{price}, p.{part_price})")
    return (
        f"CASE WHEN r.{part} = 0 OR p.{part_price} IS NULL THEN {whole}"
        f" ELSE least({rest} + {own}, {dearer}) END"
    )


_INPUT = _split_line("input_tokens", "input_price", "cached_input_tokens", "cached_input_price")
_OUTPUT = _split_line("output_tokens", "output_price", "reasoning_tokens", "reasoning_price")
_PERCENT = """
    SELECT 100 - CASE WHEN r.is_background THEN p.background_discount_percent ELSE 0 END AS percent
"""
# 1 to 5 are the ends that are the client's, 11 to 13 ours: maas.billing.v1.EndCause.
_COST = f"""
    SELECT CASE WHEN r.end_cause BETWEEN 1 AND 5
                THEN {_INPUT}
                     + {_OUTPUT}
                     + div(p.request_price::numeric * paid.percent + 99, 100)
                WHEN r.end_cause BETWEEN 11 AND 13 THEN 0
           END AS nanos
"""
_AMOUNT = f"""
    {OF_RECORD}
           CASE WHEN p.price_id IS NULL THEN 'prices/' || r.price_id || ' is not there'
                WHEN r.end_cause NOT BETWEEN 1 AND 5 AND r.end_cause NOT BETWEEN 11 AND 13
                THEN 'end cause ' || r.end_cause || ' is none'
                ELSE 'amount is ' || r.amount || ' nanos, its counts cost ' || cost.nanos
           END AS description
      FROM usage_record AS r
      LEFT JOIN price AS p USING (price_id)
     CROSS JOIN LATERAL ({_PERCENT}) AS paid
     CROSS JOIN LATERAL ({_COST}) AS cost
     WHERE r.number > $2
       AND ($1 = '' OR r.account_id = $1)
       AND (p.price_id IS NULL OR r.amount IS DISTINCT FROM cost.nanos)
"""
_OVERDUE = """
    SELECT 'creditSlices/' || credit_slice_id AS resource,
           'is ' || state || ' and holds ' || granted - consumed || ' nanos, and its lease ran out '
           || to_char(expire_time AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS description
      FROM credit_slice
     WHERE state IN ('open', 'expired')
       AND ($1 = '' OR account_id = $1)
       AND expire_time + $4::interval < (SELECT lease_now())
"""

CHECKS = (
    Check("I1", Scope.WINDOW, _MOVEMENTS),
    Check("I1", Scope.HISTORY, _TOTAL),
    Check("I1", Scope.WINDOW, _ENTRY_NUMBERS),
    Check("I2", Scope.HISTORY, _POSTED),
    Check("I2", Scope.STATE, _SYSTEM_BALANCE),
    Check("I2", Scope.STATE, _REMAINING),
    Check("I3", Scope.STATE, _HELD),
    Check("I4", Scope.STATE, _FLOOR),
    Check("I5", Scope.WINDOW, _RECORD_NUMBERS),
    Check("I5", Scope.HISTORY, _ONE_RECORD),
    Check("I6", Scope.HISTORY, _CONSUMED),
    Check("I7", Scope.WINDOW, _ENTRIESOF_RECORDS),
    Check("I7", Scope.WINDOW, _ENTRIES_WITHOUT_RECORD),
    Check("I8", Scope.WINDOW, _REFUSED_RECEIPTS),
    Check("I8", Scope.WINDOW, _RECEIPTS_WITHOUT_RECORD),
    Check("I9", Scope.WINDOW, _COUNTS),
    Check("I10", Scope.WINDOW, _AMOUNT),
    Check("I11", Scope.STATE, _OVERDUE),
)

# Not a list of what is broken: receipts with what they have to say, for who verifies them.
#     $1, $2  as above
#     $3, $4  parts, and which of them: record numbers by their rest
#     $5      behind this record number all of them
RECEIPTS = """
    SELECT receipt.content, receipt.key_id, receipt.signature,
           r.generation_id, r.request_id, r.account_id, r.project_id, r.offering_id, r.model_id,
           r.version_id, r.price_id, r.input_tokens, r.cached_input_tokens, r.output_tokens,
           r.reasoning_tokens, r.amount, r.end_cause, r.start_time, r.end_time
      FROM receipt
      JOIN usage_record AS r ON r.number = receipt.record_number
     WHERE receipt.fault = ''
       AND ($1::text = '' OR r.account_id = $1)
       AND receipt.record_number > $2::bigint
       AND (receipt.record_number % $3::bigint = $4::bigint OR receipt.record_number > $5::bigint)
"""
