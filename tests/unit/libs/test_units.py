"""libs/units.py: the one rounding rule."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.units import affordable_output_tokens, charge, charge_usage

tokens = st.integers(0, 10**9)
prices = st.integers(0, 10**15)


@given(tokens, prices)
def test_charge_is_the_exact_amount_rounded_up(count: int, price: int) -> None:
    assert charge(count, price) == ceil(Fraction(count * price, 1_000_000))


@given(tokens, tokens, prices)
def test_splitting_a_line_never_costs_less_and_at_most_a_nano_more(
    one: int, other: int, price: int
) -> None:
    whole = charge(one + other, price)
    parts = charge(one, price) + charge(other, price)

    assert whole <= parts <= whole + 1


@given(tokens, prices)
def test_more_tokens_never_cost_less(count: int, price: int) -> None:
    assert charge(count, price) <= charge(count + 1, price)


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
def test_charge_of_known_amounts(count: int, price: int, want: int) -> None:
    assert charge(count, price) == want


@given(tokens, tokens, prices, prices)
def test_generation_costs_the_sum_of_its_lines(
    input_tokens: int, output_tokens: int, input_price: int, output_price: int
) -> None:
    got = charge_usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        input_price=input_price,
        output_price=output_price,
    )

    assert got == charge(input_tokens, input_price) + charge(output_tokens, output_price)


@pytest.mark.parametrize(("count", "price"), [(-1, 1), (1, -1)])
def test_negative_numbers_are_a_defect(count: int, price: int) -> None:
    with pytest.raises(ValueError, match="not negative"):
        charge(count, price)


@given(tokens, prices, prices, st.integers(0, 2**63 - 1))
def test_what_is_affordable_is_the_most_that_the_charge_allows(
    input_tokens: int, input_price: int, output_price: int, nanos: int
) -> None:
    def cost(output_tokens: int) -> int:
        return charge_usage(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            input_price=input_price,
            output_price=output_price,
        )

    most = affordable_output_tokens(
        nanos=nanos, input_tokens=input_tokens, input_price=input_price, output_price=output_price
    )

    if most is None:
        assert output_price == 0
        assert cost(2**40) <= nanos
    elif most < 0:
        assert cost(0) > nanos
    else:
        assert cost(most) <= nanos < cost(most + 1)


@given(st.integers(0, 10**15), st.integers(0, 10**6), prices, st.integers(1, 10**12))
def test_affordable_is_the_most_that_is_charged_no_more_than_the_amount(
    nanos: int, input_tokens: int, input_price: int, output_price: int
) -> None:
    def cost(output_tokens: int) -> int:
        return charge_usage(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            input_price=input_price,
            output_price=output_price,
        )

    most = affordable_output_tokens(
        nanos=nanos, input_tokens=input_tokens, input_price=input_price, output_price=output_price
    )

    assert most is not None
    if most < 0:
        assert cost(0) > nanos
    else:
        assert cost(most) <= nanos < cost(most + 1)


@pytest.mark.parametrize(("nanos", "want"), [(7, None), (6, -1)])
def test_free_output_is_bounded_by_its_input_only(nanos: int, want: int | None) -> None:
    got = affordable_output_tokens(
        nanos=nanos, input_tokens=7, input_price=1_000_000, output_price=0
    )

    assert got == want


@given(tokens, st.data(), prices, prices, prices)
def test_cache_hit_never_costs_more_than_a_miss(
    input_tokens: int, data: st.DataObject, input_price: int, cached_price: int, output_price: int
) -> None:
    cached = data.draw(st.integers(0, input_tokens))
    miss = charge_usage(
        input_tokens=input_tokens,
        output_tokens=3,
        input_price=input_price,
        output_price=output_price,
    )
    hit = charge_usage(
        input_tokens=input_tokens,
        output_tokens=3,
        input_price=input_price,
        output_price=output_price,
        cached_input_tokens=cached,
        cached_input_price=cached_price,
    )
    split = charge(input_tokens - cached, input_price) + charge(cached, cached_price)

    assert hit == min(miss, split + charge(3, output_price))


def test_cached_tokens_have_their_own_price() -> None:
    nanos = charge_usage(
        input_tokens=1000,
        output_tokens=0,
        input_price=2_000_000,
        output_price=0,
        cached_input_tokens=600,
        cached_input_price=500_000,
    )

    assert nanos == 400 * 2 + 300


def test_more_cached_tokens_than_input_is_a_defect() -> None:
    with pytest.raises(ValueError, match="part of the input"):
        charge_usage(
            input_tokens=1, output_tokens=0, input_price=1, output_price=1, cached_input_tokens=2
        )
