"""Reconcile, and the auditor on line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from maas.billing.v1 import audit_service_pb2 as audit_pb
from prometheus_client import REGISTRY
from structlog.testing import capture_logs
from typing_extensions import override

from libs.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unavailable
from libs.testing import FakeClock, eventually
from services.billing.auditor import FINDINGS_LOGGED_MAX, Auditor
from services.billing.receipts import fault_of
from services.billing.store.audit import AuditStore, AuditWish, Progress
from tests.conftest import DatabaseFactory
from tests.integration.services.billing.signing import (
    AUDIT_INTERVAL_S,
    reconcile,
    running_signed,
    signed,
)
from tests.integration.services.billing.world import GRACE_S, Billing, settlement


@pytest.fixture
async def billing(database: DatabaseFactory, tmp_path: Path) -> AsyncIterator[Billing]:
    """Billing with three charged generations and their receipts; what a test breaks stays so."""
    async with running_signed(await database("billing"), tmp_path) as world:
        await world.open_account(1000)
        await world.acquire("s1", 500)
        await world.settle(
            *(signed(settlement(f"gen_{number}", slice_id="s1", tokens=7)) for number in range(3))
        )
        yield world


@pytest.fixture
async def store(billing: Billing) -> AuditStore:
    return AuditStore(billing.database, overdue_s=GRACE_S, fault_of=fault_of)


def auditor(store: AuditStore, clock: FakeClock, *, interval_s: float = 60.0) -> Auditor:
    return Auditor(store, clock, interval_s=interval_s, full_interval_s=3600.0)


async def by_hand(billing: Billing, table: str, change: str) -> None:
    """Changes rows that no trigger lets anybody change; the role owns them, so it can."""
    for statement in (
        f"ALTER TABLE {table} DISABLE TRIGGER USER",
        f"UPDATE {table} SET {change}",  # noqa: S608 - a hand
        f"ALTER TABLE {table} ENABLE TRIGGER USER",
    ):
        await billing.connection.execute(statement)


def violations_known(invariant: str) -> float | None:
    return REGISTRY.get_sample_value("maas_billing_violations", {"invariant": invariant})


async def test_reconcile_finds_nothing_where_all_is_well(billing: Billing) -> None:
    violations, summary = await reconcile(billing)

    assert violations == []
    assert summary == audit_pb.AuditSummary(record_count=3, entry_count=8, last_record=3)


async def test_reconcile_names_what_a_hand_has_changed(billing: Billing) -> None:
    await by_hand(billing, "usage_record", "input_tokens = 1")
    await by_hand(billing, "balance", "held = held + 1")

    violations, summary = await reconcile(billing, "accounts/acme", max_violations=4)

    assert [(item.invariant, item.resource) for item in violations] == [
        ("I3", "accounts/acme"),
        *(("I10", f"accounts/acme/usageRecords/gen_{number}") for number in range(3)),
    ]
    assert violations[0].description == "held is 480 nanos, its slices have 479 left"
    assert violations[1].description == "amount is 7 nanos, its counts cost 8"
    # The receipts, too, say something else.
    assert (summary.violation_count, summary.record_count, summary.entry_count) == (7, 3, 4)


async def test_reconcile_begins_behind_a_record(billing: Billing, store: AuditStore) -> None:
    await auditor(store, billing.clock).audit()
    await billing.settle(signed(settlement("gen_3", slice_id="s1", tokens=7)))
    await by_hand(billing, "usage_record", "request_id = 'x'")

    violations, summary = await reconcile(billing, after_record=3)

    assert [item.resource for item in violations] == ["accounts/acme/usageRecords/gen_3"]
    assert (summary.record_count, summary.entry_count, summary.last_record) == (1, 2, 4)
    # Nobody has looked at record 2 as the last one: all before it is looked at, too.
    assert len((await reconcile(billing, after_record=2))[0]) == 4


async def test_reconcile_is_for_administrators_and_of_what_is_there(billing: Billing) -> None:
    with pytest.raises(PermissionDenied):
        async with billing.tenant.peer.stream(
            billing.tenant.audits.Reconcile, audit_pb.ReconcileRequest()
        ) as answers:
            assert [answer async for answer in answers] == []
    with pytest.raises(NotFound):
        await reconcile(billing, "accounts/nobody")
    with pytest.raises(InvalidArgument):
        await reconcile(billing, "nobody")


async def test_one_process_reconciles_once_at_a_time(billing: Billing) -> None:
    blocker = await asyncpg.connect(billing.dsn, server_settings={"search_path": "billing"})
    try:
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE credit_slice IN ACCESS EXCLUSIVE MODE")
            first = asyncio.create_task(reconcile(billing))
            await eventually(lambda: billing_is_waiting(billing))

            with pytest.raises(ResourceExhausted) as caught:
                await reconcile(billing)
            assert caught.value.retry_after_s is not None
        violations, _ = await first
    finally:
        await blocker.close()
    assert violations == []
    # The place is free again.
    assert (await reconcile(billing))[0] == []


async def billing_is_waiting(billing: Billing) -> bool:
    return bool(
        await billing.connection.fetchval(
            "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation IS NOT NULL)"
        )
    )


async def test_an_audit_reads_one_moment(billing: Billing, store: AuditStore) -> None:
    wish = AuditWish()
    audit = store.audit(wish)
    # It waits for whoever reads, with its first finding and its snapshot.
    await by_hand(billing, "ledger_head", "entry_count = entry_count + 1")
    first = await anext(audit)

    await by_hand(billing, "ledger_head", "entry_count = entry_count - 1")
    await billing.settle(settlement("gen_9", slice_id="s1"))
    rest = [item async for item in audit]

    assert "the head says 9" in str(first)
    assert len(rest) == 1, "what came meanwhile is not seen, and so nothing of it is missing"
    assert (await reconcile(billing))[0] == []


async def test_the_auditor_looks_at_all_first_then_at_what_is_new(
    billing: Billing, store: AuditStore
) -> None:
    clock = billing.clock
    mine = auditor(store, clock)

    whole = await mine.audit()
    await billing.settle(signed(settlement("gen_3", slice_id="s1", tokens=7)))
    billing.advance(60)
    new = await mine.audit()

    assert whole is not None
    assert whole.record_count == 3
    # On a fake clock an audit takes no time, so a whole one is due each time.
    assert new is not None
    assert new.record_count == 4
    rows = await billing.connection.fetch("SELECT * FROM audit_checkpoint ORDER BY number")
    assert [(row["record_count"], row["entry_count"], row["is_full"]) for row in rows] == [
        (3, 8, True),
        (4, 10, True),
    ]


async def test_a_dear_ledger_is_audited_as_a_whole_once_an_hour(
    billing: Billing, store: AuditStore
) -> None:
    mine = auditor(store, billing.clock, interval_s=600.0)
    await mine.audit()
    for is_full in (False, False, False, False, False, True, False):
        # It took a minute each time, so whole ones would come every hundred.
        await billing.connection.execute("UPDATE audit_checkpoint SET duration_us = 60000000")
        billing.advance(600)

        await mine.audit()

        last = "SELECT is_full FROM audit_checkpoint ORDER BY number DESC LIMIT 1"
        assert await billing.connection.fetchval(last) is is_full


async def test_what_is_broken_is_logged_and_counted_until_it_is_not(
    billing: Billing, store: AuditStore
) -> None:
    mine = auditor(store, billing.clock)
    await by_hand(billing, "balance", "held = held + 1")

    with capture_logs() as logs:
        await mine.audit()

    (line,) = [item for item in logs if item["event"] == "invariant broken"]
    assert (line["invariant"], line["resource"]) == ("I3", "accounts/acme")
    assert violations_known("I3") == 1
    assert violations_known("I1") == 0
    await by_hand(billing, "balance", "held = held - 1")
    billing.advance(60)
    await mine.audit()
    assert violations_known("I3") == 0


async def test_what_is_new_and_broken_stays_counted_until_all_was_looked_at(
    billing: Billing, store: AuditStore
) -> None:
    mine = auditor(store, billing.clock)
    await mine.audit()
    await billing.connection.execute("UPDATE audit_checkpoint SET duration_us = 60000000")
    await billing.settle(settlement("gen_3", slice_id="s1", tokens=7))
    await by_hand(billing, "usage_record", "output_tokens = output_tokens + 1")

    for _ in range(3):
        billing.advance(60)
        await mine.audit()
        # Of the four that are wrong the new one was looked at, once.
        assert violations_known("I10") == 1
    billing.advance(3600)
    await mine.audit()

    assert violations_known("I10") == 4
    await by_hand(billing, "usage_record", "output_tokens = output_tokens - 1")
    billing.advance(3600)
    await mine.audit()
    assert violations_known("I10") == 0


async def test_log_lines_of_an_audit_are_bounded(billing: Billing, store: AuditStore) -> None:
    many = range(10, 10 + FINDINGS_LOGGED_MAX)
    await billing.settle(*(settlement(f"gen_{number}", slice_id="s1") for number in many))
    await by_hand(billing, "price", "output_price = 3000000")

    with capture_logs() as logs:
        await auditor(store, billing.clock).audit()

    lines = [item for item in logs if item["event"] == "invariant broken"]
    assert len(lines) == FINDINGS_LOGGED_MAX
    assert violations_known("I10") == FINDINGS_LOGGED_MAX + 3
    await by_hand(billing, "price", "output_price = 1000000")
    billing.advance(60)
    await auditor(store, billing.clock).audit()


async def test_replicas_take_turns(billing: Billing, store: AuditStore) -> None:
    one, other = auditor(store, billing.clock), auditor(store, billing.clock)

    assert await one.audit() is not None
    assert await other.audit() is None, "it was just done"
    billing.advance(60)
    leader = store.audit(AuditWish(is_leading=True))
    await by_hand(billing, "balance", "held = held + 1")
    await anext(leader)

    assert await other.audit() is None, "somebody is at it"
    await leader.aclose()
    await by_hand(billing, "balance", "held = held - 1")
    assert await other.audit() is not None


async def test_the_process_audits_by_itself(billing: Billing) -> None:
    async def is_audited() -> bool:
        return bool(await billing.connection.fetchval("SELECT count(*) FROM audit_checkpoint"))

    await eventually(lambda: billing.clock.pending > 0)
    billing.advance(AUDIT_INTERVAL_S)

    await eventually(is_audited)


async def test_an_audit_goes_on_when_the_database_is_back(billing: Billing) -> None:
    class Away(AuditStore):
        calls = 0

        @override
        async def read_progress(self) -> Progress:
            Away.calls += 1
            raise Unavailable("postgresql is not available")

    store = Away(billing.database, overdue_s=GRACE_S, fault_of=fault_of)
    clock = FakeClock()
    task = asyncio.create_task(auditor(store, clock).run())
    try:
        await eventually(lambda: clock.pending == 1)
        clock.advance(60)
        await eventually(lambda: Away.calls == 1 and clock.pending == 1)
        clock.advance(60)
        await eventually(lambda: Away.calls == 2)
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()
