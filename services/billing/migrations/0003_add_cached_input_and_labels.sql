-- What the prefix cache had of a prompt and its own price, what of the output was reasoning, and
-- whom a request was for. The defaults are for records and prices from before, and for code of the
-- version before, which may still write while this one starts: to it nothing is cached.
-- A CHECK on new columns reads the table once under its lock; see 0002 about the time that takes.
ALTER TABLE price
    -- Nanos per million tokens that the prefix cache had; null: input_price.
    ADD COLUMN cached_input_price bigint
        CHECK (cached_input_price BETWEEN 0 AND input_price);

ALTER TABLE usage_record
    -- Part of input_tokens.
    ADD COLUMN cached_input_tokens bigint NOT NULL DEFAULT 0,
    -- Part of output_tokens.
    ADD COLUMN reasoning_tokens bigint NOT NULL DEFAULT 0,
    -- The client's own, texts by texts.
    ADD COLUMN labels jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(labels) = 'object'),
    -- The client's own id of whom the request was for; empty when it said none.
    ADD COLUMN end_user text NOT NULL DEFAULT '',
    ADD CHECK (cached_input_tokens BETWEEN 0 AND input_tokens),
    ADD CHECK (reasoning_tokens BETWEEN 0 AND output_tokens);
