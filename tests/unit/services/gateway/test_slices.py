"""The book of credit slices against a small account that keeps the truth."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.errors import (
    FailedPrecondition,
    MaasError,
    Reason,
    ResourceExhausted,
    Unavailable,
    unavailable,
)
from libs.testing import FakeClock
from services.gateway.slices import NEAR_FLOOR_S, Grant, Hold, Purse, Sizes, SliceBook

ACCOUNT = Purse("accounts/dev")
PROJECT = Purse("accounts/dev", "projects/p")
REFILL_S = 1.0


@dataclass
class Account:
    """What billing does, for one account."""

    available: int
    granted: dict[str, int] = field(default_factory=dict)
    is_away: bool = False
    gate: asyncio.Event | None = None
    asked: list[tuple[int, int]] = field(default_factory=list)
    refusal: MaasError | None = None
    lease_s: float = 60.0

    async def acquire(self, slice_id: str, purse: Purse, required: int, wanted: int) -> Grant:
        assert purse.account == ACCOUNT.account
        self.asked.append((required, wanted))
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        if self.refusal is not None:
            raise self.refusal
        if self.is_away:
            raise unavailable("billing")
        if self.available < required:
            raise FailedPrecondition("no credit", reason=Reason.INSUFFICIENT_CREDIT)
        grant = min(wanted, self.available)
        self.available -= grant
        self.granted[slice_id] = grant
        return Grant(grant, self.lease_s)

    async def close(self, slice_ids: list[str]) -> None:
        if self.is_away:
            raise unavailable("billing")
        for slice_id in slice_ids:
            self.available += self.granted.pop(slice_id, 0)

    def settle(self, slice_id: str, nanos: int) -> None:
        self.granted[slice_id] -= nanos


def book_of(account: Account, clock: FakeClock, *, slice_nanos: int = 100) -> SliceBook:
    numbers = iter(range(10**6))
    return SliceBook(
        acquire=account.acquire,
        close=account.close,
        new_id=lambda: f"s{next(numbers)}",
        clock=clock,
        sizes=Sizes(nanos_max=slice_nanos, refill_s=REFILL_S, count_max=50),
        start=asyncio.ensure_future,
    )


async def settle_down() -> None:
    """Lets what runs in the background come to its end."""
    for _ in range(10):
        await asyncio.sleep(0)


async def warm_up(book: SliceBook, clock: FakeClock, nanos: int) -> None:
    """Has the book know of a period in which so much was set aside, and of nothing since."""
    book.release(await book.reserve(ACCOUNT, nanos))
    clock.advance(REFILL_S)


async def test_slices_of_a_burst_grow_with_it_and_nothing_comes_in_the_background() -> None:
    account = Account(1000)
    book = book_of(account, FakeClock())

    for _ in range(7):
        await book.reserve(ACCOUNT, 30)
        await settle_down()

    # Whole holds, up to the bound.
    assert account.asked == [(30, 30), (30, 30), (30, 60), (30, 120)]


async def test_a_slice_lasts_for_two_periods_and_is_of_whole_holds() -> None:
    account, clock = Account(1000), FakeClock()
    book = book_of(account, clock)
    await warm_up(book, clock, 32)

    holds = [await book.reserve(ACCOUNT, nanos) for nanos in (32, 30)]

    assert account.asked == [(32, 32), (30, 90)]
    assert len({hold.slice.slice_id for hold in holds}) == 2


async def test_the_next_slice_comes_in_the_background_when_half_is_used() -> None:
    account, clock = Account(1000), FakeClock()
    book = book_of(account, clock, slice_nanos=400)
    await warm_up(book, clock, 100)
    await book.reserve(ACCOUNT, 100)
    assert account.asked == [(100, 100)]
    account.gate = asyncio.Event()

    await settle_down()
    first = await book.reserve(ACCOUNT, 0)
    await settle_down()
    assert account.asked == [(100, 100), (200, 200)]
    account.gate.set()
    await settle_down()
    second = await book.reserve(ACCOUNT, 100)

    assert first.slice is not second.slice
    assert account.asked[2:] == []


async def test_what_is_asked_for_in_advance_has_a_bound() -> None:
    account, clock = Account(10**6), FakeClock()
    book = book_of(account, clock, slice_nanos=150)
    await warm_up(book, clock, 140)
    await book.reserve(ACCOUNT, 140)

    await book.reserve(ACCOUNT, 50)

    assert account.asked[-1] == (50, 150)


async def test_near_the_floor_only_what_is_needed_is_asked_for() -> None:
    account, clock = Account(100), FakeClock()
    book = book_of(account, clock, slice_nanos=400)
    await warm_up(book, clock, 40)
    await book.reserve(ACCOUNT, 40)
    # Half is used, and the next slice is more than there is: then it is none.
    await book.reserve(ACCOUNT, 0)
    await settle_down()
    assert account.asked == [(40, 40), (80, 80)]

    await book.reserve(ACCOUNT, 40)

    assert account.asked[-1] == (40, 40)
    assert account.available == 20
    clock.advance(NEAR_FLOOR_S)
    account.available = 1000
    await book.reserve(ACCOUNT, 40)
    await settle_down()
    assert account.asked[-1] == (40, 40), "the demand of that time is too old by now"


async def test_a_burst_takes_the_credit_for_exactly_as_many_as_it_pays_for() -> None:
    for known in (0, 10, 70):
        account, clock = Account(23 * 10), FakeClock()
        book = book_of(account, clock, slice_nanos=100)
        if known:
            await warm_up(book, clock, known)

        ends = await asyncio.gather(
            *(book.reserve(ACCOUNT, 10) for _ in range(256)), return_exceptions=True
        )

        admitted = [end for end in ends if isinstance(end, Hold)]
        assert len(admitted) == 23, known
        assert {type(end) for end in ends} == {Hold, FailedPrecondition}
        # Those who waited were refused together.
        assert len(account.asked) < 23


async def test_a_purse_spends_its_own_slices_only() -> None:
    account = Account(1000)
    book = book_of(account, FakeClock())
    first = await book.reserve(PROJECT, 10)
    book.release(first)

    second = await book.reserve(ACCOUNT, 10)

    assert (first.slice.purse, second.slice.purse) == (PROJECT, ACCOUNT)
    assert first.slice.account == second.slice.account == "accounts/dev"


async def test_what_another_purse_of_the_account_does_not_use_is_given_back_first() -> None:
    account = Account(100)
    book = book_of(account, FakeClock())
    book.release(await book.reserve(PROJECT, 60))

    hold = await book.reserve(ACCOUNT, 100)

    assert hold.nanos == 100


async def test_a_spend_limit_that_is_reached_says_when_to_come_back() -> None:
    account = Account(100)
    account.refusal = ResourceExhausted(
        "the limit is reached",
        reason=Reason.SPEND_LIMIT_REACHED,
        metadata={"limit": "limits/l"},
        retry_after_s=77.0,
    )
    book = book_of(account, FakeClock())

    with pytest.raises(ResourceExhausted) as refused:
        await book.reserve(ACCOUNT, 10)

    assert refused.value.retry_after_s == 77.0
    # It is sure that nothing is held: there is nothing to give back.
    await book.close_idle(0.0)
    assert account.granted == {}
    assert book._orphans == []


async def test_a_lease_that_was_cut_to_the_end_of_a_window_is_not_prolonged() -> None:
    account, clock = Account(1000, lease_s=10.0), FakeClock()
    book = book_of(account, clock)
    cut = await book.reserve(ACCOUNT, 10)
    book.release(cut)
    account.lease_s = 60.0

    book.renewed([cut.slice.slice_id], clock.monotonic_s(), 60.0)
    clock.advance(9)
    following = await book.reserve(ACCOUNT, 10)

    assert following.slice is not cut.slice


async def test_a_slice_of_a_window_is_replaced_when_its_lease_ends() -> None:
    """A settlement says how long leases are, and not when the window of this one ends."""
    account, clock = Account(1000), FakeClock()
    book = book_of(account, clock)
    limited = Purse("accounts/dev", is_limited=True)
    first = await book.reserve(limited, 10)
    book.release(first)
    clock.advance(50)
    book.renewed([first.slice.slice_id], clock.monotonic_s(), 60.0)

    again = await book.reserve(limited, 10)
    book.release(again)
    clock.advance(9)
    following = await book.reserve(limited, 10)

    assert again.slice is first.slice
    assert following.slice is not first.slice


async def test_after_the_end_nothing_is_asked_for_in_advance() -> None:
    account, clock = Account(1000), FakeClock()
    book = book_of(account, clock, slice_nanos=400)
    await warm_up(book, clock, 100)
    await book.reserve(ACCOUNT, 100)
    account.gate = asyncio.Event()
    await book.reserve(ACCOUNT, 0)
    await settle_down()

    assert not await book.close_all()
    account.gate.set()
    await settle_down()
    assert await book.close_all()
    assert account.available == 900


async def test_a_large_request_gets_a_slice_of_its_size() -> None:
    account = Account(1000)
    book = book_of(account, FakeClock())

    hold = await book.reserve(ACCOUNT, 700)

    assert hold.nanos == 700
    assert account.available == 300


async def test_no_credit_is_refused_and_holds_nothing() -> None:
    account = Account(10)
    book = book_of(account, FakeClock())

    with pytest.raises(FailedPrecondition):
        await book.reserve(ACCOUNT, 11)
    assert account.available == 10
    assert book.open_ids() == []


async def test_rests_of_own_slices_are_given_back_before_a_refusal() -> None:
    account = Account(100)
    book = book_of(account, FakeClock(), slice_nanos=60)
    first = await book.reserve(ACCOUNT, 10)
    book.release(first)

    hold = await book.reserve(ACCOUNT, 100)

    assert hold.nanos == 100
    assert account.available == 0


async def test_surplus_returns_and_owed_money_stays_until_it_is_settled() -> None:
    account, clock = Account(100), FakeClock()
    book = book_of(account, clock)
    hold = await book.reserve(ACCOUNT, 80)

    book.shrink(hold, 50)
    book.owe(hold, 20)
    clock.advance(10)

    assert await book.close_idle(2.0) == 0
    account.settle(hold.slice.slice_id, 20)
    book.settled(hold.slice.slice_id, 20)
    assert await book.close_idle(2.0) == 1
    assert account.available == 80


async def test_a_slice_at_the_end_of_its_lease_is_not_used() -> None:
    account, clock = Account(1000), FakeClock()
    book = book_of(account, clock)
    first = await book.reserve(ACCOUNT, 10)

    clock.advance(58.5)
    second = await book.reserve(ACCOUNT, 10)
    book.release(second)
    book.renewed([second.slice.slice_id], clock.monotonic_s(), 60.0)
    clock.advance(57)
    third = await book.reserve(ACCOUNT, 10)

    assert first.slice is not second.slice
    assert third.slice is second.slice


async def test_a_lost_slice_is_not_used() -> None:
    account = Account(1000)
    book = book_of(account, FakeClock())
    first = await book.reserve(ACCOUNT, 10)

    book.lost([first.slice.slice_id])
    second = await book.reserve(ACCOUNT, 10)

    assert second.slice is not first.slice


async def test_an_answer_that_never_came_is_given_back() -> None:
    account, clock = Account(100), FakeClock()
    account.gate = asyncio.Event()
    book = book_of(account, clock)
    waiting = asyncio.create_task(book.reserve(ACCOUNT, 10))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    # It was granted all the same.
    account.granted["s0"] = 100
    account.available = 0

    await book.close_idle(2.0)

    assert account.available == 100


async def test_no_more_is_asked_for_while_many_answers_are_missing() -> None:
    """While billing is away each request would add one more to be given back."""
    account = Account(1000, is_away=True)
    book = book_of(account, FakeClock())

    for _ in range(60):
        with pytest.raises(Unavailable):
            await book.reserve(ACCOUNT, 10)
    assert len(account.asked) == len(book._orphans) == 50

    account.is_away = False
    await book.close_idle(2.0)
    assert book._orphans == []
    assert (await book.reserve(ACCOUNT, 10)).nanos == 10


async def test_an_answer_that_is_lost_while_others_are_given_back_is_given_back_too() -> None:
    account, clock = Account(1000), FakeClock()
    book = book_of(account, clock)
    account.is_away = True
    for _ in range(2):
        with pytest.raises(Unavailable):
            await book.reserve(ACCOUNT, 10)
    closed: list[str] = []
    gate = asyncio.Event()

    async def close(slice_ids: list[str]) -> None:
        await gate.wait()
        closed.extend(slice_ids)

    book._close = close
    # The settler's round and the end of the process, at the same time.
    rounds = [asyncio.create_task(book.close_idle(0.0)) for _ in range(2)]
    await settle_down()
    with pytest.raises(Unavailable):
        await book.reserve(ACCOUNT, 10)
    gate.set()
    await asyncio.gather(*rounds)
    await book.close_idle(0.0)

    assert set(closed) == {"s0", "s1", "s2"}


async def test_a_hold_does_not_grow_on_a_slice_that_is_lost() -> None:
    account, clock = Account(1000), FakeClock()
    book = book_of(account, clock)
    await warm_up(book, clock, 50)
    hold = await book.reserve(ACCOUNT, 10)
    assert hold.slice.free > 0

    book.lost([hold.slice.slice_id])

    # Billing has the rest back, or will soon.
    assert not book.try_grow(hold, 1)


async def test_billing_away_keeps_idle_slices_for_the_next_try() -> None:
    account, clock = Account(100), FakeClock()
    book = book_of(account, clock)
    book.release(await book.reserve(ACCOUNT, 10))
    clock.advance(3)
    account.is_away = True

    with pytest.raises(Unavailable):
        await book.close_idle(2.0)
    account.is_away = False

    assert await book.close_idle(2.0) == 1
    assert account.available == 100


async def test_requests_that_wait_together_share_one_new_slice() -> None:
    account = Account(1000)
    account.gate = asyncio.Event()
    book = book_of(account, FakeClock())
    tasks = [asyncio.create_task(book.reserve(ACCOUNT, 10)) for _ in range(10)]
    await asyncio.sleep(0)

    account.gate.set()
    holds = await asyncio.gather(*tasks)

    assert account.asked == [(10, 10), (10, 90)]
    assert len({hold.slice.slice_id for hold in holds}) == 2


async def test_slices_are_bounded() -> None:
    account = Account(10**6)
    book = book_of(account, FakeClock(), slice_nanos=1)
    for _ in range(50):
        await book.reserve(ACCOUNT, 1)

    with pytest.raises(ResourceExhausted):
        await book.reserve(ACCOUNT, 1)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["reserve", "release", "owe", "settle", "idle"]), st.integers(0, 120)
        ),
        max_size=40,
    )
)
def test_money_is_neither_made_nor_lost(steps: list[tuple[str, int]]) -> None:
    """After everything has ended and settled, only what was owed is gone."""

    async def scenario() -> None:
        account, clock = Account(500), FakeClock()
        book = book_of(account, clock)
        holds: list[Hold] = []
        owed: list[tuple[str, int]] = []
        spent = 0

        def settle_all() -> None:
            for slice_id, nanos in owed:
                account.settle(slice_id, nanos)
                book.settled(slice_id, nanos)
            owed.clear()

        for kind, amount in steps:
            if kind == "reserve":
                try:
                    holds.append(await book.reserve(ACCOUNT, amount))
                except FailedPrecondition:
                    assert amount > account.available
            elif kind == "release" and holds:
                book.release(holds.pop())
            elif kind == "owe" and holds:
                hold = holds.pop()
                nanos = min(amount, hold.nanos)
                book.owe(hold, nanos)
                owed.append((hold.slice.slice_id, nanos))
                spent += nanos
            elif kind == "settle":
                settle_all()
            elif kind == "idle":
                clock.advance(3)
                await book.close_idle(2.0)
            assert account.available >= 0
        for hold in holds:
            book.release(hold)
        settle_all()
        await book.close_idle(0.0)
        assert account.available == 500 - spent
        assert account.granted == {}

    asyncio.run(scenario())
