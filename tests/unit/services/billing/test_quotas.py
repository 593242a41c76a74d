"""Buckets of quota and shares of places: arithmetic only."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.billing.limits import PER_MINUTE_MAX
from services.billing.quotas import (
    MICROSECOND,
    UNIT,
    Bucket,
    Claim,
    Refusal,
    Wish,
    grants_of,
    places_of,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
RATES = st.one_of(st.integers(1, 200), st.integers(1, PER_MINUTE_MAX))


def empty() -> Bucket:
    return Bucket(0, START)


def wish(bucket: Bucket, required: int, *, per_minute: int, wanted: int = 0) -> Wish:
    return Wish(bucket=bucket, per_minute=per_minute, required=required, wanted=wanted)


def later(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


@pytest.mark.parametrize("per_minute", [1, 7, 60, 59_999, PER_MINUTE_MAX])
def test_a_minutes_worth_may_come_at_once_and_nothing_more(per_minute: int) -> None:
    full = empty().taken("g", per_minute)

    assert grants_of([wish(empty(), per_minute, per_minute=per_minute)]) == [per_minute]
    assert isinstance(grants_of([wish(full, 1, per_minute=per_minute)]), Refusal)


def test_seven_requests_a_minute_come_one_by_one_without_rounding() -> None:
    """A seventh of a minute is no whole number of microseconds."""
    bucket = empty()
    for _ in range(7):
        assert grants_of([wish(bucket, 1, per_minute=7)]) == [1]
        bucket = bucket.taken("g", 1)

    refused = grants_of([wish(bucket, 1, per_minute=7)])

    assert refused == Refusal(0, timedelta(microseconds=8_571_429))
    assert not wish(bucket.drained(later(8.571429), per_minute=7), 1, per_minute=7).wait


@given(per_minute=RATES, data=st.data())
def test_refusal_says_the_very_microsecond_at_which_it_fits(
    per_minute: int, data: st.DataObject
) -> None:
    taken = data.draw(st.integers(1, per_minute))
    required = data.draw(st.integers(per_minute - taken + 1, per_minute))
    bucket = empty().taken("g", taken)

    refused = grants_of([wish(bucket, required, per_minute=per_minute)])

    assert isinstance(refused, Refusal)
    there = bucket.drained(START + refused.wait, per_minute=per_minute)
    before = bucket.drained(START + refused.wait - MICROSECOND, per_minute=per_minute)
    assert isinstance(grants_of([wish(there, required, per_minute=per_minute)]), list)
    assert isinstance(grants_of([wish(before, required, per_minute=per_minute)]), Refusal)


def test_of_several_the_longest_wait_counts_and_nothing_is_granted() -> None:
    low = empty().taken("g", 59)
    full = empty().taken("g", 60)

    refused = grants_of([wish(low, 1, per_minute=60), wish(full, 2, per_minute=60)])

    assert refused == Refusal(1, timedelta(seconds=2))


@pytest.mark.parametrize(
    ("required", "wanted", "granted"),
    [(1, 0, 1), (1, 5, 5), (1, 1000, 11), (0, 1000, 10), (590, 1000, 600), (600, 600, 600)],
)
def test_grant_is_at_most_a_second_of_the_rate_beyond_what_is_required(
    required: int, wanted: int, granted: int
) -> None:
    assert grants_of([wish(empty(), required, per_minute=600, wanted=wanted)]) == [granted]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["take", "back", "wait"]),
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 400),
    ),
    max_size=60,
)


@settings(max_examples=60)
@given(per_minute=st.integers(1, 300), steps=STEPS)
def test_no_history_gets_more_than_a_burst_and_the_rate(
    per_minute: int, steps: list[tuple[str, str, int]]
) -> None:
    """Taken less given back never exceeds a minute's worth and what has drained."""
    bucket, now, net = empty(), START, 0
    had = dict.fromkeys("abc", 0)
    for kind, holder, count in steps:
        if kind == "wait":
            now += timedelta(milliseconds=count * 100)
        bucket = bucket.drained(now, per_minute=per_minute)
        if kind == "take":
            grants = grants_of([wish(bucket, count, per_minute=per_minute, wanted=2 * count)])
            if isinstance(grants, list):
                bucket = bucket.taken(holder, grants[0])
                net += grants[0] * UNIT
                had[holder] += grants[0] * UNIT
        if kind == "back":
            level = bucket.level
            bucket = bucket.given_back(holder, count)
            net -= level - bucket.level
            had[holder] -= level - bucket.level
        assert 0 <= sum(bucket.shares.values()) <= bucket.level <= per_minute * UNIT
        assert net <= per_minute * UNIT + (now - START) // MICROSECOND * per_minute
        assert min(had.values()) >= 0


