"""Later migrations on a database that 0001 made, with money in it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from maas.billing.v1 import account_service_pb2 as account_pb
from maas.billing.v1 import price_service_pb2 as price_pb

from libs import postgres
from libs.config import PostgresSection
from services.billing.__main__ import MIGRATIONS
from tests.conftest import PostgresCluster
from tests.integration.services.billing import signing
from tests.integration.services.billing.audit import Connection, audit, count_waiting
from tests.integration.services.billing.world import Billing, running, settlement

# One generation of 120 nanos, settled by the version before.
OLD_ROWS = """
    INSERT INTO account VALUES ('acme', 'acme', 'USD', '2026-01-01T00:00:00Z');
    INSERT INTO balance (account_id, posted, held) VALUES ('acme', 880, 180);
    INSERT INTO price VALUES
        ('nano', 'tiny', 1000000, 1000000, '2026-01-01T00:00:00Z', '2026-01-01T00:00:00Z', 1);
    UPDATE price_revision SET value = 1;
    INSERT INTO credit_slice (
        credit_slice_id, account_id, holder, granted, consumed, state, expire_time
    )
    VALUES ('s1', 'acme', 'gateway-1', 300, 120, 'open', 'infinity');
    INSERT INTO ledger_entry VALUES
        (1, 'acme', 1, 1000, 'grant', 'r', '', '2026-01-01T00:00:00Z'),
        (2, 'system-funding', 1, -1000, 'grant', 'r', '', '2026-01-01T00:00:00Z'),
        (3, 'acme', 3, -120, 'usage', 'gen_1', '', '2026-01-01T00:00:03Z'),
        (4, 'system-revenue', 3, 120, 'usage', 'gen_1', '', '2026-01-01T00:00:03Z');
    UPDATE ledger_head SET entry_count = 4, record_count = 1;
"""
# As code of the version before writes a record: it knows no later columns.
OLD_INSERT = """
    INSERT INTO usage_record (
        generation_id, account_id, number, credit_slice_id, project_id, api_key_id,
        offering_id, model_id, version_id, price_id, input_tokens, output_tokens, amount,
        shortfall, end_cause, start_time, end_time, settle_time
    )
    VALUES (
        $1, 'acme', $2, 's1', 'demo', 'key', 'tiny', 'tiny', '1', 'nano', 0, $3, $4, 0, $5,
        '2026-01-01T00:00:01Z', '2026-01-01T00:00:02Z', '2026-01-01T00:00:03Z'
    )
