"""Settle: once for each generation, in one transaction with the money."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from maas.billing.v1 import credit_slice_service_pb2 as slice_pb
from maas.billing.v1 import ledger_pb2

from libs.errors import InvalidArgument, MaasError
from tests.integration.services.billing.world import (
    GRACE_S,
    LEASE_S,
    Billing,
    running,
    settlement,
    time_pb,
)

BAD_DEBT = "accounts/system-bad-debt"
REVENUE = "accounts/system-revenue"
CHARGED = ["COMPLETED", "CLIENT_CANCELLED", "DEADLINE", "STALLED", "REVOKED"]
NOT_CHARGED = ["WORKER_LOST", "ENGINE_FAILURE", "GATEWAY_LOST"]


def fields(error: MaasError) -> list[str]:
    return [item.field for item in error.violations]


async def test_settle_takes_from_the_slice_and_writes_a_record(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 300)
    billing.clock.advance(5)

    response = await billing.settle(settlement("gen_1", slice_id="s1", tokens=120))

    assert response.settled_count == 1
    assert response.lease_duration.seconds == LEASE_S
    assert await billing.balance() == (880, 180, 700)
    assert await billing.balance(REVENUE) == (120, 0, 0)
    (record,) = await billing.records()
    assert record.name == "accounts/acme/usageRecords/gen_1"
    assert record.project == "projects/demo"
    assert record.api_key == "apiKeys/key"
    assert record.offering == "offerings/tiny"
    assert record.model_version == "models/tiny/versions/1"
    assert record.price == "prices/nano"
    assert record.usage.output_tokens == 120
    assert record.charge.nanos == 120
    assert record.end_cause == ledger_pb2.END_CAUSE_COMPLETED
    assert (record.start_time, record.end_time) == (time_pb(1), time_pb(2))
    assert record.settle_time == time_pb(5)


async def test_settling_again_charges_once(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 300)
    wish = settlement("gen_1", slice_id="s1", tokens=120)

    counts = [(await billing.settle(wish)).settled_count for _ in range(3)]

    assert counts == [1, 0, 0]
    assert await billing.balance() == (880, 180, 700)


async def test_first_settlement_of_a_generation_counts(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 300)
    await billing.settle(settlement("gen_1", slice_id="s1", tokens=120))

    await billing.settle(settlement("gen_1", slice_id="s1", tokens=100))

    assert await billing.balance() == (880, 180, 700)


async def test_same_generation_twice_in_a_batch_charges_once(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 300)

    response = await billing.settle(
        settlement("gen_1", slice_id="s1", tokens=120),
        settlement("gen_2", slice_id="s1", tokens=10),
        settlement("gen_1", slice_id="s1", tokens=120),
    )

    assert response.settled_count == 2
    assert await billing.balance() == (870, 170, 700)


async def test_concurrent_settles_of_one_batch_charge_once(billing: Billing) -> None:
    """Four replicas, the same generations in another order, mixed with generations of their own."""
    await billing.open_account(10_000)
    await billing.open_account(10_000, "other")
    for account_id in ("acme", "other"):
        await billing.acquire(f"s-{account_id}", 5000, account=f"accounts/{account_id}")

    def batch(prefix: str) -> list[slice_pb.Settlement]:
        return [
            settlement(
                f"{prefix}-{number}",
                slice_id=f"s-{account_id}",
                account=f"accounts/{account_id}",
                tokens=3,
            )
            for number in range(50)
            for account_id in [("acme", "other")[number % 2]]
        ]

    shared = batch("shared")
    batches = [shared, shared[::-1], shared + batch("third"), batch("fourth") + shared[::-1]]
    async with AsyncExitStack() as stack:
        replicas = [
            await stack.enter_async_context(running(billing.dsn, connections_max=2))
            for _ in batches
        ]

        responses = await asyncio.gather(
            *(replica.settle(*wishes) for replica, wishes in zip(replicas, batches, strict=True))
        )

    settled = {item.generation_id for wishes in batches for item in wishes}
    assert len(settled) == 150
    assert sum(response.settled_count for response in responses) == 150
    assert await billing.balance("accounts/acme") == (9775, 4775, 5000)
    assert await billing.balance("accounts/other") == (9775, 4775, 5000)


@pytest.mark.parametrize("cause", CHARGED + NOT_CHARGED)
async def test_end_cause_decides_who_pays(billing: Billing, cause: str) -> None:
    """The record counts what was released either way."""
    await billing.open_account(1000)
    await billing.acquire("s1", 300)

    await billing.settle(
        settlement(
            "gen_1",
            slice_id="s1",
            tokens=120,
            end_cause=ledger_pb2.EndCause.Value(f"END_CAUSE_{cause}"),
        )
    )

    charge = 120 if cause in CHARGED else 0
    assert await billing.balance() == (1000 - charge, 300 - charge, 700)
    (record,) = await billing.records()
    assert record.charge.nanos == charge
    assert record.usage.output_tokens == 120


async def test_each_line_is_rounded_up(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.create_price("third", 333_333)
    await billing.acquire("s1", 300)
    wish = settlement("gen_1", slice_id="s1", tokens=4, price="prices/third")
    wish.usage.input_tokens = 1

    await billing.settle(wish)

    assert (await billing.records())[0].charge.nanos == 1 + 2


@pytest.mark.parametrize("state", ["closed", "reclaimed", "unknown", "foreign"])
async def test_late_settlement_is_charged_from_what_is_available(
    billing: Billing, state: str
) -> None:
    await billing.open_account(1000)
    await billing.open_account(1000, "other")
    await make_late(billing, state)

    response = await billing.settle(settlement("gen_1", slice_id="s1", tokens=120))

    assert response.settled_count == 1
    assert await billing.balance() == (880, 0, 880)
    assert (await billing.balance("accounts/other"))[0] == 1000


async def make_late(billing: Billing, state: str) -> None:
    """Makes a slice s1 that a settlement on acme cannot use."""
    if state == "unknown":
        return
    account = "accounts/other" if state == "foreign" else "accounts/acme"
    await billing.acquire("s1", 300, account=account)
    if state == "closed":
        await billing.close("s1")
    if state == "reclaimed":
        await billing.pass_lease_time(LEASE_S + GRACE_S)
        await billing.sweep()


async def test_expired_slice_still_pays(billing: Billing) -> None:
    """A gateway that comes back within the grace settles on what was set aside for it."""
    await billing.open_account(300)
    await billing.acquire("s1", 300)
    await billing.pass_lease_time(LEASE_S)
    await billing.sweep()

    response = await billing.settle(settlement("gen_1", slice_id="s1", tokens=120))

    assert list(response.lost_slice_ids) == ["s1"]
    assert await billing.balance() == (180, 180, 0)


async def test_what_no_credit_is_left_for_is_bad_debt(billing: Billing) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 300)
    await billing.close("s1")
    await billing.acquire("s2", 950)

    await billing.settle(
        settlement("gen_1", slice_id="s1", tokens=30),
        settlement("gen_2", slice_id="s1", tokens=30),
        settlement("gen_3", slice_id="s1", tokens=30),
    )

    assert await billing.balance() == (950, 950, 0)
    assert await billing.balance(BAD_DEBT) == (-40, 0, 0)
    assert await billing.balance(REVENUE) == (90, 0, 0)
    assert [record.charge.nanos for record in await billing.records()] == [30, 20, 0]


async def test_settlement_beyond_its_slice_takes_the_rest_from_the_account(
    billing: Billing,
) -> None:
    await billing.open_account(1000)
    await billing.acquire("s1", 100)

    await billing.settle(settlement("gen_1", slice_id="s1", tokens=120))

    assert await billing.balance() == (880, 0, 880)


async def test_bad_settlements_are_named_and_nothing_of_the_batch_is_settled(
    billing: Billing,
) -> None:
    """The caller sets them aside and repeats the rest: no settlement blocks the others."""
    await billing.open_account(1000)
    await billing.acquire("s1", 300)
    good = settlement("gen_1", slice_id="s1", tokens=120)
    bad = [
        settlement("gen_2", slice_id="s1", price="prices/none"),
        settlement("gen_3", slice_id="s1", price="prices/none"),
    ]

    with pytest.raises(InvalidArgument) as caught:
        await billing.settle(bad[0], good, bad[1])

    assert fields(caught.value) == ["settlements[0].price", "settlements[2].price"]
    assert await billing.balance() == (1000, 300, 700)
    assert (await billing.settle(good)).settled_count == 1


@pytest.mark.parametrize("account", ["accounts/nobody", "accounts/system-revenue"])
async def test_unknown_payer_is_named(billing: Billing, account: str) -> None:
    await billing.open_account(1000)

    with pytest.raises(InvalidArgument) as caught:
        await billing.settle(settlement("gen_1", slice_id="s1", account=account))

    assert fields(caught.value) == ["settlements[0].account"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"account": "acme"}, "account"),
        ({"project": "demo"}, "project"),
        ({"api_key": "apiKeys/"}, "api_key"),
        ({"offering": "models/x"}, "offering"),
        ({"model_version": "models/x"}, "model_version"),
        ({"price": "x"}, "price"),
        ({"generation_id": "a\0b"}, "generation_id"),
        ({"usage": {"output_tokens": -1}}, "usage.output_tokens"),
        ({"usage": {"input_tokens": 2**32 + 1}}, "usage.input_tokens"),
        ({"start_time": {"seconds": 2**60}}, "start_time"),
        ({"end_time": {"seconds": -(2**40)}}, "end_time"),
        ({"end_cause": 0}, "end_cause"),
        ({"end_cause": 99}, "end_cause"),
        ({"request_id": "a\0b"}, "request_id"),
        ({"request_id": "r" * 65}, "request_id"),
        ({"request_id": "r", "request_sha256": bytes(31)}, "request_sha256"),
        ({"request_id": "r", "request_sha256": bytes(33)}, "request_sha256"),
        ({"request_sha256": bytes(32)}, "request_sha256"),
    ],
)
async def test_malformed_settlements_are_named(
    billing: Billing, change: dict[str, object], field: str
) -> None:
    await billing.open_account(1000)
    good = settlement("gen_1", slice_id="s1")
    bad = settlement("gen_2", slice_id="s1")
    for name in change:
        bad.ClearField(name)  # type: ignore[arg-type] # names of the test's choice
    bad.MergeFrom(slice_pb.Settlement(**change))  # type: ignore[arg-type] # likewise

    with pytest.raises(InvalidArgument) as caught:
        await billing.settle(good, bad)

    assert fields(caught.value) == [f"settlements[1].{field}"]
    assert await billing.records() == []


async def test_largest_charge_that_can_be_asked_for_fits(billing: Billing) -> None:
    await billing.open_account(2**63 - 1)
    await billing.create_price("dear", 10**15)
    await billing.acquire("s1", 2**63 - 1)
    wish = settlement("gen_1", slice_id="s1", tokens=2**32, price="prices/dear")
    wish.usage.input_tokens = 2**32

    await billing.settle(wish)

    assert (await billing.records())[0].charge.nanos == 2 * 2**32 * 10**9


async def test_full_batch(billing: Billing) -> None:
    await billing.open_account(10_000)
    await billing.acquire("s1", 5000)
    batch = [settlement(f"gen_{number}", slice_id="s1") for number in range(1000)]

    assert (await billing.settle(*batch)).settled_count == 1000
    with pytest.raises(InvalidArgument):
        await billing.settle(*batch, settlement("gen_more", slice_id="s1"))

    assert await billing.balance() == (9000, 4000, 5000)


async def test_empty_settle_changes_nothing(billing: Billing) -> None:
    response = await billing.settle()

    assert response.settled_count == 0


async def test_failure_in_the_middle_leaves_nothing(billing: Billing) -> None:
    """A trigger refuses the entries of one generation: record, slice and balance stay too."""
    await billing.open_account(1000)
    await billing.acquire("s1", 300)
    await billing.connection.execute(
        """
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN RAISE EXCEPTION ''injected''; END';
        CREATE TRIGGER fail BEFORE INSERT ON ledger_entry
            FOR EACH ROW WHEN (NEW.source = 'gen_2') EXECUTE FUNCTION fail();
        """
    )
    batch = [settlement(f"gen_{number}", slice_id="s1", tokens=10) for number in range(5)]

    with pytest.raises(MaasError, match="internal error"):
        await billing.settle(*batch)
    assert await billing.records() == []
    assert await billing.balance() == (1000, 300, 700)

    await billing.connection.execute("DROP TRIGGER fail ON ledger_entry")
    assert (await billing.settle(*batch)).settled_count == 5
