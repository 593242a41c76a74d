from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest

from libs.errors import FailedPrecondition, InvalidArgument, Reason
from services.billing.domain import (
    Balance,
    EndCause,
    EntryKind,
    Posting,
    Price,
    Slice,
    SliceState,
    check_posting,
    grant_of,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
NANOS_MAX = 2**63 - 1


def balance(posted: int, held: int = 0, floor: int = 0) -> Balance:
    return Balance(account_id="acme", posted=posted, held=held, floor=floor)


def posting(amount: int) -> Posting:
    return Posting(
        account_id="acme",
        amount=amount,
        kind=EntryKind.ADJUSTMENT,
        request_id="r",
        description="",
    )


def price(effective_time: datetime, create_time: datetime = NOW) -> Price:
    return Price(
        price_id="p",
        offering_id="tiny",
        input_price=1,
        output_price=2,
        effective_time=effective_time,
        create_time=create_time,
    )


def test_only_the_clients_own_ends_are_charged() -> None:
    assert {cause.name for cause in EndCause if cause.is_charged} == {
        "COMPLETED",
        "CLIENT_CANCELLED",
        "DEADLINE",
        "STALLED",
        "REVOKED",
    }


@pytest.mark.parametrize(
    ("posted", "held", "floor", "available"),
    [(100, 30, 0, 70), (100, 0, 40, 60), (-50, 0, -100, 50), (0, 0, 0, 0)],
)
def test_available_is_above_floor_and_held(
    posted: int, held: int, floor: int, available: int
) -> None:
    assert balance(posted, held, floor).available == available


@pytest.mark.parametrize(
    ("required", "wanted", "granted"),
    [(0, 0, 0), (10, 50, 50), (10, 500, 100), (60, 50, 60), (100, 100, 100)],
)
def test_grant_is_what_is_wanted_as_far_as_it_is_there(
    required: int, wanted: int, granted: int
) -> None:
    assert grant_of(balance(120, 20), required=required, wanted=wanted) == granted


def test_grant_below_what_is_required_is_refused() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        grant_of(balance(120, 20), required=101, wanted=500)

    assert caught.value.reason is Reason.INSUFFICIENT_CREDIT
    assert caught.value.metadata["requiredNanos"] == "101"
    assert caught.value.metadata["availableNanos"] == "100"


@pytest.mark.parametrize("amount", [1, -100, NANOS_MAX - 120])
def test_posting_that_fits(amount: int) -> None:
    check_posting(posting(amount), balance(120, 20))


def test_posting_below_what_is_held_is_refused() -> None:
    with pytest.raises(FailedPrecondition):
        check_posting(posting(-101), balance(120, 20))


def test_posting_beyond_64_bits_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        check_posting(posting(NANOS_MAX - 119), balance(120, 20))


@pytest.mark.parametrize("state", list(SliceState))
def test_only_open_and_expired_slices_hold_money(state: SliceState) -> None:
    found = Slice(
        slice_id="s",
        account_id="acme",
        holder="gateway",
        granted=100,
        consumed=30,
        state=state,
        is_leased=False,
    )

    assert found.remaining == (70 if state in {SliceState.OPEN, SliceState.EXPIRED} else 0)


@pytest.mark.parametrize(
    ("wanted", "stored", "is_repeat"),
    [
        (price(LATER), price(LATER), True),
        (price(LATER, LATER + timedelta(1)), price(LATER), True),
        # Neither said when: both are in force from their creation.
        (price(LATER, LATER), price(NOW), True),
        # One said when, the other did not.
        (price(LATER, LATER), price(LATER + timedelta(1)), False),
        (price(LATER), price(NOW), False),
    ],
)
def test_repeat_of_a_price(wanted: Price, stored: Price, is_repeat: bool) -> None:  # noqa: FBT001 - a table's column
    assert wanted.is_repeat_of(stored) is is_repeat
    assert not dataclasses.replace(wanted, input_price=7).is_repeat_of(stored)
