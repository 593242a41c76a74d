"""The command itself against billing behind real gRPC: ranges, repeats, and going on."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from maas.billing.v1 import usage_service_pb2 as usage_pb

from tests.conftest import DatabaseFactory
from tests.integration.services.billing.world import Billing, running, settlement
from tests.integration.tools.export.command import DAY_S, export

FIRST, SECOND = 1010, 20
"""Records of the two days: more than a page, and some."""


@pytest.fixture
async def billing(database: DatabaseFactory) -> AsyncIterator[Billing]:
    """Two days of usage."""
    async with running(await database("billing")) as world:
        await world.open_account(1_000_000)
        await world.acquire("s1", 1_000_000)
        await world.settle(
            *(
                settlement(f"gen_{number}", slice_id="s1", tokens=number % 97, labels={"é": "\n"})
                for number in range(1000)
            )
        )
        await world.settle(
            *(settlement(f"gen_{number}", slice_id="s1") for number in range(1000, FIRST))
        )
        world.advance(DAY_S)
        await world.settle(
            *(settlement(f"gen_{number}", slice_id="s1") for number in range(FIRST, FIRST + SECOND))
        )
        yield world


async def test_events_of_a_range_are_the_same_whenever_asked_and_however_cut(
    billing: Billing,
) -> None:
    flags = ("--format", "cloudevents", "--parent", "accounts/acme", "--to", "2026-01-02")

    first, other_day = await asyncio.gather(
        export(billing, *flags),
        export(billing, "--format", "cloudevents", "--from", "2026-01-02"),
    )
    (token,) = re.findall(r"1000 records; go on with --after (\S+)", first.said)
    await billing.settle(settlement("gen_late", slice_id="s1"))
    again, rest = await asyncio.gather(
        export(billing, *flags), export(billing, *flags, "--after", token)
    )

    assert (first.code, first.said.splitlines()[-1]) == (0, f"export: {FIRST} records")
    assert again.out == first.out
    lines = first.out.splitlines(keepends=True)
    assert b"".join(lines[1000:]) == rest.out
    events = [json.loads(line) for line in lines]
    assert [event["id"] for event in events] == [f"gen_{number}" for number in range(FIRST)]
    assert [json.loads(line)["id"] for line in other_day.out.splitlines()] == [
        f"gen_{number}" for number in range(FIRST, FIRST + SECOND)
    ]
    event = events[50]
    assert {name: event[name] for name in ("specversion", "source", "type", "subject")} == {
        "specversion": "1.0",
        "source": "/maas/billing",
        "type": "maas.usage.settled.v1",
        "subject": "accounts/acme",
    }
    assert datetime.fromisoformat(event["time"]) == datetime(2026, 1, 1, tzinfo=UTC)
    assert event["data"]["output_tokens"] == 50
    assert event["data"]["charge_nanos"] == "50"
    assert event["data"]["charge"] == "0.00000005"
    assert event["data"]["labels"] == {"é": "\n"}


async def test_rows_sum_to_the_charges(billing: Billing) -> None:
    summed = await billing.tenant.peer.call(
        billing.tenant.usage.SummarizeUsage, usage_pb.SummarizeUsageRequest()
    )

    got, again = await asyncio.gather(
        export(billing, "--format", "focus"), export(billing, "--format", "focus")
    )

    assert (got.code, got.out) == (0, again.out)
    rows = list(csv.DictReader(io.StringIO(got.out.decode(), newline="")))
    billed = sum((Decimal(row["BilledCost"]) for row in rows), Decimal(0))
    assert billed == Decimal(summed.summaries[0].charge.nanos).scaleb(-9)
    assert {row["x_GenerationId"] for row in rows} == {
        f"gen_{number}" for number in range(FIRST + SECOND)
    }
    assert {row["BillingAccountName"] for row in rows} == {"acme"}


async def test_refusals_are_said_and_keys_are_not(billing: Billing) -> None:
    secret = "mk_wrong_secret"

    refused, hidden, keyless = await asyncio.gather(
        export(billing, "--format", "focus", key=secret),
        export(billing, "--format", "focus", "--parent", "accounts/other"),
        export(billing, "--format", "focus", key=""),
    )

    assert (refused.code, refused.said.startswith("export: UNAUTHENTICATED")) == (1, True)
    assert secret not in refused.said
    assert (hidden.code, hidden.said) == (1, "export: NOT_FOUND: accounts/other not found\n")
    assert keyless.code == 2
