"""Shares of rate limits, with a fake clock and billing as its contract says."""

from __future__ import annotations

import asyncio

import pytest

from libs.errors import DeadlineExceeded, Reason, ResourceExhausted, Unavailable
from libs.testing import FakeClock, eventually
from services.gateway.limits import Rate, RateLimit
from services.gateway.places import Places
from services.gateway.quotas import (
    GIVE_BACK_S,
    LEASE_MARGIN_S,
    Amount,
    Metric,
    Need,
    Quotas,
    Taken,
)
from tests.integration.services.gateway.neighbours_quota import SHARE_LEASE_S, QuotaBilling

RATE = 6000
LIMIT = RateLimit("limits/l", Rate(requests=RATE))
SMALL = RateLimit("limits/small", Rate(output_tokens=60))
KEY = (LIMIT.name, Metric.REQUESTS)
SMALL_KEY = (SMALL.name, Metric.OUTPUT_TOKENS)
ONE = Need(input_tokens=1, output_tokens=10)


class World:
    """A gateway's quotas."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.billing = QuotaBilling(now_s=self.clock.monotonic_s)
        self.billing.add(LIMIT, SMALL)
        self.quotas = Quotas(
            take=self.billing.take,
            give_back=self.billing.give_back,
            places=Places(self.billing.hold, self.clock),
            clock=self.clock,
        )

    async def burst(self, count: int) -> None:
        """So many requests at once."""
        for _ in range(count):
            await self.quotas.take([LIMIT], ONE)


@pytest.fixture
def world() -> World:
    return World()


async def test_what_comes_in_a_second_is_taken_in_advance(world: World) -> None:
    await world.burst(20)
    assert len(world.billing.asked) == 20
    world.clock.advance(1.0)

    await world.burst(20)

    # One for what is known of the second before; after that it is at hand.
    assert [item.wanted for item in world.billing.asked[20]] == [21]
    assert len(world.billing.asked) == 21


async def test_what_was_taken_in_advance_goes_back_before_its_lease_ends(world: World) -> None:
    await world.burst(20)
    world.clock.advance(1.0)
    await world.burst(1)
    level = world.billing.level(KEY)
    world.clock.advance(SHARE_LEASE_S - 0.5)
    drained = (SHARE_LEASE_S - 0.5) * RATE / 60

    world.quotas.sweep()
    await world.quotas.flush()

    assert world.billing.returned == [{KEY: 20}]
    assert world.billing.level(KEY) == pytest.approx(max(level - drained - 20, 0))
    asked = len(world.billing.asked)
    await world.burst(1)
    assert len(world.billing.asked) == asked + 1


async def test_a_refusal_gives_back_what_was_at_hand_so_that_its_time_comes_true(
    world: World,
) -> None:
    limits = [LIMIT, SMALL]
    await world.quotas.take([SMALL], Need(input_tokens=1, output_tokens=55))

    with pytest.raises(ResourceExhausted) as refused:
        await world.quotas.take(limits, ONE)

    assert refused.value.reason is Reason.RATE_LIMIT_REACHED
    assert refused.value.metadata == {"limit": SMALL.name, "metric": "OUTPUT_TOKENS"}
    # Nothing was taken from the other limit.
    assert world.billing.level(KEY) == 0
    retry_after_s = refused.value.retry_after_s
    assert retry_after_s is not None
    assert retry_after_s == pytest.approx(5.0, abs=0.1)
    await world.quotas.flush()
    world.clock.advance(retry_after_s)
    await world.quotas.take(limits, ONE)


async def test_who_is_refused_again_at_once_costs_no_question(world: World) -> None:
    await world.quotas.take([SMALL], Need(input_tokens=1, output_tokens=55))
    retries = []
    for _ in range(3):
        with pytest.raises(ResourceExhausted) as refused:
            await world.quotas.take([SMALL], ONE)
        retries.append(refused.value.retry_after_s)
        world.clock.advance(0.03)

    assert len(world.billing.asked) == 2
    assert retries == pytest.approx([5.05, 5.02, 4.99])
    # Who needs less is asked for.
    await world.quotas.take([SMALL], Need(input_tokens=1, output_tokens=3))


async def test_what_comes_back_makes_room_at_once(world: World) -> None:
    ticket = await world.quotas.take([SMALL], Need(input_tokens=1, output_tokens=55))
    with pytest.raises(ResourceExhausted):
        await world.quotas.take([SMALL], ONE)

    ticket.end(5)
    await world.quotas.flush()

    await world.quotas.take([SMALL], ONE)
    assert world.billing.returned == [{SMALL_KEY: 50}]


async def test_a_ticket_gives_back_once(world: World) -> None:
    ticket = await world.quotas.take([SMALL], Need(input_tokens=1, output_tokens=50))
    ticket.end(10)
    ticket.end(0)
    ticket.cancel()
    other = await world.quotas.take([SMALL], ONE)
    other.cancel()
    other.cancel()
    other.end(0)

    await world.quotas.flush()

    assert world.billing.returned == [{SMALL_KEY: 40 + 10}]


async def test_billing_away_is_no_admission_and_loses_nothing_at_hand(world: World) -> None:
    await world.burst(20)
    world.clock.advance(1.0)
    await world.burst(1)
    world.billing.is_away = True

    await world.burst(20)
    with pytest.raises(Unavailable):
        await world.burst(1)
    # What could not be given back is forgotten: it flows back by itself.
    world.quotas.give_back({KEY: 3})
    await world.quotas.flush()
    world.billing.is_away = False
    await world.quotas.flush()
    assert world.billing.returned == []


async def test_billing_that_does_not_answer_is_away() -> None:
    async def hang(_: list[Amount]) -> Taken:
        raise DeadlineExceeded("too late")

    world = World()
    quotas = Quotas(
        take=hang,
        give_back=world.billing.give_back,
        places=Places(world.billing.hold, world.clock),
        clock=world.clock,
    )

    with pytest.raises(Unavailable):
        await quotas.take([LIMIT], ONE)


async def test_shares_that_nobody_uses_are_forgotten(world: World) -> None:
    await world.burst(5)
    for _ in range(4):
        world.clock.advance(SHARE_LEASE_S)
        world.quotas.sweep()

    assert world.quotas._shares == {}


async def filled(world: World) -> None:
    """Has a second's worth at hand, and forgets which questions that took."""
    await world.burst(20)
    world.clock.advance(1.0)
    await world.burst(1)
    world.billing.asked.clear()


