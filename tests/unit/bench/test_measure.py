"""tests/bench/measure.py: what is computed of what was measured."""

from __future__ import annotations

import itertools
import statistics

import pytest

from tests.bench.measure import added, arrivals, middle, quantile, slope


@pytest.mark.parametrize(
    ("share", "want"), [(0, 1.0), (0.25, 2.0), (0.5, 3.0), (0.6, 3.4), (1, 5.0)]
)
def test_quantile_lies_between_neighbours(share: float, want: float) -> None:
    assert quantile([5.0, 1.0, 4.0, 2.0, 3.0], share) == pytest.approx(want)


def test_quantile_of_one_value_is_that_value() -> None:
    assert [quantile([7.0], share) for share in (0, 0.5, 0.99, 1)] == [7.0] * 4


def test_added_is_the_shift_of_a_distribution_whatever_its_order() -> None:
    bare = [8.0 + number % 9 for number in range(100)]
    whole = [value + 2.5 for value in reversed(bare)]

    assert added(whole, bare, 0.5) == pytest.approx(2.5)
    assert added(whole, bare, 0.99) == pytest.approx(2.5)


def test_arrivals_are_the_same_for_a_seed_and_keep_the_rate() -> None:
    moments = arrivals(4000, 20.0, seed=3)

    assert moments == arrivals(4000, 20.0, seed=3)
    assert moments != arrivals(4000, 20.0, seed=4)
    assert moments == sorted(moments)
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    # Of independent callers the gaps are spread as widely as they are long.
    assert statistics.fmean(gaps) == pytest.approx(0.05, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.05, rel=0.1)


def test_slope_ignores_where_the_line_begins() -> None:
    points = [(2000.0 * number, 7e7 + 290.0 * 2000 * number) for number in range(1, 7)]

    assert slope(points) == pytest.approx(290)


@pytest.mark.parametrize(
    ("items", "want"), [(["ccc"], "ccc"), (["ccc", "a", "bb"], "bb"), (["ccc", "bb"], "bb")]
)
def test_middle_is_one_of_the_items(items: list[str], want: str) -> None:
    assert middle(items, key=len) == want
