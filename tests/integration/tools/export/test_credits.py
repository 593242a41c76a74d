"""Exports of usage and of credits together say what the ledger says."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from maas.billing.v1 import account_service_pb2 as account_pb
from maas.billing.v1 import ledger_pb2

from tests.conftest import DatabaseFactory
from tests.integration.services.billing.world import Billing, running, settlement, usd
from tests.integration.tools.export.command import DAY_S, export

JANUARY = ("--from", "2026-01-01", "--to", "2026-02-01")


@pytest.fixture
async def billing(database: DatabaseFactory) -> AsyncIterator[Billing]:
    """An account whose money moves in every way, in January and in February."""
    async with running(await database("billing")) as world:
        await world.open_account(1000)
        await world.open_account(5000, "other")
        for first in (0, 100):
            await _move(world, first)
            world.advance(31 * DAY_S - 1)
        yield world


async def _move(world: Billing, first: int) -> None:
    await _give(world, f"t{first}", 700 + first, ledger_pb2.GRANT_KIND_TOP_UP)
    await world.post(-50, kind=ledger_pb2.ENTRY_KIND_ADJUSTMENT, description="=wrong, sorry")
    await world.settle(
        *(settlement(f"gen_{first + n}", slice_id="gone", tokens=3 + n) for n in range(20)),
        # More than the account has: the rest is bad debt, and no cost of it.
        settlement(f"gen_{first + 20}", slice_id="gone", tokens=2000),
    )
    await world.admin.peer.call(
        world.admin.accounts.RefundUsage,
        account_pb.RefundUsageRequest(
            usage_record=f"accounts/acme/usageRecords/gen_{first + 7}", request_id=f"r{first}"
        ),
    )
    await world.post(500 + first)
    await _give(world, f"g{first}", 40, ledger_pb2.GRANT_KIND_GIFT, life_s=60)
    await world.pass_lease_time(61)
    await world.sweep()


async def _give(
    world: Billing,
    grant_id: str,
    nanos: int,
    kind: ledger_pb2.GrantKind.ValueType,
    *,
    life_s: float = 0,
) -> None:
    grant = ledger_pb2.Grant(amount=usd(nanos), kind=kind)
    if life_s:
        now = await world.connection.fetchval("SELECT lease_now()")
        grant.expire_time.FromDatetime(now + timedelta(seconds=life_s))
    await world.admin.peer.call(
        world.admin.accounts.CreateGrant,
        account_pb.CreateGrantRequest(parent="accounts/acme", grant_id=grant_id, grant=grant),
    )


async def moved(billing: Billing, end: datetime) -> int:
    """What the account's entries before a time sum to."""
    total = await billing.connection.fetchval(
        "SELECT sum(amount) FROM ledger_entry WHERE account_id = 'acme' AND create_time < $1", end
    )
    return int(total)


async def billed(billing: Billing, *flags: str) -> int:
    """Sum of the costs of an export, nanos."""
    run = await export(billing, "--format", "focus", "--parent", "accounts/acme", *flags)
    assert (run.code, run.said[:7]) == (0, "export:")
    rows = csv.DictReader(io.StringIO(run.out.decode(), newline=""))
    return int(sum(Decimal(row["BilledCost"]).scaleb(9) for row in rows))


async def test_usage_and_credits_of_a_month_sum_to_what_the_ledger_moved(billing: Billing) -> None:
    usage, other = await asyncio.gather(
        billed(billing, *JANUARY), billed(billing, *JANUARY, "--what", "credits")
    )

    assert usage > 0
    assert other < 0
    assert usage + other == -await moved(billing, datetime(2026, 2, 1, tzinfo=UTC))


async def test_events_of_credits_are_each_entry_that_is_no_usage(billing: Billing) -> None:
    run = await export(
        billing, "--format", "cloudevents", "--what", "credits", "--parent", "accounts/acme"
    )

    events = [json.loads(line) for line in run.out.splitlines()]
    rows = await billing.connection.fetch(
        """
        SELECT number, amount, upper(kind) AS kind, source
          FROM ledger_entry
         WHERE account_id = 'acme' AND kind <> 'usage'
         ORDER BY number
        """
    )
    assert {event["type"] for event in events} == {"maas.ledger.posted.v1"}
    assert [
        (event["id"], event["data"]["amount_nanos"], event["data"]["kind"]) for event in events
    ] == [(f"entry_{row['number']}", str(row["amount"]), row["kind"]) for row in rows]
    kinds = {"GRANT", "TOP_UP", "ADJUSTMENT", "REFUND", "EXPIRY"}
    assert {event["data"]["kind"] for event in events} == kinds


async def test_credits_of_others_are_for_administrators(billing: Billing) -> None:
    flags = ("--format", "focus", "--what", "credits", "--parent")
    theirs, everybody = await asyncio.gather(
        export(billing, *flags, "accounts/other"), export(billing, *flags, "accounts/-")
    )

    administrator = billing.admin.peer._metadata[0][1].removeprefix("Bearer ")
    flags = ("--format", "cloudevents", "--what", "credits", "--parent")
    all_of_all = await export(billing, *flags, "accounts/-", key=administrator)

    subjects = {json.loads(line)["subject"] for line in all_of_all.out.splitlines()}
    assert subjects == {"accounts/acme", "accounts/other"}
    assert (theirs.code, everybody.code) == (1, 1)
    assert "NOT_FOUND: accounts/other" in theirs.said
    assert theirs.out.count(b"\n") == everybody.out.count(b"\n") == 1
