-- Names sort by bytes everywhere, whatever the locale of the database: pages follow this order.
-- Money is bigint nanos. Whoever changes several rows takes its locks in the order
--     ledger_head, balance (by account_id), credit_slice (by credit_slice_id)
-- and whoever changes a slice holds the lock of its account's balance.

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is immutable', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END
$$;

CREATE TABLE account (
    account_id text COLLATE "C" PRIMARY KEY,
    display_name text NOT NULL,
    currency_code text NOT NULL CHECK (currency_code = 'USD'),
    create_time timestamptz NOT NULL
);

-- A customer's money. The ledger's own accounts have no such row: each would be changed by every
-- transaction there is. What they have is the sum of their entries.
CREATE TABLE balance (
    account_id text COLLATE "C" PRIMARY KEY REFERENCES account,
    posted bigint NOT NULL DEFAULT 0,
    held bigint NOT NULL DEFAULT 0 CHECK (held >= 0),
    floor bigint NOT NULL DEFAULT 0,
    CHECK (posted - held >= floor)
) WITH (fillfactor = 50);

-- How far ledger and usage are written. Whoever writes either holds this row until the commit, so
-- numbers are given without gaps and become visible in their order: a reader that has seen a number
-- has seen all below it, and no page skips a row. With a sequence a lower number could be committed
-- after a higher one was read.
CREATE TABLE ledger_head (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    entry_count bigint NOT NULL,
    record_count bigint NOT NULL
) WITH (fillfactor = 10);
INSERT INTO ledger_head (entry_count, record_count) VALUES (0, 0);

CREATE TABLE ledger_entry (
    number bigint PRIMARY KEY,
    account_id text COLLATE "C" NOT NULL,
    -- Number of the first entry of the movement.
    transaction_number bigint NOT NULL,
    amount bigint NOT NULL CHECK (amount <> 0),
    kind text NOT NULL CHECK (kind IN ('grant', 'adjustment', 'usage')),
    -- A generation id for usage, a request_id for the rest.
    source text NOT NULL,
    description text NOT NULL,
    create_time timestamptz NOT NULL
);
CREATE UNIQUE INDEX ledger_entry_of_account ON ledger_entry (account_id, number);
-- A request posts once.
CREATE UNIQUE INDEX ledger_entry_of_request ON ledger_entry (account_id, source)
    WHERE kind <> 'usage' AND account_id NOT LIKE 'system-%';

CREATE TABLE price (
    price_id text COLLATE "C" PRIMARY KEY,
    offering_id text COLLATE "C" NOT NULL,
    -- Nanos per million tokens.
    input_price bigint NOT NULL CHECK (input_price >= 0),
    output_price bigint NOT NULL CHECK (output_price >= 0),
    effective_time timestamptz NOT NULL,
    create_time timestamptz NOT NULL,
    revision bigint NOT NULL UNIQUE
);
CREATE INDEX price_of_offering ON price (offering_id, price_id);

-- The counter that watches of prices follow (libs/rpc/feed.py).
CREATE TABLE price_revision (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    value bigint NOT NULL
);
INSERT INTO price_revision (value) VALUES (0);

-- Leases run on the clock of the database. Tests set the shift; nothing else does.
CREATE TABLE lease_clock (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    shift interval NOT NULL
);
INSERT INTO lease_clock (shift) VALUES ('0');

CREATE FUNCTION lease_now() RETURNS timestamptz LANGUAGE sql STABLE AS
    'SELECT statement_timestamp() + shift FROM lease_clock';

-- Money set aside for one gateway. Held is granted - consumed while open or expired.
CREATE TABLE credit_slice (
    credit_slice_id text COLLATE "C" PRIMARY KEY,
    -- Null in the mark that a slice was closed before it was acquired.
    account_id text COLLATE "C" REFERENCES balance,
    holder text NOT NULL,
    granted bigint NOT NULL CHECK (granted >= 0),
    consumed bigint NOT NULL DEFAULT 0 CHECK (consumed >= 0),
    state text NOT NULL CHECK (state IN ('open', 'expired', 'closed', 'reclaimed')),
    expire_time timestamptz NOT NULL,
    CHECK (consumed <= granted),
    CHECK (account_id IS NOT NULL OR state = 'closed')
) WITH (fillfactor = 50);
-- Not on expire_time: renewals stay cheap, and there are never many that hold money.
CREATE INDEX credit_slice_holding_money ON credit_slice (account_id)
    WHERE state IN ('open', 'expired');

CREATE TABLE usage_record (
    generation_id text COLLATE "C" PRIMARY KEY,
    account_id text COLLATE "C" NOT NULL,
    number bigint NOT NULL,
    credit_slice_id text NOT NULL,
    project_id text NOT NULL,
    api_key_id text NOT NULL,
    offering_id text NOT NULL,
    model_id text NOT NULL,
    version_id text NOT NULL,
    price_id text NOT NULL,
    input_tokens bigint NOT NULL CHECK (input_tokens >= 0),
    output_tokens bigint NOT NULL CHECK (output_tokens >= 0),
    -- What the counts cost at the price; zero when the end is not charged.
    amount bigint NOT NULL CHECK (amount >= 0),
    -- Part of it that the account could not pay, on system-bad-debt.
    shortfall bigint NOT NULL CHECK (shortfall BETWEEN 0 AND amount),
    -- Number of maas.billing.v1.EndCause.
    end_cause smallint NOT NULL,
    start_time timestamptz NOT NULL,
    end_time timestamptz NOT NULL,
    settle_time timestamptz NOT NULL
);
CREATE UNIQUE INDEX usage_record_of_account ON usage_record (account_id, number);

-- The role owns its tables, so a missing grant would stop nobody.
CREATE TRIGGER ledger_entry_is_immutable
    BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_entry
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER usage_record_is_immutable
    BEFORE UPDATE OR DELETE OR TRUNCATE ON usage_record
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER price_is_immutable
    BEFORE UPDATE OR DELETE OR TRUNCATE ON price
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

INSERT INTO account (account_id, display_name, currency_code, create_time)
VALUES ('system-revenue', 'Charges of all customers', 'USD', '2026-01-01T00:00:00Z'),
       ('system-funding', 'Counterpart of grants and adjustments', 'USD', '2026-01-01T00:00:00Z'),
       ('system-bad-debt', 'Charges that no credit was left for', 'USD', '2026-01-01T00:00:00Z');
