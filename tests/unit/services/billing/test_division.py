from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.units import Nanos
from services.billing.division import Division, Head, amount_of, divide, movement
from services.billing.domain import (
    BAD_DEBT,
    REVENUE,
    Balance,
    EndCause,
    EntryKind,
    Price,
    Settlement,
    Slice,
    SliceState,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def settlement(
    generation_id: str = "g",
    *,
    slice_id: str = "s",
    account_id: str = "acme",
    end_cause: EndCause = EndCause.COMPLETED,
) -> Settlement:
    return Settlement(
        generation_id=generation_id,
        slice_id=slice_id,
        account_id=account_id,
        project_id="demo",
        api_key_id="key",
        offering_id="tiny",
        model_id="tiny",
        version_id="1",
        price_id="p",
        input_tokens=1,
        output_tokens=3,
        end_cause=end_cause,
        start_time=NOW,
        end_time=NOW,
    )


def slice_of(
    granted: int,
    *,
    slice_id: str = "s",
    account_id: str | None = "acme",
    state: SliceState = SliceState.OPEN,
    consumed: int = 0,
) -> Slice:
    return Slice(
        slice_id=slice_id,
        account_id=account_id,
        holder="gateway",
        granted=granted,
        consumed=consumed,
        state=state,
        is_leased=True,
    )


def divided(
    amounts: list[int], *, posted: int, held: int = 0, found: Slice | None = None
) -> Division:
    return divide(
        [(settlement(f"g{index}"), Nanos(amount)) for index, amount in enumerate(amounts)],
        balances={"acme": Balance(account_id="acme", posted=posted, held=held)},
        slices={} if found is None else {found.slice_id: found},
        head=Head(entry_count=10, record_count=5),
        now=NOW,
    )


@pytest.mark.parametrize("cause", list(EndCause))
def test_amount_is_the_price_of_each_line_or_nothing(cause: EndCause) -> None:
    price = Price(
        price_id="p",
        offering_id="tiny",
        input_price=1,
        output_price=2_000_000,
        effective_time=NOW,
        create_time=NOW,
    )

    assert amount_of(settlement(end_cause=cause), price.rates) == (7 if cause.is_charged else 0)


def test_slice_pays() -> None:
    got = divided([30, 20], posted=100, held=60, found=slice_of(60))

    assert got.consumed == {"s": 50}
    assert got.posted_taken == {"acme": 50}
    assert got.held_taken == {"acme": 50}
    assert got.late == []


def test_settlements_of_a_batch_share_what_the_slice_has() -> None:
    got = divided([30, 40], posted=100, held=60, found=slice_of(60))

    assert got.consumed == {"s": 60}
    assert got.posted_taken == {"acme": 70}
    assert got.held_taken == {"acme": 60}
    assert got.late == got.records[1:]
    assert [record.shortfall for record in got.records] == [0, 0]


def test_numbers_follow_the_head() -> None:
    got = divided([30, 0, 20], posted=100, held=60, found=slice_of(60))

    assert [record.number for record in got.records] == [6, 7, 8]
    assert [entry.number for entry in got.entries] == [11, 12, 13, 14]
    assert [entry.transaction_number for entry in got.entries] == [11, 11, 13, 13]
    assert [(entry.account_id, entry.amount) for entry in got.entries] == [
        ("acme", -30),
        (REVENUE, 30),
        ("acme", -20),
        (REVENUE, 20),
    ]


@pytest.mark.parametrize(
    "found",
    [
        None,
        slice_of(60, state=SliceState.CLOSED),
        slice_of(60, state=SliceState.RECLAIMED),
        slice_of(60, account_id="other"),
        slice_of(0, account_id=None, state=SliceState.CLOSED),
        slice_of(60, consumed=60),
    ],
)
def test_without_a_slice_the_account_pays_then_bad_debt(found: Slice | None) -> None:
    got = divided([30, 30, 30], posted=50, held=10, found=found)

    assert got.consumed == {}
    assert got.held_taken == {}
    assert got.posted_taken == {"acme": 40}
    assert [(record.amount, record.shortfall) for record in got.records] == [
        (30, 0),
        (30, 20),
        (30, 30),
    ]
    assert got.late == got.records
    assert [(entry.account_id, entry.amount) for entry in got.entries] == [
        ("acme", -30),
        (REVENUE, 30),
        ("acme", -10),
        (BAD_DEBT, -20),
        (REVENUE, 30),
        (BAD_DEBT, -30),
        (REVENUE, 30),
    ]


def test_movement_that_does_not_sum_to_zero_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        movement(
            [("acme", 1), (REVENUE, 1)],
            number=1,
            kind=EntryKind.USAGE,
            source="g",
            description="",
            now=NOW,
        )


SLICES = st.builds(
    slice_of,
    st.integers(50, 100),
    slice_id=st.sampled_from("stu"),
    account_id=st.sampled_from("ab"),
    state=st.sampled_from(SliceState),
    consumed=st.integers(0, 50),
)
ITEMS = st.tuples(st.sampled_from("stuv"), st.sampled_from("ab"), st.integers(0, 80))


@given(
    st.lists(SLICES, max_size=3, unique_by=lambda item: item.slice_id),
    st.lists(ITEMS, max_size=12),
    st.integers(0, 100),
    st.integers(0, 50),
)
def test_nothing_is_lost_and_no_floor_is_crossed(
    slices: list[Slice], items: list[tuple[str, str, int]], spare: int, limit: int
) -> None:
    """Whatever the batch: entries sum to zero, and the database's checks would hold."""
    held: Counter[str] = Counter()
    for item in slices:
        held[item.account_id or ""] += item.remaining
    balances = {
        name: Balance(
            account_id=name,
            posted=held[name] + spare - limit,
            held=held[name],
            credit_limit=limit,
        )
        for name in "ab"
    }
    wanted = [
        (settlement(f"g{index}", slice_id=slice_id, account_id=name), Nanos(amount))
        for index, (slice_id, name, amount) in enumerate(items)
    ]

    got = divide(
        wanted,
        balances=balances,
        slices={item.slice_id: item for item in slices},
        head=Head(entry_count=0, record_count=0),
        now=NOW,
    )

    by_account: Counter[str] = Counter()
    for entry in got.entries:
        by_account[entry.account_id] += entry.amount
    assert by_account.total() == 0
    assert by_account[REVENUE] == sum(amount for _, _, amount in items)
    for name, before in balances.items():
        assert by_account[name] == -got.posted_taken.get(name, 0)
        posted = before.posted - got.posted_taken.get(name, 0)
        left = before.held - got.held_taken.get(name, 0)
        assert left >= 0
        assert posted - left >= -limit
        # Bad debt only when the account has nothing more to give.
        if any(record.shortfall for record in got.records if record.settlement.account_id == name):
            assert posted - left == -limit
    for item in slices:
        assert got.consumed.get(item.slice_id, 0) <= item.remaining
    assert sum(got.consumed.values()) == sum(got.held_taken.values())
