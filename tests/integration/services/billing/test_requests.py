"""FindSettlement: what was charged under an idempotency key."""

from __future__ import annotations

import hashlib

import pytest
from maas.billing.v1 import credit_slice_service_pb2 as slice_pb
from maas.billing.v1 import ledger_pb2

from libs.errors import InvalidArgument, Unauthenticated
from services.billing.store.settlements import FIND_CHARGED
from tests.integration.services.billing.world import Billing, Client, settlement

SHA256 = hashlib.sha256(b"a request").digest()
CHARGED = [
    ledger_pb2.END_CAUSE_COMPLETED,
    ledger_pb2.END_CAUSE_CLIENT_CANCELLED,
    ledger_pb2.END_CAUSE_DEADLINE,
    ledger_pb2.END_CAUSE_STALLED,
    ledger_pb2.END_CAUSE_REVOKED,
]
NOT_CHARGED = [
    ledger_pb2.END_CAUSE_WORKER_LOST,
    ledger_pb2.END_CAUSE_ENGINE_FAILURE,
    ledger_pb2.END_CAUSE_GATEWAY_LOST,
]


async def spend(billing: Billing, *settlements: slice_pb.Settlement) -> None:
    """Settles on slice s1 of acme."""
    await billing.open_account(10_000)
    await billing.acquire("s1", 10_000)
    await billing.settle(*settlements)


async def index_bytes(billing: Billing) -> int:
    size = await billing.connection.fetchval("SELECT pg_relation_size('usage_record_of_request')")
    assert isinstance(size, int)
    return size


async def test_settlement_of_a_request_is_found(billing: Billing) -> None:
    wish = settlement(
        "gen_1", slice_id="s1", tokens=120, request_id="order-7", request_sha256=SHA256
    )
    await spend(billing, wish)

    found = await billing.find("order-7")

    assert found.request_sha256 == SHA256
    assert found.usage_record.request_id == "order-7"
    assert found.usage_record.usage.output_tokens == 120
    assert found.usage_record.charge.nanos == 120
    assert [found.usage_record] == await billing.records()


async def test_unknown_request_is_answered_without_a_record(billing: Billing) -> None:
    await spend(billing, settlement("gen_1", slice_id="s1"))

    found = await billing.find("order-7")

    assert not found.HasField("usage_record")
    assert found.request_sha256 == b""


@pytest.mark.parametrize("cause", CHARGED)
async def test_whatever_is_charged_is_found(
    billing: Billing, cause: ledger_pb2.EndCause.ValueType
) -> None:
    await spend(billing, settlement("gen_1", slice_id="s1", end_cause=cause, request_id="order-7"))

    found = await billing.find("order-7")

    assert found.usage_record.generation_id == "gen_1"
    assert found.usage_record.end_cause == cause


@pytest.mark.parametrize("cause", NOT_CHARGED)
async def test_what_was_free_is_not_found_and_what_came_after_it_is(
    billing: Billing, cause: ledger_pb2.EndCause.ValueType
) -> None:
    free = settlement("gen_1", slice_id="s1", end_cause=cause, request_id="order-7")
    await spend(billing, free)
    assert not (await billing.find("order-7")).HasField("usage_record")

    await billing.settle(settlement("gen_2", slice_id="s1", request_id="order-7"))

    assert (await billing.find("order-7")).usage_record.generation_id == "gen_2"


async def test_generation_without_a_charge_at_a_price_of_zero_is_found(billing: Billing) -> None:
    """The end decides, not the amount: free models answer their repeats too."""
    await billing.create_price("free", 0)
    await spend(
        billing, settlement("gen_1", slice_id="s1", price="prices/free", request_id="order-7")
    )

    found = await billing.find("order-7")

    assert found.usage_record.generation_id == "gen_1"
    assert found.usage_record.charge.nanos == 0


