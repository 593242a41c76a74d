-- LoRA adapters. What one is never changes; whether it is there does, and raises the revision.
CREATE TABLE adapter (
    adapter_id text COLLATE "C" PRIMARY KEY,
    model_id text COLLATE "C" NOT NULL,
    version_id text COLLATE "C" NOT NULL,
    -- Relative to the directory of adapters that workers are given.
    path text NOT NULL CHECK (path <> ''),
    digest text NOT NULL CHECK (digest ~ '^sha256:[0-9a-f]{64}$'),
    -- The project that alone may use it; empty for all. Projects are auth's: nothing to refer to.
    project_id text COLLATE "C" NOT NULL,
    create_time timestamptz NOT NULL,
    -- Set while it is deleted. The row stays: its name is not used again for other content.
    delete_time timestamptz,
    revision bigint NOT NULL UNIQUE,
    FOREIGN KEY (model_id, version_id) REFERENCES model_version
);

CREATE TRIGGER adapter_content_is_immutable
    BEFORE UPDATE ON adapter
    FOR EACH ROW
    WHEN ((OLD.adapter_id, OLD.model_id, OLD.version_id, OLD.path, OLD.digest, OLD.project_id)
          IS DISTINCT FROM
          (NEW.adapter_id, NEW.model_id, NEW.version_id, NEW.path, NEW.digest, NEW.project_id))
    EXECUTE FUNCTION refuse_change();
CREATE TRIGGER adapter_is_kept
    BEFORE DELETE ON adapter
    FOR EACH ROW EXECUTE FUNCTION refuse_change();
