"""Epochs in PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from libs import postgres
from libs.config import PostgresSection
from libs.postgres import Database
from services.scheduler.store import SchedulerStore
from tests.conftest import DatabaseFactory
from tests.unit.services.scheduler.core.driver import registration

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
async def opened(database: DatabaseFactory) -> AsyncIterator[Database]:
    config = PostgresSection(dsn=await database("scheduler"), connections_max=8)
    async with await postgres.connect(config, schema="scheduler") as found:
        yield found


async def test_epochs_start_at_one_and_grow_for_each_name(opened: Database) -> None:
    store = SchedulerStore(opened)

    got = [await store.next_epoch(registration(name), NOW) for name in ("a", "b", "a", "a")]

    assert got == [1, 1, 2, 3]


async def test_no_epoch_is_given_twice(opened: Database) -> None:
    store = SchedulerStore(opened)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(store.next_epoch(registration(), NOW)) for _ in range(30)]

    assert sorted(task.result() for task in tasks) == list(range(1, 31))


async def test_who_registered_last_can_be_read(opened: Database) -> None:
    store = SchedulerStore(opened)
    await store.next_epoch(registration(incarnation="one"), NOW)
    await store.next_epoch(registration(incarnation="two"), NOW)

    (row,) = await opened.fetch("SELECT name, epoch, incarnation, endpoint FROM worker")

    assert tuple(row.values()) == ("workers/a", 2, "two", "a:1")
