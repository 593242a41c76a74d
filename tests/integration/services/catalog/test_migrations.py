"""libs/postgres/migrations.py against the real server, with the catalog's own files."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from libs import postgres
from libs.config import PostgresSection
from libs.postgres import Database, migrate
from libs.postgres.migrations import MigrationError
from services.catalog.__main__ import MIGRATIONS
from tests.conftest import DatabaseFactory


@pytest.fixture
async def migrated(database: DatabaseFactory) -> AsyncIterator[Database]:
    """A database with the catalog's migrations."""
    config = PostgresSection(dsn=await database("catalog"), connections_max=4)
    async with await postgres.connect(config, schema="catalog") as connected:
        yield connected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the catalog's migrations, for a test to change."""
    return Path(shutil.copytree(MIGRATIONS, tmp_path / "migrations"))


async def numbers(database: Database) -> list[int]:
    return [row["number"] for row in await database.fetch("SELECT number FROM migration")]


async def test_second_start_applies_nothing(migrated: Database) -> None:
    before = await numbers(migrated)

    assert await migrate(migrated, "catalog", MIGRATIONS) == 0
    assert await numbers(migrated) == before


async def test_new_file_is_applied_once_by_racing_replicas(
    migrated: Database, folder: Path
) -> None:
    number = len(await numbers(migrated)) + 1
    (folder / f"{number:04}_add_note.sql").write_text("CREATE TABLE note (text text NOT NULL);")

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(migrate(migrated, "catalog", folder)) for _ in range(3)]

    assert sorted(task.result() for task in tasks) == [0, 0, 1]
    assert await migrated.fetch("SELECT text FROM note") == []


async def test_broken_file_leaves_nothing_behind(migrated: Database, folder: Path) -> None:
    before = await numbers(migrated)
    broken = "CREATE TABLE half (text text); SELECT 1 / 0;"
    (folder / f"{len(before) + 1:04}_add_half.sql").write_text(broken)

    with pytest.raises(Exception, match="division by zero"):
        await migrate(migrated, "catalog", folder)

    assert await numbers(migrated) == before
    row = await migrated.fetch_row("SELECT to_regclass('half') AS half")
    assert row is not None
    assert row["half"] is None


async def test_file_that_changed_afterwards_stops_the_start(
    migrated: Database, folder: Path
) -> None:
    first = folder / "0001_create_models_and_offerings.sql"
    first.write_text(first.read_text() + "-- changed")

    with pytest.raises(MigrationError, match=first.name):
        await migrate(migrated, "catalog", folder)


async def test_database_of_a_newer_build_stops_the_start(
    migrated: Database, tmp_path: Path
) -> None:
    with pytest.raises(MigrationError, match="newer"):
        await migrate(migrated, "catalog", tmp_path)
