-- An alert is told once in a window of a limit, whatever the limit was before. A day and a month may
-- begin at the same moment, and what was spent before a limit was made counts: where it counts from
-- says nothing about its windows any more.
-- Migrations that are missing share a transaction, and the next one changes grants. Settlements of the
-- version before write grants and then alerts, and who takes back what expired reads grants first:
-- in another order, or with a weaker lock at first, one of both would be a victim of the deadlock.
LOCK TABLE credit_grant IN ACCESS EXCLUSIVE MODE;
ALTER TABLE spend_alert
    -- Of the window. Null: told by the version before, which may still write while this one starts.
    ADD COLUMN span text CHECK (span IN ('day', 'month')),
    DROP CONSTRAINT spend_alert_limit_id_counted_after_window_start_percent_key;
CREATE UNIQUE INDEX spend_alert_of_window
    ON spend_alert (limit_id, window_start, percent, account_id, span);
