"""What a record says beside its two counts: cached and reasoning tokens, labels, end user, engine
time, the discount of the background."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration
from maas.billing.v1 import credit_slice_service_pb2 as slice_pb
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import price_service_pb2 as price_pb
from maas.common.v1 import usage_pb2 as token_usage_pb2
from prometheus_client import REGISTRY

from libs.errors import InvalidArgument
from tests.integration.services.billing.world import Billing, settlement, usd

LABELS = {"team": "search", "Ünïcode \U0001f98a": 'quotes " and \\ and \n lines', "empty": ""}


def used(generation_id: str, **counts: int) -> slice_pb.Settlement:
    """A settlement with these counts, at prices/cheap."""
    wish = settlement(generation_id, slice_id="s1", price="prices/cheap")
    wish.usage.CopyFrom(token_usage_pb2.TokenUsage(**counts))
    return wish


async def prepare(billing: Billing, cached_nanos: int | None = 500_000) -> None:
    """An account with credit, and prices/cheap: 2 nanos a token in, 3 out, half of one cached."""
    await billing.open_account(1000)
    await billing.acquire("s1", 500)
    price = ledger_pb2.Price(
        offering="offerings/tiny",
        input_price_per_million=usd(2_000_000),
        output_price_per_million=usd(3_000_000),
        cached_input_price_per_million=None if cached_nanos is None else usd(cached_nanos),
    )
    request = price_pb.CreatePriceRequest(price_id="cheap", price=price)
    await billing.admin.peer.call(billing.admin.prices.CreatePrice, request)


@pytest.mark.parametrize(
    ("cached_nanos", "cached_tokens", "charge"),
    [
        # 10 in, 4 out: 2 nanos for each fresh token, 12 for the output.
        (500_000, 0, 32),
        (500_000, 7, 6 + 4 + 12),
        (500_000, 10, 5 + 12),
        (0, 10, 12),
        (2_000_000, 7, 32),
        (None, 7, 32),
    ],
)
async def test_cached_tokens_have_their_own_price(
    billing: Billing, cached_nanos: int | None, cached_tokens: int, charge: int
) -> None:
    await prepare(billing, cached_nanos)

    await billing.settle(
        used("gen_1", input_tokens=10, cached_input_tokens=cached_tokens, output_tokens=4)
    )

    (record,) = await billing.records()
    assert record.charge.nanos == charge
    assert record.usage.cached_input_tokens == cached_tokens
    assert await billing.balance() == (1000 - charge, 500 - charge, 500)


async def test_reasoning_is_output_and_costs_no_more(billing: Billing) -> None:
    await prepare(billing)

    await billing.settle(used("gen_1", output_tokens=4, reasoning_tokens=3))

    (record,) = await billing.records()
    assert record.usage == token_usage_pb2.TokenUsage(output_tokens=4, reasoning_tokens=3)
    assert record.charge.nanos == 12


async def test_embeddings_are_settled_without_output(billing: Billing) -> None:
    await prepare(billing)

    await billing.settle(used("gen_1", input_tokens=10))

    (record,) = await billing.records()
    assert record.usage == token_usage_pb2.TokenUsage(input_tokens=10)
    assert record.charge.nanos == 20


@pytest.mark.parametrize(
    ("counts", "field"),
    [
        ({"input_tokens": 3, "cached_input_tokens": 4}, "cached_input_tokens"),
        ({"input_tokens": 3, "cached_input_tokens": -1}, "cached_input_tokens"),
        ({"output_tokens": 3, "reasoning_tokens": 4}, "reasoning_tokens"),
        ({"output_tokens": 3, "reasoning_tokens": -1}, "reasoning_tokens"),
    ],
)
async def test_parts_that_are_more_than_the_whole_are_refused(
    billing: Billing, counts: dict[str, int], field: str
) -> None:
    await prepare(billing)

    with pytest.raises(InvalidArgument) as caught:
        await billing.settle(used("gen_0"), used("gen_1", **counts))

    assert [item.field for item in caught.value.violations] == [f"settlements[1].usage.{field}"]
    assert await billing.records() == []


async def test_labels_and_end_user_come_back_as_they_were_said(billing: Billing) -> None:
    await prepare(billing)

    await billing.settle(
        settlement("gen_1", slice_id="s1", labels=LABELS, end_user="user-7", request_id="r"),
        settlement("gen_2", slice_id="s1"),
    )

    first, second = await billing.records()
    assert (dict(first.labels), first.end_user) == (LABELS, "user-7")
    assert (dict(second.labels), second.end_user) == ({}, "")
    found = (await billing.find("r")).usage_record
    assert found == first


@pytest.mark.parametrize(
    ("labels", "end_user"),
    [
        ({f"k{number}": "" for number in range(17)}, ""),
        ({"k" * 257: ""}, ""),
        ({"k": "v" * 257}, ""),
        ({"k\0": "v"}, ""),
        ({"k": "v\0"}, ""),
        ({}, "u" * 129),
        ({}, "u\0"),
    ],
)
async def test_labels_and_end_users_beyond_their_bounds_are_refused(
    billing: Billing, labels: dict[str, str], end_user: str
) -> None:
    await prepare(billing)

    with pytest.raises(InvalidArgument) as caught:
        await billing.settle(settlement("gen_1", slice_id="s1", labels=labels, end_user=end_user))

    (violation,) = caught.value.violations
    want = "settlements[0].labels" if labels else "settlements[0].end_user"
    assert violation.field.startswith(want)
    assert await billing.records() == []


async def test_largest_labels_are_kept(billing: Billing) -> None:
    await prepare(billing)
    labels = {f"{number:0>256}": "v" * 256 for number in range(16)}

    await billing.settle(settlement("gen_1", slice_id="s1", labels=labels, end_user="u" * 128))

    (record,) = await billing.records()
    assert (dict(record.labels), record.end_user) == (labels, "u" * 128)


async def test_engine_time_is_kept_to_the_microsecond(billing: Billing) -> None:
    await prepare(billing)
    wish = used("gen_1", output_tokens=1)
    wish.engine_time.CopyFrom(Duration(seconds=2, nanos=345_678_901))

    await billing.settle(wish, used("gen_2", output_tokens=1))

    first, second = await billing.records()
    assert first.engine_time == Duration(seconds=2, nanos=345_678_000)
    assert second.engine_time == Duration()


@pytest.mark.parametrize("told", [Duration(nanos=-1000), Duration(seconds=10**6, nanos=1000)])
async def test_engine_time_that_cannot_be_is_refused(billing: Billing, told: Duration) -> None:
    await prepare(billing)
    wish = used("gen_1")
    wish.engine_time.CopyFrom(told)

    with pytest.raises(InvalidArgument) as caught:
        await billing.settle(wish)

    assert [item.field for item in caught.value.violations] == ["settlements[0].engine_time"]


async def test_every_line_of_a_price_is_charged(billing: Billing) -> None:
    """Cached input, reasoning, the request, and the discount of the background on each."""
    await billing.open_account(1000)
    await billing.acquire("s1", 500)
    price = ledger_pb2.Price(
        offering="offerings/tiny",
        input_price_per_million=usd(2_000_000),
        output_price_per_million=usd(4_000_000),
        cached_input_price_per_million=usd(500_000),
        reasoning_price_per_million=usd(1_000_000),
        request_price=usd(101),
        background_discount_percent=50,
    )
    request = price_pb.CreatePriceRequest(price_id="cheap", price=price)
    await billing.admin.peer.call(billing.admin.prices.CreatePrice, request)
    counts = {
        "input_tokens": 10,
        "cached_input_tokens": 3,
        "output_tokens": 7,
        "reasoning_tokens": 2,
    }
    later = used("gen_2", **counts)
    later.background = True
    lost = used("gen_3", **counts)
    lost.end_cause = ledger_pb2.END_CAUSE_GATEWAY_LOST

    await billing.settle(used("gen_1", **counts), later, lost)

    records = await billing.records()
    assert [record.charge.nanos for record in records] == [
        (14 + 2) + (20 + 2) + 101,
        (7 + 1) + (10 + 1) + 51,
        0,
    ]
    assert [record.background for record in records] == [False, True, False]


async def test_repeat_with_other_counts_changes_nothing_and_is_counted(billing: Billing) -> None:
    await prepare(billing)
    await billing.settle(used("gen_1", output_tokens=4))
    (before,) = await billing.records()
    counter = "maas_billing_settlements_contradicted_total"
    counted = REGISTRY.get_sample_value(counter) or 0

    await billing.settle(
        used("gen_1", output_tokens=4),
        used("gen_1", output_tokens=5),
        used("gen_2", output_tokens=1),
        used("gen_2", output_tokens=2),
    )

    assert REGISTRY.get_sample_value(counter) == counted + 2
    first, second = await billing.records()
    assert first == before
    assert second.usage.output_tokens == 1
