-- The idempotency key of a generation, so that a repeat which comes after the gateway has forgotten
-- the generation is told what was charged. The defaults are for records from before, and for code
-- of the version before, which may still write while this one starts.
-- Reads the table twice under its lock, about a second for a million records, and settlements wait
-- meanwhile. Where that is longer than postgres.statement_timeout, raise it for this one start.
ALTER TABLE usage_record
    -- Unique for the project while its generation lives; one that was not charged may be repeated,
    -- so several records can have it. Empty when the request had none.
    ADD COLUMN request_id text COLLATE "C" NOT NULL DEFAULT '',
    -- SHA-256 of what was asked for; empty when it is not known.
    ADD COLUMN request_sha256 bytea NOT NULL DEFAULT ''
        CHECK (octet_length(request_sha256) IN (0, 32)),
    ADD CHECK (request_id <> '' OR request_sha256 = '');

-- Records without a request_id have no entry in it. With the number, so that the first record of a
-- request is the first entry that is found.
CREATE INDEX usage_record_of_request ON usage_record (project_id, request_id, number)
    WHERE request_id <> '';
