-- The live grants of an account in the order in which they are used up, so that a charge reads the first
-- of them only. Replaces the index without an order, which code of the version before did not name.
-- Grants are few beside usage records: nobody waits for long.
CREATE INDEX credit_grant_in_order
    ON credit_grant (account_id, priority, expire_time, number)
    WHERE is_live;
DROP INDEX credit_grant_with_something_left;
