"""PostgreSQL dies under a running billing: calls fail UNAVAILABLE, and work again by themselves."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import asyncpg
import pytest

from libs.errors import Unavailable
from libs.postgres import cluster
from tests.conftest import SERVICES, PostgresCluster, leashed
from tests.integration.services.billing.audit import audit
from tests.integration.services.billing.world import Billing, running, settlement


@pytest.fixture(scope="module")
def mortal() -> Iterator[PostgresCluster]:
    """A server that tests run and kill themselves. Durable: a crash must lose no commit."""
    with tempfile.TemporaryDirectory(prefix="maas-test-") as state:
        Path(state).chmod(0o711)
        found = cluster.place(Path(state))
        yield PostgresCluster(found, {name: secrets.token_hex(8) for name in SERVICES})
        found.destroy()


def up(mortal: PostgresCluster) -> AbstractContextManager[None]:
    return cluster.running(mortal.cluster, prefix=leashed(mortal.cluster.owner))


async def settle_until_done(billing: Billing, generation_id: str) -> None:
    """Repeats a settlement as a gateway does."""
    wish = settlement(generation_id, slice_id="s1", tokens=10)
    while True:
        try:
            await billing.settle(wish)
        except Unavailable:
            await asyncio.sleep(0.05)
        else:
            return


async def test_server_away_and_back(mortal: PostgresCluster) -> None:
    with ExitStack() as first:
        first.enter_context(up(mortal))
        async with running(await mortal.create("billing")) as billing:
            await billing.open_account(1000)
            await billing.acquire("s1", 300)

            first.close()
            for call in (billing.balance(), billing.acquire("s2", 10)):
                with pytest.raises(Unavailable) as caught:
                    await call
                assert caught.value.metadata == {"dependency": "postgresql"}

            with up(mortal):
                async with asyncio.timeout(20):
                    await settle_until_done(billing, "gen_1")
                assert await billing.balance() == (990, 290, 700)


async def test_one_backend_killed(mortal: PostgresCluster) -> None:
    """SIGKILL of one backend drops all sessions. Some commits that were under way took effect:
    repeating them charges nothing twice."""
    with up(mortal):
        dsn = await mortal.create("billing")
        async with running(dsn) as billing:
            await billing.open_account(100_000)
            await billing.acquire("s1", 100_000)
            backend = await billing.connection.fetchval("SELECT pg_backend_pid()")

            async def settle_some(start: int) -> None:
                for number in range(start, 200, 4):
                    await settle_until_done(billing, f"gen_{number}")

            async with asyncio.timeout(30), asyncio.TaskGroup() as group:
                for start in range(4):
                    group.create_task(settle_some(start))
                await asyncio.sleep(0.1)
                os.kill(backend, signal.SIGKILL)

            assert billing.connection.is_closed()
            assert await billing.balance() == (98_000, 98_000, 0)
            connection = await asyncpg.connect(dsn, server_settings={"search_path": "billing"})
            await audit(connection)
            await connection.close()


async def test_transaction_that_stood_still_fails_as_unavailable(billing: Billing) -> None:
    """A process that is stopped inside a transaction must not hold the ledger for ever."""

    async def stand_still() -> None:
        async with billing.database.transaction() as connection:
            await connection.execute("SET LOCAL idle_in_transaction_session_timeout = '10ms'")
            await asyncio.sleep(0.1)
            await connection.execute("SELECT 1")

    with pytest.raises(Unavailable):
        await stand_still()

    assert (await billing.settle()).settled_count == 0
