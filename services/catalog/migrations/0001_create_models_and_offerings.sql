-- Names sort by bytes everywhere, whatever the locale of the database: pages follow this order.

CREATE TABLE model (
    model_id text COLLATE "C" PRIMARY KEY,
    display_name text NOT NULL,
    license text NOT NULL,
    description text NOT NULL,
    create_time timestamptz NOT NULL
);

CREATE TABLE model_version (
    model_id text COLLATE "C" NOT NULL REFERENCES model,
    version_id text COLLATE "C" NOT NULL,
    -- Empty for the simulated engine, which has no weights.
    digest text NOT NULL CHECK (digest = '' OR digest ~ '^sha256:[0-9a-f]{64}$'),
    context_length integer NOT NULL CHECK (context_length > 0),
    prompt_overhead_tokens integer NOT NULL CHECK (prompt_overhead_tokens >= 0),
    message_overhead_tokens integer NOT NULL CHECK (message_overhead_tokens >= 0),
    create_time timestamptz NOT NULL,
    PRIMARY KEY (model_id, version_id)
);

-- A version never changes: workers, prices and receipts rely on it. The role owns the table, so a
-- missing grant would stop nobody.
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is immutable', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END
$$;

CREATE TRIGGER model_version_is_immutable
    BEFORE UPDATE OR DELETE ON model_version
    FOR EACH ROW EXECUTE FUNCTION refuse_change();

-- The counter that watches follow (libs/rpc/feed.py). Its one row is raised by every transaction
-- that changes an offering and is locked until that commits, so revisions become visible in order.
CREATE TABLE revision (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    value bigint NOT NULL
);
INSERT INTO revision (value) VALUES (0);

CREATE TABLE offering (
    offering_id text COLLATE "C" PRIMARY KEY,
    display_name text NOT NULL,
    model_id text COLLATE "C" NOT NULL,
    version_id text COLLATE "C" NOT NULL,
    default_max_output_tokens integer NOT NULL CHECK (default_max_output_tokens > 0),
    default_temperature double precision CHECK (default_temperature BETWEEN 0 AND 2),
    default_top_p double precision CHECK (default_top_p BETWEEN 0 AND 1),
    default_top_k integer CHECK (default_top_k >= 0),
    create_time timestamptz NOT NULL,
    revision bigint NOT NULL UNIQUE,
    FOREIGN KEY (model_id, version_id) REFERENCES model_version
);