def test_what_was_given_back_twice_comes_back_once() -> None:
    bucket = empty().taken("a", 40).taken("b", 20)

    once = bucket.given_back("a", 40)
    twice = once.given_back("a", 40)

    assert once.level == 20 * UNIT
    assert twice == once
    assert twice.shares == {"b": 20 * UNIT}


def test_what_has_flowed_back_by_itself_cannot_be_given_back() -> None:
    bucket = empty().taken("a", 40).taken("b", 20).drained(later(30), per_minute=60)

    assert bucket.level == 30 * UNIT
    assert bucket.shares == {"a": 20 * UNIT, "b": 10 * UNIT}
    assert bucket.given_back("a", 40).level == 10 * UNIT
    assert bucket.drained(later(60), per_minute=60) == Bucket(0, later(60), {})


def test_time_that_goes_back_drains_nothing() -> None:
    bucket = empty().taken("a", 40).drained(later(10), per_minute=60)

    assert bucket.drained(later(5), per_minute=60) == bucket


def test_lowered_limit_leaves_a_full_bucket_and_no_more() -> None:
    bucket = empty().taken("a", 600).drained(later(0), per_minute=60)

    assert bucket.level == 60 * UNIT
    assert wish(bucket, 1, per_minute=60).wait == timedelta(seconds=1)


@given(per_minute=RATES, taken=st.integers(0, PER_MINUTE_MAX), wanted=st.integers(0, 1000))
@settings(max_examples=50)
def test_who_requires_nothing_is_never_refused(per_minute: int, taken: int, wanted: int) -> None:
    """So do gateways fill what runs low; also when the limit was lowered meanwhile."""
    bucket = empty().taken("g1", taken).drained(START, per_minute=per_minute)

    grants = grants_of([wish(bucket, 0, per_minute=per_minute, wanted=wanted)])

    assert grants == [min(wanted, max(per_minute - taken, 0), per_minute // 60)]


def claim(holder: str, *, held: int = 0, in_use: int = 0, wanted: int = 0) -> Claim:
    return Claim(holder=holder, held=held, in_use=in_use, wanted=wanted)


def test_alone_one_gets_what_it_wants_as_far_as_it_is_there() -> None:
    assert places_of(claim("a", wanted=3), [], total=10) == 3
    assert places_of(claim("a", wanted=30), [], total=10) == 10
    assert places_of(claim("a", in_use=4), [], total=10) == 4


def test_more_than_there_is_gets_shared_and_what_is_used_is_kept() -> None:
    busy = claim("a", held=10, in_use=8, wanted=10)
    fresh = claim("b", wanted=10)

    # First a gives back what it may not keep, then b has it.
    assert places_of(fresh, [busy], total=10) == 0
    assert places_of(busy, [fresh], total=10) == 9
    assert places_of(fresh, [claim("a", held=9, in_use=8, wanted=10)], total=10) == 1


def test_what_one_does_not_want_others_share() -> None:
    small, middle = claim("a", held=1, wanted=1), claim("b", held=3, wanted=3)

    assert places_of(claim("c", wanted=90), [small, middle], total=10) == 6


def test_lowered_limit_takes_nothing_that_is_used() -> None:
    assert places_of(claim("a", held=8, in_use=6, wanted=8), [], total=5) == 6
    assert places_of(claim("b", wanted=1), [claim("a", held=6, in_use=6)], total=5) == 0


def test_lost_lease_is_held_again_as_far_as_places_are_left() -> None:
    other = claim("b", held=7, in_use=7, wanted=7)

    assert places_of(claim("a", in_use=5, wanted=5), [other], total=10) == 3


PLACE_STEPS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 12), st.integers(0, 12)), max_size=40
)


@settings(max_examples=60)
@given(total=st.integers(1, 12), steps=PLACE_STEPS)
def test_together_they_never_have_more_places_than_there_are(
    total: int, steps: list[tuple[str, int, int]]
) -> None:
    claims = {holder: claim(holder) for holder in "abc"}
    for holder, wanted, started in steps:
        before = claims[holder]
        in_use = min(started, before.held)
        asked = claim(holder, held=before.held, in_use=in_use, wanted=wanted)
        others = [other for other in claims.values() if other.holder != holder]
        held = places_of(asked, others, total=total)
        assert held >= in_use
        claims[holder] = claim(holder, held=held, in_use=in_use, wanted=wanted)
        assert sum(item.held for item in claims.values()) <= total
    # Renewed twice, nobody waits for what somebody else does not need.
    for _ in range(2):
        for holder, asked in claims.items():
            others = [other for other in claims.values() if other.holder != holder]
            held = places_of(asked, others, total=total)
            claims[holder] = claim(holder, held=held, in_use=asked.in_use, wanted=asked.wanted)
    wanted = sum(max(item.wanted, item.in_use) for item in claims.values())
    assert sum(item.held for item in claims.values()) == min(total, wanted)
