"""services/auth: the first administrator's key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from libs import postgres
from libs.auth import KeyTable, key_id_of, new_key
from libs.config import ConfigError, PostgresSection
from libs.process import StartError
from libs.rpc import Hub
from libs.testing import FakeClock
from libs.testing.rpc import Callers
from services.auth.__main__ import put_first_key
from services.auth.domain import FirstKey
from services.auth.operations import KeyOperations
from services.auth.store import AuthStore
from tests.conftest import DatabaseFactory


@pytest.fixture
async def store(database: DatabaseFactory) -> AsyncIterator[AuthStore]:
    """A store without any key."""
    config = PostgresSection(dsn=await database("auth"), connections_max=4)
    async with await postgres.connect(config, schema="auth") as connected:
        yield AuthStore(connected)


@pytest.fixture
def operations(store: AuthStore) -> KeyOperations:
    return KeyOperations(store, KeyTable(), Hub(), FakeClock())


async def test_empty_table_takes_the_key_of_the_file(
    store: AuthStore, operations: KeyOperations, tmp_path: Path
) -> None:
    path = tmp_path / "admin_key"
    path.write_text(Callers().admin + "\n")

    with capture_logs() as logs:
        await put_first_key(operations, path)

    (stored,) = await store.list_keys_after(0, 10)
    assert stored.api_key.key_id == key_id_of(Callers().admin)
    assert stored.record.is_active
    assert [event["action"] for event in logs if event["event"] == "audit"] == ["apiKeys.create"]
    assert Callers().admin not in repr(logs)


async def test_second_start_changes_nothing(store: AuthStore, operations: KeyOperations) -> None:
    assert await operations.put_first(Callers().admin) is FirstKey.STORED
    before = await store.list_keys_after(0, 10)

    with capture_logs() as logs:
        assert await operations.put_first(Callers().admin) is FirstKey.KNOWN

    assert await store.list_keys_after(0, 10) == before
    assert not logs


async def test_other_key_is_ignored_with_a_line(
    store: AuthStore, operations: KeyOperations
) -> None:
    await operations.put_first(Callers().admin)
    other = new_key(9, 9).secret

    with capture_logs() as logs:
        assert await operations.put_first(other) is FirstKey.IGNORED

    assert len(await store.list_keys_after(0, 10)) == 1
    assert [(event["event"], event["key"]) for event in logs] == [
        ("bootstrap key ignored", key_id_of(other))
    ]
    assert other not in repr(logs)


async def test_revoked_first_key_stays_revoked(store: AuthStore, operations: KeyOperations) -> None:
    await operations.put_first(Callers().admin)
    await store.revoke_key(key_id_of(Callers().admin), FakeClock().now())

    assert await operations.put_first(Callers().admin) is FirstKey.KNOWN

    (stored,) = await store.list_keys_after(0, 10)
    assert not stored.record.is_active


async def test_racing_replicas_agree_on_one_key(
    store: AuthStore, operations: KeyOperations
) -> None:
    secrets = [new_key(number, number).secret for number in range(4)]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(operations.put_first(secret)) for secret in secrets]

    outcomes = sorted(task.result().value for task in tasks)
    assert outcomes == ["ignored", "ignored", "ignored", "stored"]
    assert len(await store.list_keys_after(0, 10)) == 1


async def test_file_without_a_key_stops_the_start(
    operations: KeyOperations, tmp_path: Path
) -> None:
    path = tmp_path / "admin_key"
    path.write_text(Callers().admin[:-1])

    with pytest.raises(StartError) as caught:
        await put_first_key(operations, path)

    assert str(path) in str(caught.value)
    assert Callers().admin[:-1] not in str(caught.value)


async def test_missing_file_stops_the_start(operations: KeyOperations, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        await put_first_key(operations, tmp_path / "none")
