"""Quota and places of rate limits, shared by several gateways."""

from __future__ import annotations

import asyncio

from maas.billing.v1 import limit_service_pb2 as limit_pb
from maas.billing.v1 import quota_service_pb2 as quota_pb

from libs.errors import InvalidArgument, Reason
from tests.integration.services.billing.limiting import (
    amount,
    create,
    delete,
    give_back,
    hold,
    rate,
    read,
    refusal,
    take,
    update,
)
from tests.integration.services.billing.world import Billing

INPUT = quota_pb.QUOTA_METRIC_INPUT_TOKENS
OUTPUT = quota_pb.QUOTA_METRIC_OUTPUT_TOKENS


async def limited(billing: Billing, limit: limit_pb.Limit) -> None:
    await billing.open_account()
    await create(billing, limit, "pace")


async def test_taken_is_what_is_required_and_a_second_more_at_most(billing: Billing) -> None:
    await limited(billing, rate(requests=600, input_tokens=6000))

    response = await take(billing, amount(1, wanted=500), amount(50, metric=INPUT, wanted=60))

    assert list(response.granted) == [11, 60]
    assert response.lease_duration.seconds == 2
    assert not response.HasField("retry_after")


async def test_refusal_comes_true_to_the_microsecond(billing: Billing) -> None:
    await limited(billing, rate(requests=6))
    assert list((await take(billing, amount(6))).granted) == [6]

    refused = await take(billing, amount(2))
    assert list(refused.granted) == [0]
    wait_s = refused.retry_after.ToNanoseconds() / 1e9
    assert 10.0 < wait_s <= 20.0

    await billing.pass_lease_time(wait_s)
    assert list((await take(billing, amount(2))).granted) == [2]
    assert list((await take(billing, amount(2))).granted) == [0]


async def test_nothing_is_taken_when_one_of_several_has_not_enough(billing: Billing) -> None:
    await limited(billing, rate(requests=10, output_tokens=100))
    await take(billing, amount(90, metric=OUTPUT))

    refused = await take(billing, amount(1), amount(50, metric=OUTPUT))

    assert list(refused.granted) == [0, 0]
    assert refused.refused_index == 1
    assert list((await take(billing, amount(10))).granted) == [10]


async def test_more_than_the_limit_ever_has_is_no_matter_of_waiting(billing: Billing) -> None:
    await limited(billing, rate(input_tokens=100))

    error = await refusal(take(billing, amount(101, metric=INPUT)))

    assert isinstance(error, InvalidArgument)
    assert error.reason is Reason.LARGER_THAN_LIMIT
    assert error.metadata == {
        "limit": "limits/pace",
        "metric": "INPUT_TOKENS",
        "required": "101",
        "most": "100",
    }
    assert [item.field for item in error.violations] == ["amounts[0].required"]


async def test_what_no_limit_limits_is_granted(billing: Billing) -> None:
    await limited(billing, rate(requests=10))
    await take(billing, amount(10))
    await delete(billing, "pace")

    response = await take(billing, amount(3), amount(7, metric=INPUT), amount(1, limit_id="none"))

    assert list(response.granted) == [3, 7, 1]
    assert await hold(billing, "gateway-1", 4) == 4


async def test_limit_of_the_same_name_starts_anew(billing: Billing) -> None:
    await limited(billing, rate(requests=10, concurrent=2))
    await take(billing, amount(10))
    await hold(billing, "gateway-1", 2)
    await delete(billing, "pace")
    await create(billing, rate(requests=10, concurrent=2), "pace")

    assert list((await take(billing, amount(10))).granted) == [10]
    assert await hold(billing, "gateway-2", 2) == 2


async def test_given_back_is_there_again_but_only_once(billing: Billing) -> None:
    await limited(billing, rate(output_tokens=100))
    await take(billing, amount(60, metric=OUTPUT), holder="gateway-1")
    await take(billing, amount(40, metric=OUTPUT), holder="gateway-2")

    await give_back(billing, amount(50, metric=OUTPUT), holder="gateway-1")
    await give_back(billing, amount(50, metric=OUTPUT), holder="gateway-1")
    await give_back(billing, amount(50, metric=OUTPUT), holder="gateway-3")

    # What drains in the time of the test is far below the 40 of the other gateway.
    assert list((await take(billing, amount(60, metric=OUTPUT))).granted) == [60]
    assert list((await take(billing, amount(30, metric=OUTPUT))).granted) == [0]


async def test_giving_back_what_nobody_took_changes_nothing(billing: Billing) -> None:
    await limited(billing, rate(requests=10))
    await give_back(billing, amount(5), amount(1, limit_id="none"))

    assert list((await take(billing, amount(10))).granted) == [10]
    assert list((await take(billing, amount(1))).granted) == [0]


