from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest
from maas.billing.v1 import ledger_pb2

from libs.errors import FailedPrecondition, InvalidArgument, Reason
from services.billing.domain import (
    CHARGE_RULES,
    Balance,
    EndCause,
    EntryKind,
    Posting,
    Price,
    Settlement,
    Slice,
    SliceState,
    check_posting,
    grant_of,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
NANOS_MAX = 2**63 - 1


def balance(posted: int, held: int = 0, limit: int = 0) -> Balance:
    return Balance(account_id="acme", posted=posted, held=held, credit_limit=limit)


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


@pytest.mark.parametrize(
    ("cause", "is_charged"),
    [
        # The client's own ends: it has what was released, and pays for it.
        (EndCause.COMPLETED, True),
        (EndCause.CLIENT_CANCELLED, True),
        (EndCause.DEADLINE, True),
        (EndCause.STALLED, True),
        (EndCause.REVOKED, True),
        # Ours.
        (EndCause.WORKER_LOST, False),
        (EndCause.ENGINE_FAILURE, False),
        (EndCause.GATEWAY_LOST, False),
    ],
)
def test_every_end_has_its_rule(cause: EndCause, is_charged: bool) -> None:  # noqa: FBT001 - a table's column
    assert cause.is_charged is is_charged


def test_the_written_policy_has_every_end_and_says_why() -> None:
    assert set(CHARGE_RULES) == set(EndCause)
    assert all(rule.why for rule in CHARGE_RULES.values())
    in_contract = {number for number in ledger_pb2.EndCause.values() if number}
    assert {cause.value for cause in EndCause} == in_contract


@pytest.mark.parametrize(
    ("posted", "held", "limit", "available"),
    [
        (100, 30, 0, 70),
        (100, 0, 40, 140),
        (-50, 0, 100, 50),
        (0, 0, 0, 0),
        # The limit was lowered below what is used.
        (-50, 10, 20, 0),
    ],
)
def test_available_is_what_is_neither_held_nor_beyond_the_credit_limit(
    posted: int, held: int, limit: int, available: int
) -> None:
    assert balance(posted, held, limit).available == available


def test_what_has_expired_is_not_available() -> None:
    found = dataclasses.replace(balance(100, 30), expired=50)

    assert found.available == 20


def test_nothing_of_the_ledgers_own_accounts_is_available() -> None:
    assert Balance(account_id="system-revenue", posted=100, held=0).available == 0


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


def test_money_can_be_given_to_an_account_that_is_below_its_limit() -> None:
    check_posting(posting(1), balance(-50, 10, 20))


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


def test_repeat_contradicts_the_first_when_what_is_charged_differs() -> None:
    first = settlement()

    for other in (
        first._replace(output_tokens=2),
        first._replace(reasoning_tokens=1),
        first._replace(end_cause=EndCause.STALLED),
        first._replace(is_background=True),
        first._replace(price_id="q"),
    ):
        assert other.counts != first.counts
    assert first._replace(slice_id="t", engine_time_us=5).counts == first.counts


def settlement() -> Settlement:
    return Settlement(
        generation_id="g",
        slice_id="s",
        account_id="acme",
        project_id="demo",
        api_key_id="key",
        offering_id="tiny",
        model_id="tiny",
        version_id="1",
        price_id="p",
        input_tokens=1,
        output_tokens=3,
        end_cause=EndCause.COMPLETED,
        start_time=NOW,
        end_time=NOW,
    )
