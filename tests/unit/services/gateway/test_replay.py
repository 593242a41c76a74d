"""The log of one generation, and the bytes of all logs."""

from __future__ import annotations

import sys
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway import frames
from services.gateway.replay import MERGED_MAX, UNBOUNDED, Budget, ReplayLog

# What the contract allows for one frame.
FRAME_MAX = 256 * 1024
deltas = st.lists(st.tuples(st.text(max_size=5), st.integers(0, 3)), max_size=60)


def filled(budget: Budget, bytes_max: int, rows: list[tuple[str, int]]) -> ReplayLog:
    """Makes a log of texts and their numbers of tokens."""
    log, count = ReplayLog(budget, bytes_max), 0
    for text, tokens in rows:
        count += tokens
        log.append(text, count)
    return log


@given(rows=deltas, first=st.integers(0, 59))
def test_reading_from_anywhere_gives_what_came_behind(
    rows: list[tuple[str, int]], first: int
) -> None:
    log = filled(Budget(10**9), 10**9, rows)
    if first >= len(rows):
        return

    read = log.read(first)

    assert read is not None
    assert (read.first, read.last) == (first, len(rows) - 1)
    assert read.text == "".join(text for text, _ in rows[first:])
    assert read.tokens_before == sum(tokens for _, tokens in rows[:first])
    assert read.tokens_after == sum(tokens for _, tokens in rows)


@given(rows=deltas, bytes_max=st.integers(0, 2000))
def test_an_outgrown_log_keeps_its_end_and_counts_right(
    rows: list[tuple[str, int]], bytes_max: int
) -> None:
    budget = Budget(10**9)
    log = filled(budget, bytes_max, rows)

    assert log.count == len(rows)
    assert 0 <= budget.used <= bytes_max
    for first in range(len(rows)):
        read = log.read(first)
        if read is not None:
            assert read.text == "".join(text for text, _ in rows[first:])
            assert read.tokens_before == sum(tokens for _, tokens in rows[:first])
            # What is kept is without a gap up to the end.
            assert all(log.read(later) is not None for later in range(first, len(rows)))


@given(rows=st.lists(deltas, max_size=4), bytes_max=st.integers(100, 2000))
def test_the_budget_is_what_all_logs_hold_and_nothing_stays(
    rows: list[list[tuple[str, int]]], bytes_max: int
) -> None:
    budget = Budget(1000)
    logs = [filled(budget, bytes_max, one) for one in rows]

    assert budget.is_exceeded == (budget.used > 1000)
    for log in logs:
        log.clear()
        log.clear()

    assert budget.used == 0


def test_a_replayed_frame_covers_a_bounded_number_of_deltas() -> None:
    log = filled(Budget(10**9), 10**9, [("x", 1)] * (MERGED_MAX + 10))

    first, second = log.read(0), log.read(MERGED_MAX)

    assert first is not None
    assert second is not None
    assert (first.last, first.tokens_after) == (MERGED_MAX - 1, MERGED_MAX)
    assert (second.first, second.tokens_before, second.text) == (MERGED_MAX, MERGED_MAX, "x" * 10)


def test_the_whole_text_is_refused_once_some_of_it_is_gone() -> None:
    log = filled(Budget(10**9), 200, [("x" * 50, 1), ("y" * 50, 1)])
    assert ReplayLog(Budget(1), 1).text() == ""

    with pytest.raises(ValueError, match="outgrown"):
        log.text()


@pytest.mark.parametrize(
    "text", ["", "x", "x" * 200, "\u00e9" * 200, "\u732b" * 200, "\U0001f431" * 200]
)
def test_what_is_counted_is_never_less_than_what_it_takes(text: str) -> None:
    budget = Budget(10**9)
    filled(budget, 10**9, [(text, 1)] * 1000)

    # The string itself, its place in the list, and its count.
    takes = sys.getsizeof(text) + 8 + array("Q").itemsize
    assert 1000 * takes <= budget.used <= 1000 * (4 * len(text) + 100)


def test_a_log_without_a_bound_of_its_own_keeps_all_and_counts_it() -> None:
    budget = Budget(1000)
    log = filled(budget, UNBOUNDED, [("x" * 1000, 1)] * 10)

    assert log.text() == "x" * 10_000
    assert budget.is_exceeded


@pytest.mark.parametrize(
    ("text", "tokens", "deltas_a_frame"),
    [("x" * 60_000, 1, 4), ("\u732b" * 20_000, 1, 4), ("x", 12_000, 4)],
)
def test_a_replayed_frame_is_as_large_as_the_contract_allows(
    text: str, tokens: int, deltas_a_frame: int
) -> None:
    log = filled(Budget(10**9), 10**9, [(text, tokens)] * 10)
    first = 0
    sizes = []
    while first < 10:
        read = log.read(first)
        assert read is not None
        frame = frames.delta(
            sequence=read.last + 2,
            first_sequence=read.first + 2,
            text=read.text,
            token_ids=[2**32 - 1] * (read.tokens_after - read.tokens_before),
            end=None,
            output_tokens=read.tokens_after,
        )
        assert len(frame.response) <= FRAME_MAX
        sizes.append(read.last - read.first + 1)
        first = read.last + 1

    assert sizes == [deltas_a_frame, deltas_a_frame, 10 - 2 * deltas_a_frame]


def test_a_delta_that_no_frame_can_hold_leaves_alone() -> None:
    log = filled(Budget(10**9), 10**9, [("a", 1), ("x" * FRAME_MAX, 1), ("b", 1)])

    reads = [log.read(number) for number in range(3)]

    assert [read is not None and (read.first, read.last) for read in reads] == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]
