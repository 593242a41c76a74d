"""Numbered migrations: applied in order, each once, each in a transaction, never edited.

Files are NNNN_verb_noun.sql in the service's migrations folder. The hash of each applied file is
kept; a file that changed afterwards stops the start. One process migrates at a time.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import structlog

from libs.postgres.database import Connection, Database

log = structlog.get_logger(__name__)

_FILE = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
# Any constant will do, as long as every process of the suite takes the same.
_LOCK = 0x6D616173


class MigrationError(Exception):
    """The files and the database disagree; an operator has to look."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file.

    Attributes:
        number: 1, 2, 3, ... without gaps.
        name: file name.
        sql: its content.
        sha256: of its content, hexadecimal.
    """

    number: int
    name: str
    sql: str
    sha256: str


def read_migrations(folder: Path) -> list[Migration]:
    """Reads a folder.

    Raises:
        MigrationError: a name has another form, or a number is missing or doubled.
    """
    found: list[Migration] = []
    for path in sorted(folder.glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if match is None:
            raise MigrationError(f"{path.name}: must be named NNNN_verb_noun.sql")
        text = path.read_text(encoding="utf-8")
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        found.append(Migration(int(match[1]), path.name, text, digest))
    if [item.number for item in found] != list(range(1, len(found) + 1)):
        raise MigrationError(f"{folder}: numbers must be 1, 2, 3, ... without gaps")
    return found


async def migrate(database: Database, schema: str, folder: Path) -> int:
    """Applies what is missing; returns how many files that was. May be repeated.

    The role that connects creates and owns the schema.

    Raises:
        MigrationError: an applied file has changed, or the database is newer than the files.
        Unavailable: the server is away.
    """
    migrations = read_migrations(folder)
    async with database.transaction() as connection:
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        await connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
        await connection.execute(
            """
            CREATE TABLE IF NOT EXISTS migration (
                number integer PRIMARY KEY,
                name text NOT NULL,
                sha256 text NOT NULL,
                apply_time timestamptz NOT NULL DEFAULT clock_timestamp()
            )
            """
        )
        applied = await _applied(connection)
        _check(migrations, applied)
        for migration in migrations[len(applied) :]:
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO migration (number, name, sha256) VALUES ($1, $2, $3)",
                migration.number,
                migration.name,
                migration.sha256,
            )
            log.info("migrated", schema=schema, migration=migration.name)
    return len(migrations) - len(applied)


async def _applied(connection: Connection) -> list[str]:
    rows = await connection.fetch("SELECT sha256 FROM migration ORDER BY number")
    return [row["sha256"] for row in rows]


def _check(migrations: list[Migration], applied: list[str]) -> None:
    if len(applied) > len(migrations):
        raise MigrationError("the database is newer than this build")
    for migration, sha256 in zip(migrations, applied, strict=False):
        if migration.sha256 != sha256:
            raise MigrationError(f"{migration.name} was changed after it had been applied")
