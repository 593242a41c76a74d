"""libs/units.py: the one rounding rule."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.units import Rates

tokens = st.integers(0, 10**9)
prices = st.integers(0, 10**15)


@pytest.mark.parametrize(
    ("count", "price", "want"),
    [
        (0, 150_000_000, 0),
        (1, 150_000_000, 150),
        (1, 1, 1),
        (1_000_000, 150_000_000, 150_000_000),
        (3, 500_000, 2),
        (2**40, 2**60, 2**100 // 10**6 + 1),
    ],
)
def test_lines_of_known_amounts_are_rounded_up(count: int, price: int, want: int) -> None:
    assert (
        Rates(input_price=price, output_price=0).charge(input_tokens=count, output_tokens=0) == want
    )
    assert (
        Rates(input_price=0, output_price=price).charge(input_tokens=0, output_tokens=count) == want
    )


@given(tokens, prices, prices)
def test_more_tokens_never_cost_less(count: int, input_price: int, output_price: int) -> None:
    rate = Rates(input_price=input_price, output_price=output_price)
    cost = rate.charge(input_tokens=count, output_tokens=count)

    assert cost <= rate.charge(input_tokens=count + 1, output_tokens=count)
    assert cost <= rate.charge(input_tokens=count, output_tokens=count + 1)


@pytest.mark.parametrize(("nanos", "want"), [(7, None), (6, -1)])
def test_free_output_is_bounded_by_its_input_only(nanos: int, want: int | None) -> None:
    rate = Rates(input_price=1_000_000, output_price=0)

    assert rate.affordable(nanos=nanos, input_tokens=7) == want


@given(tokens, st.data(), prices, prices)
def test_cache_hit_never_costs_more_than_a_miss(
    count: int, data: st.DataObject, price: int, other: int
) -> None:
    cached = data.draw(st.integers(0, count))
    rate = Rates(
        input_price=max(price, other), output_price=price, cached_input_price=min(price, other)
    )

    hit = rate.charge(input_tokens=count, output_tokens=3, cached_input_tokens=cached)

    assert hit <= rate.charge(input_tokens=count, output_tokens=3)


rates = st.builds(
    lambda prices, cached, reasoning, request, percent: Rates(
        input_price=max(prices),
        output_price=prices[1],
        cached_input_price=cached if cached is None else min(cached, max(prices)),
        reasoning_price=reasoning,
        request_price=request,
        background_discount_percent=percent,
    ),
    st.tuples(prices, prices),
    st.none() | prices,
    st.none() | prices,
    prices,
    st.integers(0, 100),
)
parts = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6))


@given(rate=rates, given_input=parts, given_output=parts, background=st.booleans())
def test_charge_of_rates_is_the_sum_of_exact_lines_rounded_up_once_each(
    *, rate: Rates, given_input: tuple[int, int], given_output: tuple[int, int], background: bool
) -> None:
    (fresh, cached), (plain, reasoning) = given_input, given_output
    paid = Fraction(100 - rate.background_discount_percent, 100) if background else Fraction(1)

    def line(count: int, price: int) -> int:
        return ceil(Fraction(count * price, 1_000_000) * paid)

    def of_two(one: int, price: int, other: int, other_price: int | None) -> int:
        if not other or other_price is None:
            return line(one + other, price)
        whole = line(one + other, max(price, other_price))
        return min(whole, line(one, price) + line(other, other_price))

    got = rate.charge(
        input_tokens=fresh + cached,
        output_tokens=plain + reasoning,
        cached_input_tokens=cached,
        reasoning_tokens=reasoning,
        is_background=background,
    )

    assert got == (
        of_two(fresh, rate.input_price, cached, rate.cached_input_price)
        + of_two(plain, rate.output_price, reasoning, rate.reasoning_price)
        + ceil(rate.request_price * paid)
    )


@given(rate=rates, given_input=parts, given_output=parts, background=st.booleans())
def test_no_charge_is_more_than_what_was_held_for_it(
    *, rate: Rates, given_input: tuple[int, int], given_output: tuple[int, int], background: bool
) -> None:
    (fresh, cached), (plain, reasoning) = given_input, given_output
    held = rate.most(
        input_tokens=fresh + cached, output_tokens=plain + reasoning, is_background=background
    )

    got = rate.charge(
        input_tokens=fresh + cached,
        output_tokens=plain + reasoning,
        cached_input_tokens=cached,
        reasoning_tokens=reasoning,
        is_background=background,
    )

    assert got <= held


@given(
    rate=rates,
    input_tokens=st.integers(0, 10**6),
    nanos=st.integers(0, 2**63 - 1),
    background=st.booleans(),
)
def test_affordable_output_is_the_most_that_fits(
    *, rate: Rates, input_tokens: int, nanos: int, background: bool
) -> None:
    def most(output_tokens: int) -> int:
        return rate.most(
            input_tokens=input_tokens, output_tokens=output_tokens, is_background=background
        )

    found = rate.affordable(nanos=nanos, input_tokens=input_tokens, is_background=background)

    if found is None:
        assert most(2**40) == most(0) <= nanos
    elif found < 0:
        assert most(0) > nanos
    else:
        assert most(found) <= nanos < most(found + 1)


def test_every_line_of_known_rates_has_its_discount() -> None:
    rate = Rates(
        input_price=2_000_000,
        output_price=4_000_000,
        cached_input_price=500_000,
        reasoning_price=1_000_000,
        request_price=101,
        background_discount_percent=50,
    )

    def cost(*, is_background: bool) -> int:
        return rate.charge(
            input_tokens=10,
            cached_input_tokens=3,
            output_tokens=7,
            reasoning_tokens=2,
            is_background=is_background,
        )

    assert cost(is_background=False) == (14 + 2) + (20 + 2) + 101
    assert cost(is_background=True) == (7 + 1) + (10 + 1) + 51


@pytest.mark.parametrize("field", ["input_price", "reasoning_price", "request_price"])
def test_negative_rates_are_a_defect(field: str) -> None:
    with pytest.raises(ValueError, match="not negative"):
        Rates(**{"input_price": 1, "output_price": 1, field: -1})


def test_discount_is_a_percentage() -> None:
    with pytest.raises(ValueError, match="percent"):
        Rates(input_price=1, output_price=1, background_discount_percent=101)


@pytest.mark.parametrize("counts", [(1, 2, 0, 0), (0, 0, 1, 2), (-1, 0, 0, 0), (0, -1, 0, 0)])
def test_parts_that_are_more_than_their_whole_are_a_defect(
    counts: tuple[int, int, int, int],
) -> None:
    input_tokens, cached, output_tokens, reasoning = counts
    with pytest.raises(ValueError, match="part of"):
        Rates(input_price=1, output_price=1).charge(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            cached_input_tokens=cached,
            reasoning_tokens=reasoning,
        )
