"""Rate limits at admission, unary and stream and embeddings alike."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from libs.errors import InvalidArgument, MaasError, Reason, ResourceExhausted, Unavailable
from libs.testing import eventually
from services.gateway import places
from services.gateway.limits import Limit, Rate, RateLimit
from services.gateway.quotas import Amount, Key, Metric
from tests.integration.services.gateway.client import Reading, Wish, answer, refusal
from tests.integration.services.gateway.client_unary import Asker, embed_request
from tests.integration.services.gateway.harness import World, gateway
from tests.integration.services.gateway.neighbours import ALICE, BOB, EVE
from tests.integration.services.gateway.neighbours_unary import abilities
from tests.integration.services.gateway.richly import Rich, Spec

KEY = f"apiKeys/{ALICE.key_id}"
REQUESTS = ("limits/r", Metric.REQUESTS)
INPUT = ("limits/r", Metric.INPUT_TOKENS)
OUTPUT = ("limits/r", Metric.OUTPUT_TOKENS)


def tokens(count: int) -> Rich:
    """Asks with so many token ids for six tokens at most."""

    def change(spec: Spec) -> None:
        spec.tokens.ids.extend(range(count))

    return Rich(change=change, most=6)


def limit(world: World, rate: Rate, scope: str = "accounts/o", name: str = "limits/r") -> None:
    """Limits a scope, here and at billing."""
    made = Limit(name=name, account="accounts/o", scope=scope, rate=rate)
    world.limits.apply([made], is_snapshot=False, is_complete=False)
    world.billing.quota.add(RateLimit(name, rate))


async def begin(world: World, wish: Wish | None = None) -> Reading:
    """Starts a stream that a worker accepts."""
    stream = world.client.stream(wish)
    await world.accepted(input_tokens=3)
    return await stream.until(0)


def keys_of(amounts: Sequence[Amount]) -> set[Key]:
    return {item.key for item in amounts}


async def test_what_is_not_used_comes_back(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        quota = world.billing.quota
        limit(world, Rate(requests=100, input_tokens=1000, output_tokens=600))
        stream = world.client.stream(Wish(text="hello", most=100))
        execution = await world.accepted(input_tokens=3)
        await stream.until(0)

        (asked,) = quota.asked
        assert {(item.key, item.required) for item in asked} == {
            (REQUESTS, 1),
            (INPUT, 7),
            (OUTPUT, 100),
        }
        await eventually(lambda: {INPUT: 4} in quota.returned)
        world.workers[0].say(execution.lane, "a", "b")
        world.workers[0].end(execution.lane)
        await stream.rest()
        await eventually(lambda: {OUTPUT: 98} in quota.returned)
        assert len(quota.asked) == 1


@pytest.mark.parametrize("is_unary", [False, True])
async def test_who_asks_too_fast_is_told_when_there_is_room_and_then_there_is(
    tmp_path: Path, *, is_unary: bool
) -> None:
    async with gateway(tmp_path) as world:
        limit(world, Rate(output_tokens=600))
        first = await begin(world, Wish(most=595))

        async def fails() -> MaasError:
            wish = Wish(most=8)
            if is_unary:
                return await refusal(world.client.unary(wish))
            return await world.client.stream(wish).failure()

        refused = await fails()

        assert isinstance(refused, ResourceExhausted)
        assert refused.reason is Reason.RATE_LIMIT_REACHED
        assert refused.metadata == {"limit": "limits/r", "metric": "OUTPUT_TOKENS"}
        # 3 tokens are missing, and 10 flow back in a second.
        assert refused.retry_after_s is not None
        assert 0.05 < refused.retry_after_s <= 0.4
        again = await fails()
        assert again.reason is Reason.RATE_LIMIT_REACHED
        await asyncio.sleep(refused.retry_after_s)
        await begin(world, Wish(most=8))
        first.call.cancel()


async def test_a_refusal_takes_nothing_from_any_limit(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        quota = world.billing.quota
        limit(world, Rate(requests=60), KEY, "limits/key")
        limit(world, Rate(output_tokens=100), "projects/p", "limits/project")
        limit(world, Rate(generations=1), "accounts/o", "limits/account")
        stream = await begin(world, Wish(most=6))

        refused = await refusal(world.client.unary(Wish(most=6)))
        assert refused.metadata == {
            "limit": "limits/account",
            "metric": "CONCURRENT_GENERATIONS",
        }
        assert refused.retry_after_s == places.RETRY_S
        # No quota was taken for one that has no place.
        assert len(quota.asked) == 1

        await world.client.cancel(stream.generation_id)
        await eventually(lambda: {("limits/project", Metric.OUTPUT_TOKENS): 6} in quota.returned)
        first = await begin(world, Wish(most=6))
        await world.client.cancel(first.generation_id)
        # There is a place, and a request, but not the credit: all of it comes back.
        world.billing.available = 0
        await world.settler.flush()
        await world.book.close_all()
        world.billing.available = 0
        level = quota.level(("limits/key", Metric.REQUESTS))
        poor = await refusal(world.client.unary(Wish(most=6)))
        assert poor.reason is Reason.INSUFFICIENT_CREDIT
        await eventually(lambda: quota.level(("limits/key", Metric.REQUESTS)) <= level)
        world.billing.available = 10**9
        await begin(world, Wish(most=6))


async def test_limits_of_others_do_not_apply_and_none_costs_no_question(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        limit(world, Rate(requests=1), f"apiKeys/{BOB.key_id}")
        stream = await begin(world)
        async with world.dial(EVE) as eve:
            other = eve.stream()
            await world.accepted()
            await other.until(0)
            other.call.cancel()

        assert world.billing.quota.asked == []
        assert world.billing.quota.claims == []
        stream.call.cancel()


async def test_what_never_fits_is_refused_with_its_field(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        limit(world, Rate(input_tokens=10, output_tokens=20))

        many = await refusal(world.client.unary(Wish(most=21)))
        long = await refusal(world.client.unary(tokens(11)))

        assert isinstance(many, InvalidArgument)
        assert many.reason is long.reason is Reason.LARGER_THAN_LIMIT
        assert many.violations[0].field == "spec.stop.max_output_tokens"
        assert many.metadata == {
            "limit": "limits/r",
            "metric": "OUTPUT_TOKENS",
            "required": "21",
            "most": "20",
        }
        assert many.retry_after_s is None
        assert long.violations[0].field == "spec.tokens"
        assert world.billing.quota.asked == []
        await world.no_settlement()


async def test_a_text_counts_as_it_is_tokenised_and_not_as_its_bytes(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        limit(world, Rate(input_tokens=10))
        text = Wish(text="x" * 40, most=6)
        stream = world.client.stream(text)
        await world.accepted(input_tokens=9)
        await stream.until(0)
        await eventually(lambda: {INPUT: 1} in world.billing.quota.returned)
        stream.call.cancel()
        await world.settlements(1)
        world.billing.quota.levels.clear()

        call = world.client.unary(text)
        await world.accepted(input_tokens=11)
        refused = await refusal(call)

        assert refused.reason is Reason.LARGER_THAN_LIMIT
        assert refused.violations[0].field == "spec.text"
        await eventually(lambda: world.billing.quota.level(INPUT) == 0)
        await world.settlements(1)


async def test_a_limit_that_was_just_lowered_is_told_with_the_requests_field(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world:
        limit(world, Rate(output_tokens=100))
        world.billing.quota.add(RateLimit("limits/r", Rate(output_tokens=50)))

        refused = await refusal(world.client.unary(Wish(most=60)))

        assert refused.reason is Reason.LARGER_THAN_LIMIT
        assert refused.violations[0].field == "spec.stop.max_output_tokens"


async def test_generations_at_the_same_time_are_bounded_whatever_they_end_by(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world:
        limit(world, Rate(generations=2))
        first, second = await begin(world), await begin(world)
        assert (await refusal(world.client.unary())).reason is Reason.RATE_LIMIT_REACHED

        # A client that goes away, a worker that fails, an end by itself, a refusal by a worker.
        first.call.cancel()
        await world.settlements(1)
        third = await begin(world)
        world.workers[0].fail(2, 13, "ENGINE_FAILURE")
        assert (await second.failure()).reason is Reason.ENGINE_FAILURE
        fourth = world.client.unary()
        execution = await world.accepted()
        world.workers[0].say(execution.lane, "a")
        world.workers[0].end(execution.lane)
        await answer(fourth)
        refused = world.client.unary()
        execution = await world.workers[0].next_start()
        world.workers[0].fail(execution.lane, 3, "INVALID_FIELD")
        assert (await refusal(refused)).reason is Reason.INVALID_FIELD
        last = await begin(world)
        assert (await refusal(world.client.unary())).reason is Reason.RATE_LIMIT_REACHED
        for stream in (third, last):
            stream.call.cancel()
        await world.settlements(5)


async def test_places_that_others_have_are_not_here(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        limit(world, Rate(generations=3))
        world.billing.quota.elsewhere["limits/r"] = 2
        stream = await begin(world)
        refused = await refusal(world.client.unary())
        assert refused.reason is Reason.RATE_LIMIT_REACHED
        world.billing.quota.elsewhere["limits/r"] = 0
        await asyncio.sleep(places.REFUSED_S)

        other = await begin(world)

        for each in (stream, other):
            each.call.cancel()


async def test_while_billing_is_away_what_is_at_hand_is_spent_and_no_more(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        quota = world.billing.quota
        limit(world, Rate(generations=4))
        stream = await begin(world)
        await world.places.renew()
        quota.is_away = True

        others = [await begin(world)]
        refused = await refusal(world.client.unary())

        assert isinstance(refused, Unavailable)
        assert refused.metadata == {"dependency": "billing"}
        quota.is_away = False
        others.append(await begin(world))
        for each in (stream, *others):
            each.call.cancel()


async def test_embeddings_are_limited_alike(tmp_path: Path) -> None:
    async with (
        gateway(tmp_path, capabilities=abilities()) as world,
        Asker(world.endpoint) as asker,
    ):
        world.table.complete()
        limit(world, Rate(requests=2, input_tokens=100, output_tokens=1, generations=1))
        request = embed_request("hello")

        made = await asker.call(asker.embeddings.Embed, request)
        await asker.call(asker.embeddings.Embed, request)
        with pytest.raises(ResourceExhausted) as refused:
            await asker.call(asker.embeddings.Embed, request)

        assert made.usage.input_tokens > 0
        assert refused.value.metadata == {"limit": "limits/r", "metric": "REQUESTS"}
        surplus = 7 - made.usage.input_tokens
        back = world.billing.quota.returned
        await eventually(lambda: sum(item.get(INPUT, 0) for item in back) >= 2 * surplus)
        assert keys_of(world.billing.quota.asked[0]) == {REQUESTS, INPUT}
