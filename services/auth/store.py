"""Everything auth keeps: the only place with its SQL. One method is one transaction."""

from __future__ import annotations

from datetime import datetime

import asyncpg

from libs.auth import Role
from libs.errors import already_exists, not_found
from libs.paging import Page
from libs.postgres import Connection, Database
from services.auth.domain import ApiKey, FirstKey, Organization, Project, StoredKey, is_repeat

_ORGANIZATION = "SELECT organization_id, display_name, create_time FROM organization"
_PROJECT = "SELECT project_id, organization_id, display_name, create_time FROM project"
_KEY = """
    SELECT k.key_id, k.secret_sha256, k.role, k.project_id, k.display_name, k.create_time,
           k.revoke_time, k.revision, p.organization_id
      FROM api_key AS k
      LEFT JOIN project AS p USING (project_id)
"""


class AuthStore:
    """Organizations, projects and keys. All methods raise Unavailable.

    Every method but `create_key` may be repeated; that one makes another key each time.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_organization(self, organization: Organization) -> Organization:
        """Stores an organization, or returns the equal one that is there.

        Raises:
            AlreadyExists: there is one with other content.
        """
        async with self._database.transaction() as connection:
            await connection.execute(
                """
                INSERT INTO organization (organization_id, display_name, create_time)
                VALUES ($1, $2, $3)
                ON CONFLICT DO NOTHING
                """,
                organization.organization_id,
                organization.display_name,
                organization.create_time,
            )
            stored = await _get_organization(connection, organization.organization_id)
        if not is_repeat(organization, stored):
            raise already_exists(f"organizations/{organization.organization_id}")
        return stored

    async def get_organization(self, organization_id: str) -> Organization:
        """Reads an organization.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            return await _get_organization(connection, organization_id)

    async def list_organizations(self, page: Page) -> list[Organization]:
        """Reads `page.read_size` organizations by id."""
        rows = await self._database.fetch(
            f"{_ORGANIZATION} WHERE organization_id > $1 ORDER BY organization_id LIMIT $2",
            page.after,
            page.read_size,
        )
        return [_organization_from_row(row) for row in rows]

    async def create_project(self, project: Project) -> Project:
        """Stores a project, or returns the equal one that is there.

        Raises:
            NotFound: the organization is not there.
            AlreadyExists: there is one with other content.
        """
        try:
            async with self._database.transaction() as connection:
                await connection.execute(
                    """
                    INSERT INTO project (project_id, organization_id, display_name, create_time)
                    VALUES ($1, $2, $3, $4)
                    ON CONFLICT DO NOTHING
                    """,
                    project.project_id,
                    project.organization_id,
                    project.display_name,
                    project.create_time,
                )
                stored = await _get_project(connection, project.project_id)
        except asyncpg.ForeignKeyViolationError as error:
            raise not_found(f"organizations/{project.organization_id}") from error
        if not is_repeat(project, stored):
            raise already_exists(f"projects/{project.project_id}")
        return stored

    async def get_project(self, project_id: str) -> Project:
        """Reads a project.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            return await _get_project(connection, project_id)

    async def list_projects(self, organization_id: str, page: Page) -> list[Project]:
        """Reads `page.read_size` projects by id; of all organizations when that id is empty."""
        rows = await self._database.fetch(
            f"""
            {_PROJECT}
             WHERE project_id > $1 AND ($2 = '' OR organization_id = $2)
             ORDER BY project_id
             LIMIT $3
            """,
            page.after,
            organization_id,
            page.read_size,
        )
        return [_project_from_row(row) for row in rows]

    async def create_key(self, key: ApiKey) -> StoredKey:
        """Stores a new key. Locks the revision.

        Raises:
            NotFound: the project is not there.
        """
        try:
            async with self._database.transaction() as connection:
                await _insert_key(connection, key)
                return await _get_key(connection, key.key_id)
        except asyncpg.ForeignKeyViolationError as error:
            raise not_found(f"projects/{key.project_id}") from error

    async def put_first_key(self, key: ApiKey) -> FirstKey:
        """Stores a key if there is none at all. Locks the revision, so that one process wins."""
        async with self._database.transaction() as connection:
            await connection.execute("SELECT FROM revision FOR UPDATE")
            if not await connection.fetchval("SELECT EXISTS (SELECT FROM api_key)"):
                await _insert_key(connection, key)
                return FirstKey.STORED
            is_known = await connection.fetchval(
                "SELECT EXISTS (SELECT FROM api_key WHERE key_id = $1 AND secret_sha256 = $2)",
                key.key_id,
                key.secret_sha256,
            )
        return FirstKey.KNOWN if is_known else FirstKey.IGNORED

    async def get_key(self, key_id: str) -> StoredKey:
        """Reads a key.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            return await _get_key(connection, key_id)

    async def list_keys(self, project_id: str, page: Page) -> list[StoredKey]:
        """Reads `page.read_size` keys by id; of all projects when that id is empty."""
        rows = await self._database.fetch(
            f"""
            {_KEY}
             WHERE k.key_id > $1 AND ($2 = '' OR k.project_id = $2)
             ORDER BY k.key_id
             LIMIT $3
            """,
            page.after,
            project_id,
            page.read_size,
        )
        return [_key_from_row(row) for row in rows]

    async def revoke_key(self, key_id: str, now: datetime) -> tuple[StoredKey, bool]:
        """Revokes a key; returns it, and whether that changed it. Locks the key, then the revision.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            await connection.execute("SELECT FROM api_key WHERE key_id = $1 FOR UPDATE", key_id)
            stored = await _get_key(connection, key_id)
            if stored.api_key.revoke_time is not None:
                return stored, False
            await connection.execute(
                "UPDATE api_key SET revoke_time = $2, revision = $3 WHERE key_id = $1",
                key_id,
                now,
                await _next_revision(connection),
            )
            return await _get_key(connection, key_id), True

    async def list_keys_after(self, revision: int, count: int) -> list[StoredKey]:
        """Reads at most `count` keys that changed after a revision, by revision."""
        rows = await self._database.fetch(
            f"{_KEY} WHERE k.revision > $1 ORDER BY k.revision LIMIT $2", revision, count
        )
        return [_key_from_row(row) for row in rows]

    async def get_revision(self) -> int:
        """Reads how far keys have changed."""
        row = await self._database.fetch_row("SELECT value FROM revision")
        assert row is not None
        return int(row["value"])


async def _get_organization(connection: Connection, organization_id: str) -> Organization:
    row = await connection.fetchrow(f"{_ORGANIZATION} WHERE organization_id = $1", organization_id)
    if row is None:
        raise not_found(f"organizations/{organization_id}")
    return _organization_from_row(row)


async def _get_project(connection: Connection, project_id: str) -> Project:
    row = await connection.fetchrow(f"{_PROJECT} WHERE project_id = $1", project_id)
    if row is None:
        raise not_found(f"projects/{project_id}")
    return _project_from_row(row)


async def _get_key(connection: Connection, key_id: str) -> StoredKey:
    row = await connection.fetchrow(f"{_KEY} WHERE k.key_id = $1", key_id)
    if row is None:
        raise not_found(f"apiKeys/{key_id}")
    return _key_from_row(row)


async def _insert_key(connection: Connection, key: ApiKey) -> None:
    await connection.execute(
        """
        INSERT INTO api_key (
            key_id, secret_sha256, role, project_id, display_name, create_time, revision
        )
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        """,
        key.key_id,
        key.secret_sha256,
        key.role.value,
        key.project_id or None,
        key.display_name,
        key.create_time,
        await _next_revision(connection),
    )


async def _next_revision(connection: Connection) -> int:
    """Raises the revision, and locks it until the transaction ends."""
    value = await connection.fetchval("UPDATE revision SET value = value + 1 RETURNING value")
    return int(value)


def _organization_from_row(row: asyncpg.Record) -> Organization:
    return Organization(
        organization_id=row["organization_id"],
        display_name=row["display_name"],
        create_time=row["create_time"],
    )


def _project_from_row(row: asyncpg.Record) -> Project:
    return Project(
        project_id=row["project_id"],
        organization_id=row["organization_id"],
        display_name=row["display_name"],
        create_time=row["create_time"],
    )


def _key_from_row(row: asyncpg.Record) -> StoredKey:
    return StoredKey(
        api_key=ApiKey(
            key_id=row["key_id"],
            secret_sha256=row["secret_sha256"],
            role=Role(row["role"]),
            project_id=row["project_id"] or "",
            display_name=row["display_name"],
            create_time=row["create_time"],
            revoke_time=row["revoke_time"],
        ),
        organization_id=row["organization_id"] or "",
        revision=row["revision"],
    )
