"""Fixtures that every kind of test may use: a real PostgreSQL, one fresh database per test."""

from __future__ import annotations

import dataclasses
import itertools
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from libs import postgres
from libs.config import PostgresSection
from libs.postgres import cluster
from tools.local import leash

ROOT = Path(__file__).resolve().parent.parent
ROLES = ROOT / "deploy" / "postgres" / "roles.sql"
MEMORY_BYTES_MIN = 2 << 30
SERVICES = ("catalog", "auth", "billing", "scheduler")

DatabaseFactory = Callable[[str], Awaitable[str]]
"""Takes the name of a service, returns the DSN of a fresh, migrated database as its role."""


@dataclasses.dataclass(slots=True)
class PostgresCluster:
    """A throw-away server for a session of tests.

    Attributes:
        cluster: the server.
        passwords: of the services' roles.
        templates: services whose template database has been made.
        numbers: of the databases made from them.
        strategy: how PostgreSQL copies a template: by file is the fastest in memory, and the
            slowest on a disk.
    """

    cluster: cluster.Cluster
    passwords: dict[str, str]
    strategy: str = "WAL_LOG"
    templates: set[str] = dataclasses.field(default_factory=set)
    numbers: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))

    def dsn(self, service: str, database: str) -> str:
        """DSN of a database as the role of a service."""
        return self.cluster.dsn(role=service, database=database, password=self.passwords[service])

    def superuser_dsn(self, database: str = "postgres") -> str:
        """DSN of a database as the superuser."""
        return self.cluster.dsn(database=database, password=self.cluster.superuser_password())

    def create_schemas(self, database: str) -> None:
        """Creates a database with every service's role and schema, and no tables."""
        passwords = {f"{name.upper()}_PASSWORD": text for name, text in self.passwords.items()}
        self.cluster.run_script(ROLES, {"MAAS_DATABASE": database, **passwords})

    async def template(self, service: str) -> str:
        """Names the database that holds the service's migrations; makes it when first asked."""
        name = f"template_{service}"
        if service not in self.templates:
            self.create_schemas(name)
            config = PostgresSection(dsn=self.dsn(service, name), connections_max=1)
            async with await postgres.connect(config, schema=service) as database:
                await postgres.migrate(
                    database, service, ROOT / "services" / service / "migrations"
                )
            self.templates.add(service)
        return name

    async def create(self, service: str) -> str:
        """Creates a database from the service's template; returns its DSN as the role."""
        template = await self.template(service)
        name = f"test_{next(self.numbers)}"
        await self.execute(
            f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY {self.strategy}",
            f"REVOKE ALL ON DATABASE {name} FROM PUBLIC",
            f"GRANT CONNECT, CREATE ON DATABASE {name} TO {', '.join(SERVICES)}",
        )
        return self.dsn(service, name)

    async def drop(self, dsn: str) -> None:
        """Drops a database, cutting whatever is still connected."""
        await self.execute(f"DROP DATABASE {urlsplit(dsn).path[1:]} WITH (FORCE)")

    async def execute(self, *statements: str) -> None:
        """Runs statements as the superuser, each in its own transaction."""
        connection = await asyncpg.connect(self.superuser_dsn())
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[PostgresCluster]:
    """A real PostgreSQL for the session: Unix socket only, no fsync, gone afterwards.

    In memory where there is room. Not below pytest's own temporary directory: that one is closed to
    the account that the server runs as when the tests run as root.
    """
    folder = memory_directory()
    strategy = "WAL_LOG" if folder is None else "FILE_COPY"
    with tempfile.TemporaryDirectory(prefix="maas-test-", dir=folder) as state:
        Path(state).chmod(0o711)
        found = cluster.place(Path(state), fsync=False)
        try:
            with cluster.running(found, prefix=leashed(found.owner)):
                passwords = {service: secrets.token_hex(8) for service in SERVICES}
                yield PostgresCluster(found, passwords, strategy)
        finally:
            found.destroy()


def memory_directory() -> Path | None:
    """A file system in memory with room for a cluster; a fresh database costs a tenth there."""
    folder = Path("/dev/shm")  # noqa: S108 - the directory made in it is private
    has_room = folder.is_dir() and shutil.disk_usage(folder).free > MEMORY_BYTES_MIN
    return folder if has_room and os.access(folder, os.W_OK) else None


def leashed(owner: cluster.Owner | None) -> list[str]:
    """The command that runs a server which dies with us, even by SIGKILL."""
    account = ["-", "-"] if owner is None else [str(owner.uid), str(owner.gid)]
    ties = [str(int(signal.SIGQUIT)), str(os.getpid())]
    return [sys.executable, "-I", "-S", leash.__file__, *ties, *account]


@pytest.fixture
async def database(postgres_cluster: PostgresCluster) -> AsyncIterator[DatabaseFactory]:
    """Makes fresh databases: `dsn = await database("billing")`. Dropped after the test."""
    made: list[str] = []

    async def create(service: str) -> str:
        made.append(await postgres_cluster.create(service))
        return made[-1]

    yield create
    for dsn in made:
        await postgres_cluster.drop(dsn)