"""


async def migrate(dsn: str, folder: Path) -> int:
    async with await postgres.connect(PostgresSection(dsn=dsn), schema="billing") as database:
        return await postgres.migrate(database, "billing", folder)


@pytest.fixture
async def old_dsn(postgres_cluster: PostgresCluster, tmp_path: Path) -> AsyncIterator[str]:
    """A database as 0001 alone makes it."""
    name = f"test_{next(postgres_cluster.numbers)}"
    postgres_cluster.create_schemas(name)
    dsn = postgres_cluster.dsn("billing", name)
    shutil.copy(MIGRATIONS / "0001_create_ledger.sql", tmp_path)
    assert await migrate(dsn, tmp_path) == 1
    yield dsn
    await postgres_cluster.drop(dsn)


@pytest.fixture
async def connection(old_dsn: str) -> AsyncIterator[Connection]:
    """A connection to it."""
    found = await asyncpg.connect(old_dsn, server_settings={"search_path": "billing"})
    yield found
    await found.close()


async def test_records_from_before_are_kept_and_have_no_request_id(
    old_dsn: str, connection: Connection
) -> None:
    await connection.execute(OLD_ROWS)
    await connection.execute(OLD_INSERT, "gen_1", 1, 120, 120, 1)

    assert await migrate(old_dsn, MIGRATIONS) == len(list(MIGRATIONS.glob("*.sql"))) - 1

    await audit(connection)
    async with running(old_dsn) as billing:
        (old,) = await billing.records()
        assert (old.generation_id, old.charge.nanos, old.request_id) == ("gen_1", 120, "")
        assert (old.usage.cached_input_tokens, old.usage.reasoning_tokens) == (0, 0)
        assert (dict(old.labels), old.end_user) == ({}, "")
        price = await billing.admin.peer.call(
            billing.admin.prices.GetPrice, price_pb.GetPriceRequest(name="prices/nano")
        )
        assert not price.price.HasField("cached_input_price_per_million")
        await billing.settle(
            settlement("gen_1", slice_id="s1", tokens=120, request_id="order-1"),
            settlement("gen_2", slice_id="s1", tokens=30, request_id="order-2"),
        )
        assert await billing.balance() == (850, 150, 700)
        assert not (await billing.find("order-1")).HasField("usage_record")
        assert (await billing.find("order-2")).usage_record.generation_id == "gen_2"
    await audit(connection)


async def test_version_before_goes_on_writing_after_the_migration(
    old_dsn: str, connection: Connection
) -> None:
    """A replica that is replaced later: its records are as any without a request_id."""
    await connection.execute(OLD_ROWS)
    await connection.execute(OLD_INSERT, "gen_1", 1, 120, 120, 1)
    await migrate(old_dsn, MIGRATIONS)

    await connection.execute(OLD_INSERT, "gen_2", 2, 7, 0, 11)
    await connection.execute("UPDATE ledger_head SET record_count = 2")

    await audit(connection)
    async with running(old_dsn) as billing:
        records = await billing.records()
    assert [(item.generation_id, item.request_id) for item in records] == [
        ("gen_1", ""),
        ("gen_2", ""),
    ]


@pytest.mark.parametrize(
    "first", ["SELECT FROM credit_grant", "UPDATE credit_grant SET remaining = 0"]
)
async def test_settlement_of_the_version_before_is_no_victim_of_the_migration(
    old_dsn: str, connection: Connection, tmp_path: Path, first: str
) -> None:
    """It takes its locks while grants and alerts change: the migration waits for it."""
    for path in sorted(MIGRATIONS.glob("000[2-7]_*.sql")):
        shutil.copy(path, tmp_path)
    await migrate(old_dsn, tmp_path)
    watcher = await asyncpg.connect(old_dsn, server_settings={"search_path": "billing"})
    async with connection.transaction():
        await connection.execute(first)
        migrating = asyncio.create_task(migrate(old_dsn, MIGRATIONS))
        while not await count_waiting(watcher):
            assert not migrating.done()
        await connection.execute("UPDATE credit_grant SET remaining = 0")
        await connection.execute("DELETE FROM spend_alert")

    assert await migrating == len(list(MIGRATIONS.glob("*.sql"))) - 7
    await watcher.close()


async def test_balance_from_before_is_one_grant_that_does_not_expire(
    old_dsn: str, connection: Connection
) -> None:
    await connection.execute(OLD_ROWS)
    await connection.execute(OLD_INSERT, "gen_1", 1, 120, 120, 1)
    await connection.execute(
        "INSERT INTO account VALUES ('poor', 'poor', 'USD', '2026-01-01T00:00:00Z')"
    )
    await connection.execute("INSERT INTO balance (account_id, floor) VALUES ('poor', -50)")

    await migrate(old_dsn, MIGRATIONS)

    await audit(connection)
    async with running(old_dsn) as billing:
        grants = await billing.admin.peer.call(
            billing.admin.accounts.ListGrants,
            account_pb.ListGrantsRequest(parent="accounts/acme"),
        )
        (grant,) = grants.grants
        assert (grant.amount.nanos, grant.remaining.nanos, grant.priority) == (880, 880, 50)
        assert not grant.HasField("expire_time")
        assert await billing.balance("accounts/poor") == (0, 0, 50)
        await billing.settle(settlement("gen_2", slice_id="s1", tokens=30))
        await billing.post(7)
        assert await billing.balance() == (857, 150, 707)
    await audit(connection)


async def test_charges_of_the_version_before_are_divided_among_grants_later(
    old_dsn: str, connection: Connection
) -> None:
    await connection.execute(OLD_ROWS)
    await connection.execute(OLD_INSERT, "gen_1", 1, 120, 120, 1)
    await migrate(old_dsn, MIGRATIONS)

    await connection.execute(OLD_INSERT, "gen_2", 2, 7, 7, 1)
    await connection.execute(
        """
        INSERT INTO ledger_entry VALUES
            (5, 'acme', 5, -7, 'usage', 'gen_2', '', '2026-01-01T00:00:03Z'),
            (6, 'system-revenue', 5, 7, 'usage', 'gen_2', '', '2026-01-01T00:00:03Z');
        UPDATE ledger_head SET entry_count = 6, record_count = 2;
        UPDATE balance SET posted = posted - 7, held = held - 7;
        UPDATE credit_slice SET consumed = consumed + 7;
        """
    )

    async with running(old_dsn) as billing:
        await billing.settle(settlement("gen_3", slice_id="s1", tokens=1))
    await audit(connection)


async def test_gifts_of_the_version_before_are_no_finding_of_the_auditor(
    old_dsn: str, connection: Connection
) -> None:
    """They have no grant, and are used up first. What nobody gave is found as ever."""
    await connection.execute(OLD_ROWS)
    await connection.execute(OLD_INSERT, "gen_1", 1, 120, 120, 1)
    await migrate(old_dsn, MIGRATIONS)
    await connection.execute(
        """
        INSERT INTO ledger_entry VALUES
            (5, 'acme', 5, 50, 'grant', 'r2', '', now()),
            (6, 'system-funding', 5, -50, 'grant', 'r2', '', now());
        UPDATE ledger_head SET entry_count = 6;
        UPDATE balance SET posted = posted + 50;
        """
    )

    async with running(old_dsn) as billing:
        assert await reconcile(billing) == []
        await billing.settle(settlement("gen_2", slice_id="s1", tokens=30))
        assert await reconcile(billing) == []
        await connection.execute("UPDATE credit_grant SET remaining = remaining - 31")
        assert await reconcile(billing) == [("I2", "accounts/acme")]


async def reconcile(billing: Billing) -> list[tuple[str, str]]:
    """Invariants that are broken, and where."""
    violations, _ = await signing.reconcile(billing)
    return [(item.invariant, item.resource) for item in violations]


@pytest.mark.parametrize(
    ("request_id", "request_sha256"), [("r", bytes(31)), ("r", bytes(33)), ("", bytes(32))]
)
async def test_digests_that_no_code_should_write_are_refused_by_the_table(
    old_dsn: str, connection: Connection, request_id: str, request_sha256: bytes
) -> None:
    await migrate(old_dsn, MIGRATIONS)
    insert = OLD_INSERT.replace("settle_time\n", "settle_time, request_id, request_sha256\n")
    insert = insert.replace("00:00:03Z'\n", "00:00:03Z', $6, $7\n")

    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(insert, "gen_1", 1, 0, 0, 1, request_id, request_sha256)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("cached_input_tokens", "1"),
        ("cached_input_tokens", "-1"),
        ("reasoning_tokens", "8"),
        ("labels", "'[]'"),
    ],
)
async def test_details_that_no_code_should_write_are_refused_by_the_table(
    old_dsn: str, connection: Connection, column: str, value: str
) -> None:
    await migrate(old_dsn, MIGRATIONS)
    insert = OLD_INSERT.replace("settle_time\n", f"settle_time, {column}\n")
    insert = insert.replace("00:00:03Z'\n", f"00:00:03Z', {value}\n")

    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(insert, "gen_1", 1, 7, 0, 1)


async def test_table_refuses_a_cached_price_above_that_of_the_input(
    old_dsn: str, connection: Connection
) -> None:
    await migrate(old_dsn, MIGRATIONS)

    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute(
            """
            INSERT INTO price VALUES ('p', 'tiny', 1, 1, now(), now(), 1, 2)
            """
        )