async def test_first_that_was_settled_is_found(billing: Billing) -> None:
    """Not the first by name: generation ids of several gateways have no order."""
    await spend(
        billing,
        settlement("gen_2", slice_id="s1", tokens=2, request_id="order-7", request_sha256=SHA256),
        settlement("gen_1", slice_id="s1", tokens=1, request_id="order-7"),
    )

    found = await billing.find("order-7")

    assert found.usage_record.generation_id == "gen_2"
    assert found.request_sha256 == SHA256


async def test_request_id_belongs_to_its_project(billing: Billing) -> None:
    await spend(
        billing,
        settlement("gen_1", slice_id="s1", project="projects/red", request_id="order-7"),
        settlement("gen_2", slice_id="s1", project="projects/blue", request_id="order-7"),
    )

    red = await billing.find("order-7", project="projects/red")
    blue = await billing.find("order-7", project="projects/blue")
    none = await billing.find("order-7", project="projects/green")

    assert red.usage_record.generation_id == "gen_1"
    assert blue.usage_record.generation_id == "gen_2"
    assert not none.HasField("usage_record")


async def test_settling_again_leaves_the_request_as_it_was(billing: Billing) -> None:
    await spend(billing, settlement("gen_1", slice_id="s1", request_id="order-7"))

    await billing.settle(
        settlement("gen_1", slice_id="s1", request_id="order-8", request_sha256=SHA256)
    )

    assert (await billing.find("order-7")).usage_record.generation_id == "gen_1"
    assert not (await billing.find("order-8")).HasField("usage_record")


@pytest.mark.parametrize(
    ("project", "request_id", "field"),
    [
        ("", "order-7", "project"),
        ("demo", "order-7", "project"),
        ("projects/demo", "", "request_id"),
        ("projects/demo", "a\0b", "request_id"),
        ("projects/demo", "r" * 65, "request_id"),
    ],
)
async def test_bad_questions_are_refused_with_the_field(
    billing: Billing, project: str, request_id: str, field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await billing.find(request_id, project=project)

    assert [item.field for item in caught.value.violations] == [field]


@pytest.mark.parametrize("caller", ["tenant", "admin"])
async def test_keys_of_people_open_nothing_here(billing: Billing, caller: str) -> None:
    """It would tell one tenant what another one asked for: services only."""
    client: Client = {"tenant": billing.tenant, "admin": billing.admin}[caller]

    with pytest.raises(Unauthenticated):
        await client.peer.call(
            client.slices.FindSettlement,
            slice_pb.FindSettlementRequest(project="projects/demo", request_id="order-7"),
        )


async def test_records_without_a_request_id_are_not_in_the_index(billing: Billing) -> None:
    empty = await index_bytes(billing)
    await spend(billing, *(settlement(f"gen_{number}", slice_id="s1") for number in range(500)))
    assert await index_bytes(billing) == empty

    await billing.settle(settlement("gen_more", slice_id="s1", request_id="order-7"))

    assert await index_bytes(billing) > empty


async def test_settlement_is_found_by_one_read_of_the_index(billing: Billing) -> None:
    """In the plan for any request_id, which the server takes after the first few calls."""
    await spend(
        billing,
        *(
            settlement(f"gen_{number}", slice_id="s1", request_id=f"order-{number}")
            for number in range(1000)
        ),
    )
    await billing.connection.execute("ANALYZE usage_record")

    await billing.connection.execute(
        f"""
        SET plan_cache_mode = force_generic_plan;
        PREPARE find_charged (text, text, smallint[]) AS {FIND_CHARGED};
        """
    )
    rows = await billing.connection.fetch(
        "EXPLAIN (COSTS OFF) EXECUTE find_charged ('demo', 'order-7', '{1, 2}')"
    )

    plan = [row[0].strip() for row in rows]
    assert plan[0] == "Limit"
    assert plan[1] == "->  Index Scan using usage_record_of_request on usage_record"
    assert not [line for line in plan if "Sort" in line]
