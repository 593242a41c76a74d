-- One row for each name that a worker has ever registered under.
CREATE TABLE worker (
    -- "workers/{worker}"
    name text PRIMARY KEY,
    -- Grows by one with each registration: what fences older incarnations.
    epoch bigint NOT NULL CHECK (epoch > 0),
    -- The rest is for people: who registered last.
    incarnation text NOT NULL,
    endpoint text NOT NULL,
    register_time timestamptz NOT NULL
);
