"""What expires of which grants, and what a new one has left."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.billing.domain import Balance, GrantKind
from services.billing.grants import Grant, expired_parts, next_expiry, remaining_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PAST = NOW - timedelta(seconds=1)
LATER = NOW + timedelta(seconds=1)


def grant(
    number: int, remaining: int, *, expire_time: datetime | None = None, priority: int = 50
) -> Grant:
    return Grant(
        account_id="acme",
        grant_id=f"g{number}",
        number=number,
        kind=GrantKind.GIFT,
        amount=remaining,
        remaining=remaining,
        priority=priority,
        expire_time=expire_time,
        create_time=NOW,
        description="",
    )


def held(nanos: int) -> Callable[[datetime], int]:
    """All slices are older than any expiry."""
    return lambda _: nanos


def parts(grants: list[Grant], *, since: int, now_held: int | None = None) -> list[tuple[str, int]]:
    balance = Balance(
        account_id="acme",
        posted=sum(item.remaining for item in grants),
        held=since if now_held is None else now_held,
    )
    found = expired_parts(balance, grants, now=NOW, held_since=held(since))
    return [(item.grant_id, part) for item, part in found]


def test_what_nobody_holds_expires_at_its_moment() -> None:
    grants = [grant(1, 40), grant(2, 60, expire_time=NOW), grant(3, 5, expire_time=LATER)]

    assert parts(grants, since=0) == [("g2", 60)]


def test_slices_hold_what_is_used_up_first() -> None:
    first = grant(1, 40, priority=0)
    expired = grant(2, 60, expire_time=PAST)

    assert parts([first, expired], since=40) == [("g2", 60)]
    assert parts([first, expired], since=55) == [("g2", 45)]
    assert parts([expired, grant(3, 10)], since=55) == [("g2", 5)]
    assert parts([first, expired], since=100) == []


def test_grants_that_have_expired_share_what_is_held() -> None:
    grants = [grant(1, 30, expire_time=PAST), grant(2, 30, expire_time=NOW)]

    assert parts(grants, since=40) == [("g2", 20)]


@given(
    st.lists(
        st.tuples(st.integers(1, 50), st.sampled_from([None, PAST, NOW, LATER]), st.integers(0, 2)),
        max_size=6,
    ),
    st.integers(0, 200),
    st.integers(0, 200),
    st.integers(0, 60),
)
def test_expiry_never_takes_what_is_held_or_beyond_the_limit(
    drawn: list[tuple[int, datetime | None, int]], old: int, young: int, limit: int
) -> None:
    grants = [
        grant(number, remaining, expire_time=time, priority=priority)
        for number, (remaining, time, priority) in enumerate(drawn)
    ]
    posted = sum(item.remaining for item in grants)
    room = posted + limit
    now_held = min(old + young, room)
    balance = Balance(account_id="acme", posted=posted, held=now_held, credit_limit=limit)

    found = expired_parts(balance, grants, now=NOW, held_since=held(min(old, now_held)))

    taken = sum(part for _, part in found)
    assert posted - taken - now_held >= -limit
    for item, part in found:
        assert item.expire_time is not None
        assert item.expire_time <= NOW
        assert 0 < part <= item.remaining
    kept = sum(item.remaining for item in grants if item.expire_time in {PAST, NOW}) - taken
    # What stays of them is held by somebody, or there is nothing else to set aside either.
    assert kept <= min(old, now_held) or posted - taken - now_held == -limit


@given(st.integers(-100, 100), st.lists(st.integers(1, 50), max_size=5))
def test_grants_have_left_what_is_posted(posted: int, amounts: list[int]) -> None:
    before = max(0, posted)
    remaining = 0
    for amount in amounts:
        remaining += remaining_of(posted, amount)
        posted += amount

    assert before + remaining == max(0, posted)


def test_the_next_expiry_is_the_first_of_them() -> None:
    assert next_expiry([grant(1, 1), grant(2, 1, expire_time=LATER)]) == LATER
    assert next_expiry([grant(1, 1)]) is None
