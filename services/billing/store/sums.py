"""Statements that list what is broken of sums over the ledger: grants, refunds, limits, invoices.

The same form as those of findings.py, which says what they are given.
"""

from __future__ import annotations

from services.billing.store.findings import OF_ENTRY, OF_RECORD, Check, Scope

_OF_LIMIT = "SELECT 'limits/' || l.limit_id AS resource,"
_OF_GRANT = "SELECT 'accounts/' || g.account_id || '/grants/' || g.grant_id AS resource,"
_OF_INVOICE = """
    SELECT 'accounts/' || i.account_id || '/invoices/INV-'
           || repeat('0', 6 - length(i.number::text)) || i.number AS resource,
"""

_GRANTS = f"""
    {_OF_GRANT}
           'gave ' || g.amount || ' nanos; its entry ' || g.number || ' says '
           || coalesce(e.amount || ' on accounts/' || e.account_id, 'nothing') AS description
      FROM credit_grant AS g
      LEFT JOIN ledger_entry AS e ON e.number = g.number
     WHERE g.number > $3
       AND ($1 = '' OR g.account_id = $1)
       AND (e.account_id, e.grant_id, e.amount)
           IS DISTINCT FROM (g.account_id, g.grant_id, g.amount)
"""
_ENTRIES_WITHOUT_GRANT = f"""
    {OF_ENTRY}
           'there is no grant ' || e.grant_id AS description
      FROM ledger_entry AS e
     WHERE e.number > $3
       AND ($1 = '' OR e.account_id = $1)
       AND e.grant_id IS NOT NULL
       AND e.account_id NOT LIKE 'system-%'
       AND NOT EXISTS (SELECT FROM credit_grant AS g
                        WHERE g.account_id = e.account_id AND g.grant_id = e.grant_id)
"""
_REFUNDS = f"""
    {OF_ENTRY}
           'gives ' || e.amount || ' nanos back; its refund says '
           || coalesce(f.amount || ' to accounts/' || f.account_id, 'nothing') AS description
      FROM ledger_entry AS e
      LEFT JOIN refund AS f ON f.number = e.number
     WHERE e.number > $3
       AND ($1 = '' OR e.account_id = $1)
       AND e.kind = 'refund'
       AND e.account_id NOT LIKE 'system-%'
       AND (f.account_id, f.amount) IS DISTINCT FROM (e.account_id, e.amount)
"""
_GIVEN = "SELECT generation_id, sum(amount) AS total FROM refund GROUP BY generation_id"
_REFUNDED = f"""
    {OF_RECORD}
           'refunded ' || given.total || ' nanos of a charge of ' || r.amount - r.shortfall
           AS description
      FROM ({_GIVEN}) AS given
      JOIN usage_record AS r USING (generation_id)
     WHERE ($1 = '' OR r.account_id = $1)
       AND given.total > r.amount - r.shortfall
"""
_REFUNDS_WITHOUT_ENTRY = """
    SELECT 'accounts/' || f.account_id || '/usageRecords/' || f.generation_id AS resource,
           'a refund of ' || f.amount || ' nanos is not in the ledger, or of no charge'
           AS description
      FROM refund AS f
     WHERE f.number > $3
       AND ($1 = '' OR f.account_id = $1)
       AND NOT EXISTS (
               SELECT
                 FROM ledger_entry AS e
                 JOIN usage_record AS r ON r.account_id = e.account_id
                WHERE e.number = f.number
                  AND e.kind = 'refund'
                  AND e.account_id = f.account_id
                  AND r.generation_id = f.generation_id
           )
"""
_SET_ASIDE = """
    SELECT w.limit_id, w.window_start, sum(s.granted - s.consumed) AS total
      FROM slice_window AS w
      JOIN credit_slice AS s USING (credit_slice_id)
     WHERE s.state IN ('open', 'expired')
     GROUP BY w.limit_id, w.window_start
"""
_WINDOWS_HELD = f"""
    {_OF_LIMIT}
           'held is ' || coalesce(w.held, 0) || ' nanos in the window from '
           || to_char(window_start AT TIME ZONE 'UTC', 'YYYY-MM-DD') || ', its slices have '
           || coalesce(s.total, 0) || ' left' AS description
      FROM spend_window AS w
      FULL JOIN ({_SET_ASIDE}) AS s USING (limit_id, window_start)
      JOIN usage_limit AS l USING (limit_id)
     WHERE ($1 = '' OR l.account_id = $1)
       AND coalesce(w.held, 0) <> coalesce(s.total, 0)
"""
_KNOWN_LIMITS = """
    SELECT 'accounts/' || b.account_id AS resource,
           CASE WHEN b.has_spend_limits THEN 'has no spend limit, and is told to'
                ELSE 'has spend limits that nothing is told to'
           END AS description
      FROM balance AS b
     WHERE ($1 = '' OR b.account_id = $1)
       AND b.has_spend_limits <> EXISTS (
               SELECT
                 FROM usage_limit AS l
                WHERE l.account_id = b.account_id
                  AND l.amount IS NOT NULL
                  AND NOT l.is_deleted
           )
"""
_CHARGED = """
    SELECT coalesce(sum(r.amount - r.shortfall), 0) AS total
      FROM usage_record AS r
     WHERE r.account_id = l.account_id
       AND r.number > l.counted_after
       AND CASE l.scope_kind
           WHEN 'account' THEN l.scope_id = r.account_id
           WHEN 'project' THEN l.scope_id = r.project_id
           ELSE l.scope_id = r.api_key_id
           END
"""
_SPENT = "SELECT coalesce(sum(spent), 0) AS total FROM spend_window WHERE limit_id = l.limit_id"
# Which window a charge is counted in depends on slices that are pruned; that it is in one does not.
_WINDOWS_SPENT = f"""
    {_OF_LIMIT}
           'its windows have spent ' || spent.total || ' nanos, the charges that it counts are '
           || charged.total AS description
      FROM usage_limit AS l
     CROSS JOIN LATERAL ({_CHARGED}) AS charged
     CROSS JOIN LATERAL ({_SPENT}) AS spent
     WHERE ($1 = '' OR l.account_id = $1)
       AND l.amount IS NOT NULL
       AND NOT l.is_deleted
       AND charged.total <> spent.total
"""
_INVOICED_TWICE = f"""
    {_OF_INVOICE}
           'has records or refunds that invoice ' || other.number || ' has, too' AS description
      FROM invoice AS i
      JOIN invoice AS other ON other.account_id = i.account_id AND other.number < i.number
     WHERE ($1 = '' OR i.account_id = $1)
       AND i.state = 'issued'
       AND other.state = 'issued'
       AND (i.records && other.records OR i.refund_numbers && other.refund_numbers)
"""
_INVOICE_NUMBERS = """
    SELECT 'accounts/' || h.account_id AS resource,
           'has had ' || h.invoice_count || ' invoices; there are ' || found.count
           || ', the last is number ' || found.last AS description
      FROM invoice_head AS h
     CROSS JOIN LATERAL (
               SELECT count(*) AS count, coalesce(max(number), 0) AS last
                 FROM invoice
                WHERE account_id = h.account_id
           ) AS found
     WHERE ($1 = '' OR h.account_id = $1)
       AND (h.invoice_count <> found.count OR h.invoice_count <> found.last)
"""
_LINES_OF_RECORDS = """
    SELECT r.offering_id AS offering, r.price_id AS price, count(*) AS records,
           sum(r.input_tokens)::bigint AS input_tokens,
           sum(r.cached_input_tokens)::bigint AS cached_input_tokens,
           sum(r.output_tokens)::bigint AS output_tokens,
           sum(r.reasoning_tokens)::bigint AS reasoning_tokens,
           sum(r.amount - r.shortfall)::bigint AS charge
      FROM unnest(i.records) AS part
      JOIN usage_record AS r
        ON r.account_id = i.account_id
       AND r.number >= lower(part)
       AND r.number < upper(part)
     GROUP BY r.offering_id, r.price_id
"""
_LINES = """
    SELECT *
      FROM jsonb_to_recordset(i.lines) AS line (
               offering text, price text, records bigint, input_tokens bigint,
               cached_input_tokens bigint, output_tokens bigint, reasoning_tokens bigint,
               charge bigint
           )
"""
_LINE_SUMS = f"""
    SELECT coalesce(sum(charge), 0) AS charge, coalesce(sum(records), 0) AS records
      FROM ({_LINES}) AS line
"""  # noqa: S608 - made of constants
_WRONG_LINES = f"""
    SELECT count(*) AS count
      FROM ({_LINES}) AS said
      FULL JOIN ({_LINES_OF_RECORDS}) AS counted USING (offering, price)
     WHERE to_jsonb(said) IS DISTINCT FROM to_jsonb(counted)
"""  # noqa: S608 - made of constants
_GIVEN_BACK = """
    SELECT coalesce(sum(f.amount), 0) AS total
      FROM unnest(i.refund_numbers) AS part
      JOIN refund AS f
        ON f.account_id = i.account_id
       AND f.number >= lower(part)
       AND f.number < upper(part)
"""
_INVOICES = f"""
    {_OF_INVOICE}
           wrong.count || ' lines differ from its usage records; lines sum to ' || lines.charge
           || ' nanos, its refunds to ' || given.total || ', it says ' || -i.refunds
           || ' and a total of ' || i.total || ' of ' || i.record_count || ' records'
           AS description
      FROM invoice AS i
     CROSS JOIN LATERAL ({_LINE_SUMS}) AS lines
     CROSS JOIN LATERAL ({_WRONG_LINES}) AS wrong
     CROSS JOIN LATERAL ({_GIVEN_BACK}) AS given
     WHERE ($1 = '' OR i.account_id = $1)
       AND (
               wrong.count > 0
            OR i.refunds <> -given.total
            OR i.total <> lines.charge - given.total
            OR i.record_count <> lines.records
           )
"""

CHECKS = (
    Check("I2", Scope.WINDOW, _GRANTS),
    Check("I2", Scope.WINDOW, _ENTRIES_WITHOUT_GRANT),
    Check("I3", Scope.STATE, _WINDOWS_HELD),
    Check("I3", Scope.STATE, _KNOWN_LIMITS),
    Check("I5", Scope.HISTORY, _INVOICED_TWICE),
    Check("I6", Scope.HISTORY, _REFUNDED),
    Check("I7", Scope.WINDOW, _REFUNDS),
    Check("I7", Scope.WINDOW, _REFUNDS_WITHOUT_ENTRY),
    Check("I12", Scope.HISTORY, _WINDOWS_SPENT),
    Check("I12", Scope.HISTORY, _INVOICE_NUMBERS),
    Check("I12", Scope.HISTORY, _INVOICES),
)
