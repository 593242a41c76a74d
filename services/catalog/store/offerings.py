"""Models, versions and offerings in the database. One method is one transaction."""

from __future__ import annotations

import asyncpg

from libs.errors import already_exists, not_found
from libs.paging import Page
from libs.postgres import Connection, Database
from services.catalog.domain import BoundOffering, Model, ModelVersion, Offering, is_repeat
from services.catalog.store.revision import next_revision

_MODEL = "SELECT model_id, display_name, license, description, create_time FROM model"
_VERSION = """
    SELECT model_id, version_id, digest, context_length, prompt_overhead_tokens,
           message_overhead_tokens, create_time
      FROM model_version
"""
_OFFERING = """
    SELECT o.offering_id, o.display_name, o.model_id, o.version_id, o.default_max_output_tokens,
           o.default_temperature, o.default_top_p, o.default_top_k, o.create_time, o.revision,
           v.digest, v.context_length, v.prompt_overhead_tokens, v.message_overhead_tokens,
           v.create_time AS version_create_time
      FROM offering AS o
      JOIN model_version AS v USING (model_id, version_id)
"""


class CatalogStore:
    """Models, versions and offerings. Every method may be repeated; all raise Unavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_model(self, model: Model) -> Model:
        """Stores a model, or returns the equal one that is there.

        Raises:
            AlreadyExists: there is one with other content.
        """
        async with self._database.transaction() as connection:
            await connection.execute(
                """
                INSERT INTO model (model_id, display_name, license, description, create_time)
                VALUES ($1, $2, $3, $4, $5)
                ON CONFLICT DO NOTHING
                """,
                model.model_id,
                model.display_name,
                model.license,
                model.description,
                model.create_time,
            )
            stored = await _get_model(connection, model.model_id)
        if not is_repeat(model, stored):
            raise already_exists(f"models/{model.model_id}")
        return stored

    async def get_model(self, model_id: str) -> Model:
        """Reads a model.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            return await _get_model(connection, model_id)

    async def list_models(self, page: Page) -> list[Model]:
        """Reads `page.read_size` models by id."""
        rows = await self._database.fetch(
            f"{_MODEL} WHERE model_id > $1 ORDER BY model_id LIMIT $2", page.after, page.read_size
        )
        return [_model_from_row(row) for row in rows]

    async def create_version(self, version: ModelVersion) -> ModelVersion:
        """Stores a version, or returns the equal one that is there.

        Raises:
            NotFound: the model is not there.
            AlreadyExists: there is one with other content.
        """
        try:
            async with self._database.transaction() as connection:
                await connection.execute(
                    """
                    INSERT INTO model_version (
                        model_id, version_id, digest, context_length, prompt_overhead_tokens,
                        message_overhead_tokens, create_time
                    )
                    VALUES ($1, $2, $3, $4, $5, $6, $7)
                    ON CONFLICT DO NOTHING
                    """,
                    version.model_id,
                    version.version_id,
                    version.digest,
                    version.context_length,
                    version.prompt_overhead_tokens,
                    version.message_overhead_tokens,
                    version.create_time,
                )
                stored = await _get_version(connection, version.model_id, version.version_id)
        except asyncpg.ForeignKeyViolationError as error:
            raise not_found(f"models/{version.model_id}") from error
        if not is_repeat(version, stored):
            raise already_exists(version.name)
        return stored

    async def get_version(self, model_id: str, version_id: str) -> ModelVersion:
        """Reads a version.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            return await _get_version(connection, model_id, version_id)

    async def list_versions(self, model_id: str, page: Page) -> list[ModelVersion]:
        """Reads `page.read_size` versions of a model by id.

        Raises:
            NotFound: the model is not there.
        """
        async with self._database.transaction() as connection:
            await _get_model(connection, model_id)
            rows = await connection.fetch(
                f"""
                {_VERSION}
                 WHERE model_id = $1 AND version_id > $2
                 ORDER BY version_id
                 LIMIT $3
                """,
                model_id,
                page.after,
                page.read_size,
            )
        return [_version_from_row(row) for row in rows]

    async def create_offering(self, offering: Offering) -> BoundOffering:
        """Stores an offering, or returns the equal one that is there. Locks the revision.

        Raises:
            NotFound: the version is not there.
            AlreadyExists: there is one with other content.
        """
        try:
            async with self._database.transaction() as connection:
                await _insert_offering(connection, offering)
                stored = await _get_offering(connection, offering.offering_id)
        except asyncpg.ForeignKeyViolationError as error:
            raise not_found(offering.version_name) from error
        if not is_repeat(offering, stored.offering):
            raise already_exists(f"offerings/{offering.offering_id}")
        return stored

    async def get_offering(self, offering_id: str) -> BoundOffering:
        """Reads an offering.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            return await _get_offering(connection, offering_id)

    async def list_offerings(self, page: Page) -> list[BoundOffering]:
        """Reads `page.read_size` offerings by id."""
        rows = await self._database.fetch(
            f"{_OFFERING} WHERE offering_id > $1 ORDER BY offering_id LIMIT $2",
            page.after,
            page.read_size,
        )
        return [_offering_from_row(row) for row in rows]

    async def list_offerings_after(self, revision: int, count: int) -> list[BoundOffering]:
        """Reads at most `count` offerings that changed after a revision, by revision."""
        rows = await self._database.fetch(
            f"{_OFFERING} WHERE revision > $1 ORDER BY revision LIMIT $2", revision, count
        )
        return [_offering_from_row(row) for row in rows]

    async def get_revision(self) -> int:
        """Reads how far offerings and adapters have changed."""
        row = await self._database.fetch_row("SELECT value FROM revision")
        assert row is not None
        return int(row["value"])