async def test_what_runs_low_is_brought_before_anybody_misses_it(world: World) -> None:
    await filled(world)
    await world.burst(10)
    await world.quotas.bring()
    assert world.billing.asked == []

    await world.burst(1)
    await world.quotas.bring()
    await world.quotas.bring()

    # As much as was there, so that it is never more than a second's worth; once for all.
    assert world.billing.asked == [[Amount(key=KEY, required=0, wanted=11)]]
    await world.burst(20)
    assert len(world.billing.asked) == 1


async def test_what_is_brought_goes_back_when_nobody_comes(world: World) -> None:
    await filled(world)
    await world.burst(15)
    await world.quotas.bring()
    world.clock.advance(SHARE_LEASE_S)

    world.quotas.sweep()
    await world.quotas.flush()
    await world.quotas.bring()

    assert world.billing.returned == [{KEY: 20}]
    assert len(world.billing.asked) == 1


async def test_near_the_limit_nothing_is_brought_that_others_may_need(world: World) -> None:
    await filled(world)
    await world.burst(11)
    world.billing.levels[KEY] = RATE - 3

    await world.quotas.bring()
    assert world.billing.level(KEY) == RATE
    await world.burst(12)
    await world.quotas.bring()

    assert len(world.billing.asked) == 1


async def test_what_cannot_be_brought_is_asked_for_again_with_the_next_request(
    world: World,
) -> None:
    await filled(world)
    await world.burst(11)
    world.billing.is_away = True
    await world.quotas.bring()
    world.billing.is_away = False

    await world.burst(1)
    await world.quotas.bring()

    assert [len(amounts) for amounts in world.billing.asked] == [1, 1]
    await world.burst(20)
    assert len(world.billing.asked) == 2


