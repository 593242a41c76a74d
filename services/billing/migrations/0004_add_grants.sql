-- Grants with priority and expiry, credit limits, refunds, the whole price, engine time, and ended
-- slices that are pruned. The defaults are for rows from before, and for code of the version before,
-- which may still write while this one starts. What it charges meanwhile is divided among the grants
-- with the next charge by this version; what it gives is no grant, and is used up first.
-- Checks of tables that grow are not validated: what is there has met stricter ones.

-- Credit that is given once and used up, in the order of
--     priority, expire_time (none is last), number
-- Changed only under the lock of its account's balance. Of every account
--     sum(remaining) = greatest(posted, 0)
-- so where an account is below zero, what it is given fills that first.
CREATE TABLE credit_grant (
    account_id text COLLATE "C" NOT NULL REFERENCES balance,
    grant_id text COLLATE "C" NOT NULL,
    -- Of the ledger entry that gave it; 0 for what was there before grants were.
    number bigint NOT NULL,
    kind text NOT NULL CHECK (kind IN ('gift', 'top_up')),
    amount bigint NOT NULL CHECK (amount > 0),
    remaining bigint NOT NULL CHECK (remaining BETWEEN 0 AND amount),
    priority smallint NOT NULL CHECK (priority BETWEEN 0 AND 100),
    -- Null: it does not expire. On the clock of leases.
    expire_time timestamptz,
    create_time timestamptz NOT NULL,
    description text NOT NULL,
    -- Something remains. A column of its own, so that the index below has no part in a charge.
    is_live boolean NOT NULL DEFAULT true CHECK (is_live = (remaining > 0)),
    PRIMARY KEY (account_id, grant_id)
) WITH (fillfactor = 50);
CREATE INDEX credit_grant_with_something_left ON credit_grant (account_id) WHERE is_live;

INSERT INTO credit_grant (
    account_id, grant_id, number, kind, amount, remaining, priority, create_time, description
)
SELECT account_id, 'entry-0', 0, 'gift', posted, posted, 50, now(), 'Balance from before grants'
  FROM balance
 WHERE posted > 0;

ALTER TABLE balance
    -- How far new slices may take the account below zero. The floor, which nothing takes it below,
    -- is lower only while the account is, after its limit was lowered.
    ADD COLUMN credit_limit bigint NOT NULL DEFAULT 0 CHECK (credit_limit >= 0),
    -- No grant with something left expires earlier; null when none does.
    ADD COLUMN next_expire_time timestamptz;
UPDATE balance SET credit_limit = -floor WHERE floor < 0;
CREATE INDEX balance_with_expiry ON balance (account_id, next_expire_time)
    WHERE next_expire_time IS NOT NULL;

ALTER TABLE ledger_entry
    DROP CONSTRAINT ledger_entry_kind_check,
    ADD CONSTRAINT ledger_entry_kind_check CHECK (
        kind IN ('grant', 'adjustment', 'usage', 'top_up', 'refund', 'expiry')
    ) NOT VALID,
    -- That this entry gave or took back.
    ADD COLUMN grant_id text;
-- A request posts once; a grant may expire in parts, while slices still hold some of it.
DROP INDEX ledger_entry_of_request;
CREATE UNIQUE INDEX ledger_entry_of_request ON ledger_entry (account_id, source)
    WHERE kind NOT IN ('usage', 'expiry') AND account_id NOT LIKE 'system-%';

-- What was given back of a charge. Those of a generation sum to its charge at most.
CREATE TABLE refund (
    -- Of the ledger entry on the account.
    number bigint PRIMARY KEY,
    account_id text COLLATE "C" NOT NULL,
    generation_id text COLLATE "C" NOT NULL,
    amount bigint NOT NULL CHECK (amount > 0),
    create_time timestamptz NOT NULL
);
CREATE INDEX refund_of_generation ON refund (generation_id);
CREATE TRIGGER refund_is_immutable
    BEFORE UPDATE OR DELETE OR TRUNCATE ON refund
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

ALTER TABLE price
    -- Nanos per million output tokens that are reasoning; null: output_price.
    ADD COLUMN reasoning_price bigint CHECK (reasoning_price >= 0),
    -- Nanos for each request that is charged.
    ADD COLUMN request_price bigint NOT NULL DEFAULT 0 CHECK (request_price >= 0),
    -- What requests in the background pay less, of each line before it is rounded up.
    ADD COLUMN background_discount_percent smallint NOT NULL DEFAULT 0
        CHECK (background_discount_percent BETWEEN 0 AND 100),
    -- Nanos that a second of an engine costs the operator; null: not known. Never charged.
    ADD COLUMN engine_second_cost bigint CHECK (engine_second_cost >= 0);

ALTER TABLE usage_record
    -- Share of an engine's time that it took, microseconds.
    ADD COLUMN engine_time_us bigint NOT NULL DEFAULT 0,
    -- It has the discount of requests in the background.
    ADD COLUMN is_background boolean NOT NULL DEFAULT false,
    ADD CONSTRAINT usage_record_engine_time_check CHECK (engine_time_us >= 0) NOT VALID;

ALTER TABLE credit_slice
    -- On the clock of leases: what was set aside before a grant expired may still use it.
    ADD COLUMN acquire_time timestamptz NOT NULL DEFAULT lease_now(),
    -- When it was closed or reclaimed; null while it holds money, and where its id has no time, so
    -- that it is kept for ever.
    ADD COLUMN end_time timestamptz;
UPDATE credit_slice
   SET end_time = least(expire_time, lease_now())
 WHERE state IN ('closed', 'reclaimed');
CREATE INDEX credit_slice_that_ended ON credit_slice (end_time) WHERE end_time IS NOT NULL;
