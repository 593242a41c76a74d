-- Limits of what is spent and how fast, windows of spend limits, alerts, quota and places.
-- Whoever changes a spend limit or one of its windows holds the lock of its account's balance, as
-- whoever changes a slice does; then limit_revision. Quota and places have locks of their own, taken
-- by limit id and metric, and whoever holds one of them takes no other lock afterwards.

CREATE TABLE usage_limit (
    limit_id text COLLATE "C" PRIMARY KEY,
    account_id text COLLATE "C" NOT NULL REFERENCES balance,
    -- Whom it limits. Projects and keys are only names here.
    scope_kind text NOT NULL CHECK (scope_kind IN ('account', 'project', 'api_key')),
    scope_id text COLLATE "C" NOT NULL,
    -- Of a spend limit: nanos, over which time, percentages with an alert.
    amount bigint CHECK (amount >= 0),
    span text CHECK (span IN ('day', 'month')),
    alert_percents smallint[] NOT NULL DEFAULT '{}',
    -- Of a rate limit; null is not limited.
    requests_per_minute bigint CHECK (requests_per_minute > 0),
    input_tokens_per_minute bigint CHECK (input_tokens_per_minute > 0),
    output_tokens_per_minute bigint CHECK (output_tokens_per_minute > 0),
    concurrent_generations bigint CHECK (concurrent_generations > 0),
    -- A spend limit counts usage records of its account behind this number.
    counted_after bigint NOT NULL DEFAULT 0,
    create_time timestamptz NOT NULL,
    -- A deleted limit stays, for watchers that have to hear of it.
    is_deleted boolean NOT NULL DEFAULT false,
    revision bigint NOT NULL UNIQUE,
    CHECK ((amount IS NULL) = (span IS NULL)),
    CHECK (amount IS NULL OR num_nonnulls(requests_per_minute, input_tokens_per_minute,
                                          output_tokens_per_minute, concurrent_generations) = 0)
);
CREATE INDEX usage_limit_of_account ON usage_limit (account_id, limit_id) WHERE NOT is_deleted;

-- The counter that watches of limits follow.
CREATE TABLE limit_revision (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    value bigint NOT NULL
);
INSERT INTO limit_revision (value) VALUES (0);

-- Whether any spend limit is there, so that accounts without one pay nothing for those with.
ALTER TABLE balance ADD COLUMN has_spend_limits boolean NOT NULL DEFAULT false;

-- First moment of the window around a time, and that of the next window.
CREATE FUNCTION window_start(span text, moment timestamptz) RETURNS timestamptz
    LANGUAGE sql IMMUTABLE AS
    $$ SELECT date_trunc(span, moment AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' $$;
CREATE FUNCTION window_end(span text, moment timestamptz) RETURNS timestamptz
    LANGUAGE sql IMMUTABLE AS
    $$ SELECT (date_trunc(span, moment AT TIME ZONE 'UTC')
               + CASE span WHEN 'day' THEN interval '1 day' WHEN 'month' THEN interval '1 month' END
              ) AT TIME ZONE 'UTC' $$;

-- What may be spent of a spend limit in one window: amount - spent - held.
CREATE TABLE spend_window (
    limit_id text COLLATE "C" NOT NULL,
    window_start timestamptz NOT NULL,
    -- Charges of usage records.
    spent bigint NOT NULL DEFAULT 0 CHECK (spent >= 0),
    -- What open and expired slices of the window have left.
    held bigint NOT NULL DEFAULT 0 CHECK (held >= 0),
    PRIMARY KEY (limit_id, window_start)
) WITH (fillfactor = 50);

-- Which windows a slice was taken from. A slice ends with the first of its windows.
ALTER TABLE credit_slice ADD COLUMN window_end_time timestamptz;
CREATE TABLE slice_window (
    credit_slice_id text COLLATE "C" NOT NULL REFERENCES credit_slice ON DELETE CASCADE,
    limit_id text COLLATE "C" NOT NULL,
    window_start timestamptz NOT NULL,
    PRIMARY KEY (credit_slice_id, limit_id)
);
CREATE INDEX slice_window_of_limit ON slice_window (limit_id);

-- Numbered in order of commit: whoever writes one holds ledger_head.
CREATE TABLE spend_alert (
    number bigint PRIMARY KEY,
    limit_id text COLLATE "C" NOT NULL,
    account_id text COLLATE "C" NOT NULL,
    percent smallint NOT NULL,
    window_start timestamptz NOT NULL,
    -- Of the limit: one that was made anew counts anew, and warns anew.
    counted_after bigint NOT NULL,
    spent bigint NOT NULL,
    create_time timestamptz NOT NULL,
    UNIQUE (limit_id, counted_after, window_start, percent)
);
CREATE UNIQUE INDEX spend_alert_of_account ON spend_alert (account_id, number);

-- What follows can be lost: it is not written ahead, and empty after a crash of the database. Then
-- every rate limit starts anew, which allows one more burst at most.

-- A bucket that fills by what is taken and drains at the limit's rate. Its level is in 60 millionths
-- of what is counted: a rate of n a minute drains n of them in a microsecond, and nothing is rounded.
CREATE UNLOGGED TABLE quota_bucket (
    limit_id text COLLATE "C" NOT NULL,
    -- Number of maas.billing.v1.QuotaMetric.
    metric smallint NOT NULL,
    level bigint NOT NULL CHECK (level >= 0),
    -- The part of the level that each holder took, and may give back.
    shares jsonb NOT NULL,
    drain_time timestamptz NOT NULL,
    PRIMARY KEY (limit_id, metric)
) WITH (fillfactor = 50);

-- The row that whoever changes the places of a limit locks.
CREATE UNLOGGED TABLE place_gate (
    limit_id text COLLATE "C" PRIMARY KEY
);
-- Places of running generations that gateways hold until a time.
CREATE UNLOGGED TABLE place_lease (
    limit_id text COLLATE "C" NOT NULL,
    holder text COLLATE "C" NOT NULL,
    held bigint NOT NULL,
    in_use bigint NOT NULL,
    wanted bigint NOT NULL,
    expire_time timestamptz NOT NULL,
    PRIMARY KEY (limit_id, holder)
) WITH (fillfactor = 50);
CREATE INDEX place_lease_of_holder ON place_lease (holder);
