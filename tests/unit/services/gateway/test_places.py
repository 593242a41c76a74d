"""Places of running generations: never more than billing has lent, whatever is lost on the way."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.errors import MaasError, Reason, ResourceExhausted, Unavailable, unavailable
from libs.testing import FakeClock
from services.gateway.limits import Rate, RateLimit
from services.gateway.places import REFUSED_S, Claim, Held, Places

TOTAL = 5
LIMIT = RateLimit("limits/l", Rate(generations=TOTAL))
OTHER = RateLimit("limits/other", Rate(generations=1))
LEASE_S = 15.0


@dataclass
class Lender:
    """Billing, as far as one gateway sees it.

    Attributes:
        elsewhere: places of LIMIT that other gateways have.
        held: places of each limit that are lent here.
        claims: questions so far.
        is_away: no question comes through.
        loses_answers: questions come through, answers do not.
    """

    elsewhere: int = 0
    held: dict[str, int] = field(default_factory=dict)
    claims: list[list[Claim]] = field(default_factory=list)
    is_away: bool = False
    loses_answers: bool = False
    gate: asyncio.Event | None = None

    async def hold(self, claims: list[Claim]) -> Held:
        self.claims.append(claims)
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        if self.is_away:
            raise unavailable("billing")
        before, self.held = self.held, {}
        for claim in claims:
            total = TOTAL - self.elsewhere if claim.limit == LIMIT.name else 1
            kept = min(claim.in_use, before.get(claim.limit, 0))
            self.held[claim.limit] = max(kept, min(claim.wanted, total), 0)
        await asyncio.sleep(0)
        if self.loses_answers:
            raise unavailable("billing")
        return Held([self.held[claim.limit] for claim in claims], LEASE_S)


async def settle_down() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_few_more_are_kept_than_are_used() -> None:
    lender, clock = Lender(), FakeClock()
    places = Places(lender.hold, clock)
    await places.take([LIMIT])
    assert lender.held == {LIMIT.name: 1}

    await places.renew()
    await places.take([LIMIT])

    assert len(lender.claims) == 2
    assert lender.held == {LIMIT.name: 2}


async def test_what_is_not_used_is_given_back() -> None:
    lender, clock = Lender(), FakeClock()
    places = Places(lender.hold, clock)
    await places.take([LIMIT])
    await places.renew()
    places.give_back([LIMIT])

    for _ in range(4):
        clock.advance(1.0)
        await places.renew()

    assert lender.held == {}


async def test_all_who_wait_are_asked_for_at_once() -> None:
    lender, clock = Lender(), FakeClock()
    lender.gate = asyncio.Event()
    places = Places(lender.hold, clock)
    tasks = [asyncio.create_task(places.take([LIMIT])) for _ in range(8)]
    await settle_down()
    lender.gate.set()

    ends = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(end) for end in ends].count(type(None)) == TOTAL
    refused = [end for end in ends if isinstance(end, ResourceExhausted)]
    assert {error.reason for error in refused} == {Reason.RATE_LIMIT_REACHED}
    assert len(refused) == 8 - TOTAL
    assert len(lender.claims) <= 3


async def test_of_several_limits_it_is_all_or_none() -> None:
    lender, clock = Lender(), FakeClock()
    places = Places(lender.hold, clock)
    await places.take([LIMIT, OTHER])

    with pytest.raises(ResourceExhausted) as refused:
        await places.take([LIMIT, OTHER])

    assert refused.value.metadata["limit"] == OTHER.name
    for _ in range(TOTAL - 1):
        await places.take([LIMIT])
    with pytest.raises(ResourceExhausted):
        await places.take([LIMIT])


async def test_a_lease_that_is_over_is_not_used() -> None:
    lender, clock = Lender(), FakeClock()
    places = Places(lender.hold, clock)
    await places.take([LIMIT])
    await places.renew()
    clock.advance(LEASE_S)
    lender.is_away = True

    with pytest.raises(Unavailable):
        await places.take([LIMIT])


async def test_who_is_refused_again_at_once_costs_no_question() -> None:
    # Each is a transaction of billing, and for its time places of all other limits are short too.
    lender, clock = Lender(elsewhere=TOTAL), FakeClock()
    places = Places(lender.hold, clock)
    with pytest.raises(ResourceExhausted):
        await places.take([LIMIT])
    asked = len(lender.claims)

    for _ in range(50):
        with pytest.raises(ResourceExhausted):
            await places.take([LIMIT])
    assert len(lender.claims) == asked

    lender.elsewhere = 0
    clock.advance(REFUSED_S)
    await places.take([LIMIT])


async def test_a_place_that_was_given_back_here_is_taken_however_short_they_are() -> None:
    lender, clock = Lender(elsewhere=TOTAL - 1), FakeClock()
    places = Places(lender.hold, clock)
    await places.take([LIMIT])
    with pytest.raises(ResourceExhausted):
        await places.take([LIMIT])

    places.give_back([LIMIT])

    await places.take([LIMIT])


async def test_while_billing_is_away_places_that_become_free_are_used_again() -> None:
    lender, clock = Lender(), FakeClock()
    places = Places(lender.hold, clock)
    await places.take([LIMIT])
    lender.is_away = True
    await places.renew()
    places.give_back([LIMIT])
    await places.renew()

    await places.take([LIMIT])
    with pytest.raises(Unavailable):
        await places.take([LIMIT])


async def test_leaving_gives_everything_back() -> None:
    lender = Lender()
    places = Places(lender.hold, FakeClock())
    await places.take([LIMIT])

    await places.close()

    assert lender.held == {}


async def test_after_leaving_nothing_is_held_again() -> None:
    lender = Lender()
    places = Places(lender.hold, FakeClock())
    await places.take([LIMIT])
    lender.gate = asyncio.Event()
    renewal = asyncio.create_task(places.renew())
    await settle_down()

    leaving = asyncio.create_task(places.close())
    await settle_down()
    # It comes behind what was asked before: else billing might hear of it first.
    assert len(lender.claims) == 2
    lender.gate.set()
    await asyncio.gather(renewal, leaving)
    await places.renew()

    assert lender.held == {}
    assert lender.claims[-1] == []


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["take", "take", "leave", "back", "renew", "away", "mute", "well", "others", "pass"]
            ),
            st.integers(0, TOTAL),
        ),
        max_size=40,
    )
)
def test_no_more_are_used_than_are_lent(steps: list[tuple[str, int]]) -> None:
    """Answers are lost, others come and take what is free, and time passes."""

    async def scenario() -> None:
        lender, clock = Lender(), FakeClock()
        places = Places(lender.hold, clock)
        used = 0
        for kind, number in steps:
            if kind == "take":
                try:
                    await places.take([LIMIT])
                    used += 1
                except MaasError:
                    pass
            elif kind == "leave":
                # Who asks goes again, after so many turns of the event loop.
                taking = asyncio.create_task(places.take([LIMIT]))
                for _ in range(number):
                    await asyncio.sleep(0)
                taking.cancel()
                (outcome,) = await asyncio.gather(taking, return_exceptions=True)
                used += outcome is None
            elif kind == "back" and used:
                places.give_back([LIMIT])
                used -= 1
            elif kind == "renew":
                await places.renew()
            elif kind == "away":
                lender.is_away = True
            elif kind == "mute":
                lender.loses_answers = True
            elif kind == "well":
                lender.is_away = lender.loses_answers = False
            elif kind == "others":
                # As many as are free: those that are lent here stay lent.
                lender.elsewhere = min(number, TOTAL - lender.held.get(LIMIT.name, 0))
            elif kind == "pass":
                clock.advance(0.4)
            assert used <= lender.held.get(LIMIT.name, 0)
            assert used + lender.elsewhere <= TOTAL

    asyncio.run(scenario())
