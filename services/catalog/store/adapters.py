"""Adapters in the database. One method is one transaction."""

from __future__ import annotations

from datetime import datetime

import asyncpg

from libs.errors import already_exists, not_found
from libs.paging import Page
from libs.postgres import Connection, Database
from services.catalog.domain import Adapter, StoredAdapter, is_repeat
from services.catalog.store.revision import next_revision

_ADAPTER = """
    SELECT adapter_id, model_id, version_id, path, digest, project_id, create_time,
           delete_time IS NOT NULL AS is_deleted, revision
      FROM adapter
"""
# Of all, or of those that a project may use.
_IS_USABLE = "($1::text IS NULL OR project_id IN ('', $1)) AND delete_time IS NULL"


class AdapterStore:
    """Adapters. Every method may be repeated; all raise Unavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_adapter(self, adapter: Adapter) -> Adapter:
        """Stores an adapter, or returns the equal one that is there. Locks the revision.

        One that was deleted comes back as it was: its name stays bound to its content, so that
        what a worker has loaded under a name is what the name says, whenever it was loaded.

        Raises:
            NotFound: the version is not there.
            AlreadyExists: there is one with other content, or there was.
        """
        try:
            async with self._database.transaction() as connection:
                stored = await _put(connection, adapter)
        except asyncpg.ForeignKeyViolationError as error:
            raise not_found(adapter.version_name) from error
        return stored

    async def get_adapter(self, adapter_id: str, project_id: str | None) -> Adapter:
        """Reads an adapter.

        Args:
            adapter_id: which.
            project_id: who asks; None for administrators, who see all.

        Raises:
            NotFound: there is none, it is deleted, or it is another project's.
        """
        row = await self._database.fetch_row(
            f"{_ADAPTER} WHERE {_IS_USABLE} AND adapter_id = $2", project_id, adapter_id
        )
        if row is None:
            raise not_found(f"adapters/{adapter_id}")
        return _adapter_from_row(row)

    async def list_adapters(self, project_id: str | None, page: Page) -> list[Adapter]:
        """Reads `page.read_size` adapters by id.

        Args:
            project_id: who asks; None for administrators, who see all.
            page: which.
        """
        rows = await self._database.fetch(
            f"{_ADAPTER} WHERE {_IS_USABLE} AND adapter_id > $2 ORDER BY adapter_id LIMIT $3",
            project_id,
            page.after,
            page.read_size,
        )
        return [_adapter_from_row(row) for row in rows]

    async def delete_adapter(self, adapter_id: str, now: datetime) -> None:
        """Marks an adapter as deleted, once; its name stays taken. Locks the revision.

        Raises:
            NotFound: there never was one.
        """
        async with self._database.transaction() as connection:
            revision = await next_revision(connection)
            await connection.execute(
                """
                UPDATE adapter SET delete_time = $2, revision = $3
                 WHERE adapter_id = $1 AND delete_time IS NULL
                """,
                adapter_id,
                now,
                revision,
            )
            if not await connection.fetchval(
                "SELECT EXISTS (SELECT FROM adapter WHERE adapter_id = $1)", adapter_id
            ):
                raise not_found(f"adapters/{adapter_id}")

    async def list_adapters_after(self, revision: int, count: int) -> list[StoredAdapter]:
        """Reads at most `count` adapters that changed after a revision, by revision.

        Whoever starts from 0 knows of none, so what is deleted by then is not told.
        """
        rows = await self._database.fetch(
            f"""
            {_ADAPTER}
             WHERE revision > $1 AND ($1 > 0 OR delete_time IS NULL)
             ORDER BY revision
             LIMIT $2
            """,
            revision,
            count,
        )
        return [
            StoredAdapter(
                adapter=_adapter_from_row(row),
                is_deleted=row["is_deleted"],
                revision=row["revision"],
            )
            for row in rows
        ]


async def _put(connection: Connection, adapter: Adapter) -> Adapter:
    """Inserts or brings back.

    Raises:
        AlreadyExists: the name stands for other content.
    """
    # Before the row: who deletes or creates meanwhile waits, so what is read below stays true. A
    # repeat raises it in vain: watchers look once and find nothing.
    revision = await next_revision(connection)
    await connection.execute(
        """
        INSERT INTO adapter (
            adapter_id, model_id, version_id, path, digest, project_id, create_time, revision
        )
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
        ON CONFLICT (adapter_id) DO NOTHING
        """,
        adapter.adapter_id,
        adapter.model_id,
        adapter.version_id,
        adapter.path,
        adapter.digest,
        adapter.project_id,
        adapter.create_time,
        revision,
    )
    row = await connection.fetchrow(f"{_ADAPTER} WHERE adapter_id = $1", adapter.adapter_id)
    assert row is not None
    stored = _adapter_from_row(row)
    if not is_repeat(adapter, stored):
        raise already_exists(f"adapters/{adapter.adapter_id}")
    if row["is_deleted"]:
        await connection.execute(
            "UPDATE adapter SET delete_time = NULL, revision = $2 WHERE adapter_id = $1",
            adapter.adapter_id,
            revision,
        )
    return stored


def _adapter_from_row(row: asyncpg.Record) -> Adapter:
    return Adapter(
        adapter_id=row["adapter_id"],
        model_id=row["model_id"],
        version_id=row["version_id"],
        path=row["path"],
        digest=row["digest"],
        project_id=row["project_id"],
        create_time=row["create_time"],
    )