async def test_a_limit_that_was_lowered_below_what_is_taken_brings_nothing(world: World) -> None:
    """Billing refuses even what nobody requires then, until enough has drained."""
    await filled(world)
    await world.burst(11)
    lowered = 120
    world.billing.levels[KEY] = lowered + 1
    world.billing.add(RateLimit(LIMIT.name, Rate(requests=lowered)))

    await world.quotas.bring()
    await world.burst(1)
    await world.quotas.bring()

    assert [amounts[0].required for amounts in world.billing.asked] == [0]


async def test_what_billing_may_have_had_back_is_not_leased_anew(world: World) -> None:
    """The question came late: the loop, or billing before it, stood still."""
    await filled(world)
    await world.burst(3)
    world.clock.advance(SHARE_LEASE_S - LEASE_MARGIN_S - 0.05)
    await world.burst(12)
    world.clock.advance(0.1)

    await world.quotas.bring()
    assert world.billing.asked == []

    await world.burst(1)
    await world.quotas.flush()
    assert world.billing.returned == [{KEY: 5}]
    assert [item.required for amounts in world.billing.asked for item in amounts] == [1]


async def test_a_share_is_filled_while_requests_go_on(world: World) -> None:
    await filled(world)
    running = asyncio.create_task(world.quotas.run())

    await world.burst(11)
    await eventually(lambda: world.clock.pending == 1)
    world.clock.advance(GIVE_BACK_S)
    await eventually(lambda: len(world.billing.asked) == 1)

    running.cancel()
    await world.burst(20)
    assert len(world.billing.asked) == 1


async def test_who_comes_less_often_than_before_is_brought_less(world: World) -> None:
    await filled(world)
    world.clock.advance(1.0)
    await world.burst(11)

    await world.quotas.bring()

    # Nine of twenty are left, and a second takes eleven now.
    assert world.billing.asked == [[Amount(key=KEY, required=0, wanted=2)]]
    await world.burst(1)
    await world.quotas.bring()
    assert len(world.billing.asked) == 1


async def test_shares_that_are_used_together_are_filled_together(world: World) -> None:
    other = RateLimit("limits/other", Rate(requests=RATE))
    world.billing.add(other)
    await world.quotas.take([other], ONE)
    for _ in range(19):
        await world.quotas.take([LIMIT, other], ONE)
    world.clock.advance(1.0)
    await world.quotas.take([LIMIT, other], ONE)
    world.billing.asked.clear()

    # Of nineteen and twenty: the one runs low, the other one does not yet.
    for _ in range(10):
        await world.quotas.take([LIMIT, other], ONE)
    await world.quotas.bring()

    (amounts,) = world.billing.asked
    assert {amount.key[0]: amount.wanted for amount in amounts} == {
        LIMIT.name: 10,
        other.name: 10,
    }


async def test_a_lease_is_renewed_while_requests_come(world: World) -> None:
    await filled(world)
    await world.burst(9)
    world.clock.advance(1.0)
    await world.burst(1)

    await world.quotas.bring()

    # Ten a second come, and ten are there.
    assert world.billing.asked == [[Amount(key=KEY, required=0, wanted=0)]]
    world.clock.advance(1.0)
    await world.burst(10)
    assert len(world.billing.asked) == 1


async def test_what_many_have_brought_together_is_no_more_than_a_second_needs(
    world: World,
) -> None:
    await world.burst(20)
    world.clock.advance(1.0)

    async def slowly(amounts: list[Amount]) -> Taken:
        await asyncio.sleep(0)
        return await world.billing.take(amounts)

    world.quotas._take_quota = slowly
    await asyncio.gather(*(world.quotas.take([LIMIT], ONE) for _ in range(5)))
    world.clock.advance(1.0)
    await world.burst(1)

    await world.quotas.bring()
    await world.quotas.flush()

    # Each brought twenty; five came in a second.
    assert world.billing.returned == [{KEY: 5 * 20 - 1 - 5}]
    asked = len(world.billing.asked)
    await world.burst(5)
    assert len(world.billing.asked) == asked
