"""The book of credit slices against a small account that keeps the truth."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.errors import FailedPrecondition, Reason, ResourceExhausted, Unavailable, unavailable
from libs.testing import FakeClock
from services.gateway.slices import Grant, Hold, SliceBook

ACCOUNT = "accounts/dev"


@dataclass
class Account:
    """What billing does, for one account."""

    available: int
    granted: dict[str, int] = field(default_factory=dict)
    is_away: bool = False
    gate: asyncio.Event | None = None

    async def acquire(self, slice_id: str, account: str, required: int, wanted: int) -> Grant:
        assert account == ACCOUNT
        if self.gate is not None:
            await self.gate.wait()
        if self.is_away:
            raise unavailable("billing")
        if self.available < required:
            raise FailedPrecondition("no credit", reason=Reason.INSUFFICIENT_CREDIT)
        grant = min(wanted, self.available)
        self.available -= grant
        self.granted[slice_id] = grant
        return Grant(grant, 60.0)

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
        slice_nanos=slice_nanos,
        slices_max=50,
    )


async def test_one_slice_serves_many_holds() -> None:
    account, clock = Account(1000), FakeClock()
    book = book_of(account, clock)

    holds = [await book.reserve(ACCOUNT, 30) for _ in range(3)]

    assert len({hold.slice.slice_id for hold in holds}) == 1
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
    book.renewed([second.slice.slice_id], clock.monotonic_s() + 100)
    clock.advance(59)
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


async def test_concurrent_requests_share_one_new_slice() -> None:
    account = Account(1000)
    account.gate = asyncio.Event()
    book = book_of(account, FakeClock())
    tasks = [asyncio.create_task(book.reserve(ACCOUNT, 10)) for _ in range(10)]
    await asyncio.sleep(0)

    account.gate.set()
    holds = await asyncio.gather(*tasks)

    assert len({hold.slice.slice_id for hold in holds}) == 1


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
