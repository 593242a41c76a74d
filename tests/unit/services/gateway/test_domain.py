"""Rules of the gateway."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from libs.units import Rates
from services.gateway.domain import (
    Closing,
    EndCause,
    Offering,
    Opening,
    Price,
    PromptSize,
    Usage,
    price_in_force,
    prompt_bound,
    usage_of,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def offering(context_length: int = 1000) -> Offering:
    return Offering(
        name="offerings/x",
        model_version="models/x/versions/1",
        context_length=context_length,
        default_max_output_tokens=512,
        default_temperature=1.0,
        default_top_p=1.0,
        default_top_k=0,
        prompt_overhead_tokens=20,
        message_overhead_tokens=10,
    )


def price(name: str, offset_s: float) -> Price:
    return Price(
        name=name,
        offering="offerings/x",
        rates=Rates(input_price=100, output_price=200),
        effective_time=NOW + timedelta(seconds=offset_s),
    )


def test_prompt_bound_counts_the_template_for_chats_only() -> None:
    text = PromptSize(content_units=50, message_count=0)
    chat = PromptSize(content_units=50, message_count=3)

    assert prompt_bound(text, offering()) == 52
    assert prompt_bound(chat, offering()) == 50 + 2 + 20 + 30


def test_prompt_bound_counts_tools_and_calls_as_messages() -> None:
    size = PromptSize(content_units=50, message_count=3, tool_count=4)

    assert prompt_bound(size, offering()) == 50 + 2 + 20 + 30 + 40


def test_cached_input_has_its_own_price() -> None:
    half = dataclasses.replace(
        price("prices/p", 0), rates=Rates(input_price=100, output_price=200, cached_input_price=50)
    )
    million = 10**6

    usage = Usage(input_tokens=3 * million, output_tokens=million)
    cached = dataclasses.replace(usage, cached_input_tokens=million)
    assert half.charge(usage, is_background=False) == 300 + 200
    assert half.charge(cached, is_background=False) == 200 + 50 + 200
    # Without a price of its own it costs what the rest costs.
    assert price("prices/p", 0).charge(cached, is_background=False) == 300 + 200


@given(
    rates=st.builds(
        Rates,
        input_price=st.integers(0, 10**10),
        output_price=st.integers(0, 10**10),
        reasoning_price=st.none() | st.integers(0, 10**10),
        request_price=st.integers(0, 10**6),
        background_discount_percent=st.integers(0, 100),
    ),
    nanos=st.integers(0, 10**9),
    input_tokens=st.integers(0, 10**4),
    is_reasoning=st.booleans(),
    is_background=st.booleans(),
)
def test_a_worker_that_keeps_the_bound_never_makes_a_charge_above_it(
    *, rates: Rates, nanos: int, input_tokens: int, is_reasoning: bool, is_background: bool
) -> None:
    priced = dataclasses.replace(price("prices/p", 0), rates=rates)
    bound = priced.bound(nanos, is_background=is_background)
    of_the_worker = Rates(input_price=bound.input_price, output_price=bound.output_price)
    tokens = of_the_worker.affordable(nanos=bound.nanos, input_tokens=input_tokens)
    most = 10**4 if tokens is None else min(tokens, 10**4)
    allowed = priced.affordable(
        nanos=nanos, input_tokens=input_tokens, at_most=10**4, is_background=is_background
    )

    assert most <= allowed or most < 0
    if most >= 0:
        usage = Usage(
            input_tokens=input_tokens,
            output_tokens=most,
            reasoning_tokens=most if is_reasoning else 0,
        )
        assert priced.charge(usage, is_background=is_background) <= nanos
    if not is_background:
        # Without a discount there is nothing to round: the worker ends where the charge does.
        assert most == allowed or max(most, allowed) < 0


@given(units=st.integers(0, 10**7), messages=st.integers(0, 4096))
def test_prompt_bound_never_exceeds_the_context(units: int, messages: int) -> None:
    size = PromptSize(content_units=units, message_count=messages)

    assert 0 < prompt_bound(size, offering()) <= 1000


def test_price_in_force_is_the_latest_that_has_begun() -> None:
    old, current, future = price("a", -100), price("b", -1), price("c", 1)

    assert price_in_force([future, current, old], NOW) is current
    assert price_in_force([future], NOW) is None


def test_price_rounds_each_line_up() -> None:
    # 1 * 100 / 1e6 and 1 * 200 / 1e6 are each below one nano.
    one, none = Usage(input_tokens=1, output_tokens=1), Usage(input_tokens=0, output_tokens=0)
    assert price("a", 0).charge(one, is_background=False) == 2
    assert price("a", 0).charge(none, is_background=False) == 0


def test_only_ends_of_the_clients_own_are_charged() -> None:
    charged = {cause for cause in EndCause if cause.is_charged}

    assert charged == {
        EndCause.COMPLETED,
        EndCause.CLIENT_CANCELLED,
        EndCause.DEADLINE,
        EndCause.STALLED,
        EndCause.REVOKED,
    }


def test_no_part_of_a_count_is_more_than_its_whole() -> None:
    # Whatever a worker has said: billing would refuse the record.
    opening = Opening(
        generation_id="gen_g1_1",
        slice_id="s1",
        account="accounts/dev",
        project="projects/dev",
        api_key="apiKeys/k",
        offering="offerings/x",
        model_version="models/x/versions/1",
        price="prices/p",
        input_tokens=7,
        start_time=NOW,
    )
    closing = Closing(
        output_tokens=3,
        cause=EndCause.COMPLETED,
        end_time=NOW,
        cached_input_tokens=8,
        reasoning_tokens=4,
    )

    assert usage_of(opening, closing) == Usage(
        input_tokens=7, output_tokens=3, cached_input_tokens=7, reasoning_tokens=3
    )