async def _get_model(connection: Connection, model_id: str) -> Model:
    row = await connection.fetchrow(f"{_MODEL} WHERE model_id = $1", model_id)
    if row is None:
        raise not_found(f"models/{model_id}")
    return _model_from_row(row)


async def _get_version(connection: Connection, model_id: str, version_id: str) -> ModelVersion:
    row = await connection.fetchrow(
        f"{_VERSION} WHERE model_id = $1 AND version_id = $2", model_id, version_id
    )
    if row is None:
        raise not_found(f"models/{model_id}/versions/{version_id}")
    return _version_from_row(row)


async def _get_offering(connection: Connection, offering_id: str) -> BoundOffering:
    row = await connection.fetchrow(f"{_OFFERING} WHERE offering_id = $1", offering_id)
    if row is None:
        raise not_found(f"offerings/{offering_id}")
    return _offering_from_row(row)


async def _insert_offering(connection: Connection, offering: Offering) -> None:
    await connection.execute(
        """
        INSERT INTO offering (
            offering_id, display_name, model_id, version_id, default_max_output_tokens,
            default_temperature, default_top_p, default_top_k, create_time, revision
        )
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
        ON CONFLICT (offering_id) DO NOTHING
        """,
        offering.offering_id,
        offering.display_name,
        offering.model_id,
        offering.version_id,
        offering.default_max_output_tokens,
        offering.default_temperature,
        offering.default_top_p,
        offering.default_top_k,
        offering.create_time,
        # A repeat raises it in vain: watchers look once and find nothing.
        await next_revision(connection),
    )


def _model_from_row(row: asyncpg.Record) -> Model:
    return Model(
        model_id=row["model_id"],
        display_name=row["display_name"],
        license=row["license"],
        description=row["description"],
        create_time=row["create_time"],
    )


def _version_from_row(row: asyncpg.Record, *, create_time: str = "create_time") -> ModelVersion:
    return ModelVersion(
        model_id=row["model_id"],
        version_id=row["version_id"],
        digest=row["digest"],
        context_length=row["context_length"],
        prompt_overhead_tokens=row["prompt_overhead_tokens"],
        message_overhead_tokens=row["message_overhead_tokens"],
        create_time=row[create_time],
    )


def _offering_from_row(row: asyncpg.Record) -> BoundOffering:
    return BoundOffering(
        offering=Offering(
            offering_id=row["offering_id"],
            display_name=row["display_name"],
            model_id=row["model_id"],
            version_id=row["version_id"],
            default_max_output_tokens=row["default_max_output_tokens"],
            default_temperature=row["default_temperature"],
            default_top_p=row["default_top_p"],
            default_top_k=row["default_top_k"],
            create_time=row["create_time"],
        ),
        version=_version_from_row(row, create_time="version_create_time"),
        revision=row["revision"],
    )
