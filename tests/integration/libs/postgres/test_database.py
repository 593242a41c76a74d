"""libs/postgres/database.py: whatever way a server is lost, callers hear that it is away."""

from __future__ import annotations

import asyncio
import threading

import asyncpg
import pytest

from libs import postgres
from libs.config import PostgresSection
from libs.errors import Unavailable
from tests.conftest import DatabaseFactory, PostgresCluster


async def end(dsn: str, pid: int) -> None:
    """Has the server end a connection, and waits until it has."""
    connection = await asyncpg.connect(dsn)
    await connection.execute("SELECT pg_terminate_backend($1, 5000)", pid)
    await connection.close()


# What the server says last and the end of the connection are read in two turns of the event loop.
@pytest.mark.parametrize("turns", range(5))
async def test_connection_that_was_ended_while_idle_is_an_absence(
    database: DatabaseFactory, postgres_cluster: PostgresCluster, turns: int
) -> None:
    config = PostgresSection(dsn=await database("scheduler"), connections_max=1)
    async with await postgres.connect(config, schema="scheduler") as opened:
        row = await opened.fetch_row("SELECT pg_backend_pid() AS pid")
        assert row is not None
        superuser = postgres_cluster.superuser_dsn()
        ending = threading.Thread(target=lambda: asyncio.run(end(superuser, row["pid"])))
        ending.start()
        # This loop stands still meanwhile, as under load, and then finds both at once.
        ending.join()
        for _ in range(turns):
            await asyncio.sleep(0)

        try:
            async with opened.transaction() as connection:
                await connection.execute("SELECT 1")
        except Unavailable:
            pass

        # And it is over: the pool makes another connection.
        assert await opened.fetch("SELECT 1")