async def test_lowered_limit_counts_at_once(billing: Billing) -> None:
    await limited(billing, rate(requests=1000))
    await take(billing, amount(900))
    await update(billing, rate(requests=10, name="limits/pace"))

    refused = await take(billing, amount(1))

    assert list(refused.granted) == [0]
    assert refused.retry_after.ToNanoseconds() / 1e9 <= 6.0


BAD_AMOUNTS = [
    ([amount(1), amount(2)], "amounts[1].metric"),
    ([amount(1, limit_id="a b")], "amounts[0].limit"),
    ([amount(1, metric=quota_pb.QUOTA_METRIC_UNSPECIFIED)], "amounts[0].metric"),
    ([], "amounts"),
    ([amount(1)] * 65, "amounts"),
]


async def test_bad_amounts_are_refused_with_their_paths(billing: Billing) -> None:
    for amounts, field in BAD_AMOUNTS:
        error = await refusal(take(billing, *amounts))
        assert isinstance(error, InvalidArgument), field
        assert error.metadata == {"field": field}


async def test_three_gateways_together_get_what_there_is_and_no_more(billing: Billing) -> None:
    """Two limits named in different orders by 90 calls at once: no deadlock, and six get in."""
    await billing.open_account()
    await create(billing, rate(requests=6), "pace")
    await create(billing, rate(output_tokens=600), "flow")
    pair = [amount(1), amount(100, limit_id="flow", metric=OUTPUT)]

    async def one(number: int) -> bool:
        amounts = pair if number % 2 else pair[::-1]
        response = await take(billing, *amounts, holder=f"gateway-{number % 3}")
        return 0 not in response.granted

    admitted = sum(await asyncio.gather(*(one(number) for number in range(90))))

    assert admitted == 6


async def test_places_are_held_for_a_lease_and_together_never_too_many(billing: Billing) -> None:
    await limited(billing, rate(concurrent=10))

    assert await hold(billing, "gateway-1", 6) == 6
    assert await hold(billing, "gateway-2", 6) == 4
    assert (await read(billing, "pace")).usage.concurrent_generations == 10
    # More is wanted than there is: the first shares what it does not use.
    assert await hold(billing, "gateway-1", 6, in_use=2) == 6
    await billing.pass_lease_time(14)
    assert await hold(billing, "gateway-2", 10, in_use=4) == 4
    await billing.pass_lease_time(1.5)
    assert (await read(billing, "pace")).usage.concurrent_generations == 4
    assert await hold(billing, "gateway-2", 10, in_use=4) == 10
    assert await hold(billing, "gateway-1", 6, in_use=2) == 0


async def test_places_in_use_are_never_taken_away(billing: Billing) -> None:
    await limited(billing, rate(concurrent=10))
    assert await hold(billing, "gateway-1", 10) == 10

    assert await hold(billing, "gateway-2", 10) == 0
    assert await hold(billing, "gateway-1", 10, in_use=8) == 9
    assert await hold(billing, "gateway-2", 10) == 1
    assert await hold(billing, "gateway-1", 10, in_use=9) == 9
    await update(billing, rate(concurrent=3, name="limits/pace"))
    assert await hold(billing, "gateway-1", 10, in_use=9) == 9
    assert await hold(billing, "gateway-2", 1) == 0


async def test_what_a_gateway_does_not_name_it_gives_back(billing: Billing) -> None:
    await billing.open_account()
    await create(billing, rate(concurrent=5), "pace")
    await create(billing, rate(concurrent=5), "other")
    await hold(billing, "gateway-1", 5)
    await hold(billing, "gateway-2", 1, limit_id="other")

    await hold(billing, "gateway-1", 4, limit_id="other")

    assert await hold(billing, "gateway-3", 5) == 5
    assert (await read(billing, "other")).usage.concurrent_generations == 5


async def test_places_are_exact_when_many_gateways_ask_at_once(billing: Billing) -> None:
    await limited(billing, rate(concurrent=13))

    held = await asyncio.gather(*(hold(billing, f"gateway-{n}", 3) for n in range(20)))

    assert sum(held) == 13
    assert (await read(billing, "pace")).usage.concurrent_generations == 13


async def test_quota_that_was_lost_with_a_crash_starts_anew(billing: Billing) -> None:
    """PostgreSQL empties these tables after a crash."""
    await limited(billing, rate(requests=10, concurrent=2))
    await take(billing, amount(10))
    await hold(billing, "gateway-1", 2)
    await billing.connection.execute("TRUNCATE quota_bucket, place_gate, place_lease")

    assert list((await take(billing, amount(10))).granted) == [10]
    assert await hold(billing, "gateway-1", 2, in_use=2) == 2


async def test_quota_is_not_written_ahead(billing: Billing) -> None:
    rows = await billing.connection.fetch(
        """
        SELECT relname
          FROM pg_class
         WHERE relpersistence = 'u' AND relkind = 'r' AND relnamespace = 'billing'::regnamespace
         ORDER BY relname
        """
    )

    assert [row["relname"] for row in rows] == ["place_gate", "place_lease", "quota_bucket"]
