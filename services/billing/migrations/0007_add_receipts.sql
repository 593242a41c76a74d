-- Signed receipts, the keys that they are verified with, and how far the auditor came.

-- What the client got with its last frame. Beside the usage records and by their numbers, so that a
-- record without a receipt costs nothing and sums of usage read no signatures.
CREATE TABLE receipt (
    record_number bigint PRIMARY KEY,
    -- Serialized maas.common.v1.Receipt, exactly the bytes that are signed.
    content bytea NOT NULL,
    key_id text COLLATE "C" NOT NULL,
    signature bytea NOT NULL,
    -- Why what came with the settlement was not kept; empty when it was.
    fault text NOT NULL,
    CHECK ((fault = '') = (octet_length(content) > 0))
);
CREATE TRIGGER receipt_is_immutable
    BEFORE UPDATE OR DELETE OR TRUNCATE ON receipt
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- Every public key that billing was ever told of: receipts outlive the use of their keys.
CREATE TABLE receipt_key (
    key_id text COLLATE "C" PRIMARY KEY,
    public_key bytea NOT NULL CHECK (octet_length(public_key) = 32),
    create_time timestamptz NOT NULL
);
CREATE TRIGGER receipt_key_is_immutable
    BEFORE UPDATE OR DELETE OR TRUNCATE ON receipt_key
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- How far ledger and usage were written when the auditor had looked at them: entries behind
-- entry_count belong to records behind record_count, or to none. The oldest rows are pruned.
CREATE TABLE audit_checkpoint (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    record_count bigint NOT NULL,
    entry_count bigint NOT NULL,
    -- All was looked at, not only what was new.
    is_full boolean NOT NULL,
    duration_us bigint NOT NULL,
    create_time timestamptz NOT NULL
);

-- Records are written in order of their numbers, so their place in the table follows them: this
-- index is a few pages, and costs writers nothing. For an auditor that reads what is new.
CREATE INDEX usage_record_by_number ON usage_record USING brin (number); -- codespell:ignore brin
