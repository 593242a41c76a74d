-- Invoices, and the ways to usage and refunds of an account in a time.
-- Each index reads its table once, and settlements wait meanwhile; see 0002 about the time that
-- takes.

-- Lists and sums of a month read that month only. With the number, so that a page of numbers is found
-- in the index alone.
CREATE INDEX usage_record_of_time ON usage_record (account_id, settle_time, number);
CREATE INDEX refund_of_account ON refund (account_id, number);

-- How many invoices an account has had: their numbers have no gaps. Whoever issues one holds
-- this row until the commit. Taken alone: no lock of the ledger is needed, because records and entries
-- never change, and what comes later has higher numbers.
CREATE TABLE invoice_head (
    account_id text COLLATE "C" PRIMARY KEY REFERENCES account,
    invoice_count bigint NOT NULL CHECK (invoice_count >= 0)
);

CREATE TABLE invoice (
    account_id text COLLATE "C" NOT NULL REFERENCES invoice_head,
    number bigint NOT NULL CHECK (number > 0),
    -- Its first day.
    month date NOT NULL CHECK (extract(day FROM month) = 1),
    state text NOT NULL CHECK (state IN ('issued', 'void')),
    -- One object for each offering and price, with counts and a charge, in this order.
    lines jsonb NOT NULL CHECK (jsonb_typeof(lines) = 'array'),
    refunds bigint NOT NULL CHECK (refunds <= 0),
    total bigint NOT NULL,
    record_count bigint NOT NULL CHECK (record_count >= 0),
    -- Numbers of the usage records that are on it, as far as they are the account's. A record is on
    -- one invoice that is issued, at most.
    records int8multirange NOT NULL,
    -- Numbers of refunds, likewise.
    refund_numbers int8multirange NOT NULL,
    issue_time timestamptz NOT NULL,
    void_time timestamptz CHECK ((void_time IS NOT NULL) = (state = 'void')),
    PRIMARY KEY (account_id, number)
);
CREATE UNIQUE INDEX invoice_of_month ON invoice (account_id, month) WHERE state = 'issued';

-- An invoice becomes void, and nothing else of it ever changes.
CREATE FUNCTION keep_invoice() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.state = 'issued' AND NEW.state = 'void' THEN
        OLD.state := NEW.state;
        OLD.void_time := NEW.void_time;
        IF OLD IS NOT DISTINCT FROM NEW THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION 'invoice is immutable' USING ERRCODE = 'restrict_violation';
END
$$;
CREATE TRIGGER invoice_is_kept
    BEFORE UPDATE ON invoice
    FOR EACH ROW EXECUTE FUNCTION keep_invoice();
CREATE TRIGGER invoice_is_immutable
    BEFORE DELETE OR TRUNCATE ON invoice
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
