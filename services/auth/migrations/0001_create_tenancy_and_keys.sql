-- Names sort by bytes everywhere, whatever the locale of the database: pages follow this order.

CREATE TABLE organization (
    organization_id text COLLATE "C" PRIMARY KEY,
    display_name text NOT NULL,
    create_time timestamptz NOT NULL
);

CREATE TABLE project (
    project_id text COLLATE "C" PRIMARY KEY,
    organization_id text COLLATE "C" NOT NULL REFERENCES organization,
    display_name text NOT NULL,
    create_time timestamptz NOT NULL
);

-- The counter that watches follow (libs/rpc/feed.py). Its one row is raised by every transaction
-- that changes a key and is locked until that commits, so revisions become visible in order.
CREATE TABLE revision (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    value bigint NOT NULL
);
INSERT INTO revision (value) VALUES (0);

CREATE TABLE api_key (
    key_id text COLLATE "C" PRIMARY KEY,
    -- Of the whole key; the key itself is kept nowhere.
    secret_sha256 bytea NOT NULL CHECK (octet_length(secret_sha256) = 32),
    role text NOT NULL CHECK (role IN ('tenant', 'administrator')),
    -- Tenants' keys belong to a project, administrators' keys to none.
    project_id text COLLATE "C" REFERENCES project CHECK ((role = 'tenant') = (project_id IS NOT NULL)),
    display_name text NOT NULL,
    create_time timestamptz NOT NULL,
    -- Null while the key is accepted. Revoked for ever.
    revoke_time timestamptz,
    revision bigint NOT NULL UNIQUE
);

CREATE INDEX api_key_by_project ON api_key (project_id, key_id);
CREATE INDEX project_by_organization ON project (organization_id, project_id);
