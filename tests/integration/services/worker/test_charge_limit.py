"""What a limit of the charge does to an execution, over real gRPC."""

from __future__ import annotations

import pytest
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from libs.units import Rates
from tests.integration.services.worker.harness import CONTEXT_LENGTH, execution, running_worker

CHARGE_LIMIT = generation_pb2.FINISH_REASON_CHARGE_LIMIT
MAX_TOKENS = generation_pb2.FINISH_REASON_MAX_TOKENS
STOP = generation_pb2.FINISH_REASON_STOP_SEQUENCE
CONTEXT_FULL = generation_pb2.FINISH_REASON_CONTEXT_FULL
IDS = [65, 66, 67]


def limit(nanos: int, *, input_price: int = 0, output_price: int = 0) -> engine_pb2.ChargeLimit:
    return engine_pb2.ChargeLimit(nanos=nanos, input_price=input_price, output_price=output_price)


@pytest.mark.parametrize(
    ("nanos", "input_price", "output_price", "tokens"),
    [
        # 1 nano for the three tokens of the prompt, rounded up; two fifths of one for each token.
        (2, 1, 400_000, 2),
        (3, 1, 400_000, 5),
        # Three nanos for the prompt, two for each token.
        (10, 10**6, 2 * 10**6, 3),
        (2**63 - 1, 0, 2**63 - 1, 10**6),
    ],
)
async def test_the_output_ends_before_the_token_that_would_cost_too_much(
    nanos: int, input_price: int, output_price: int, tokens: int
) -> None:
    bound = limit(nanos, input_price=input_price, output_price=output_price)
    want = min(tokens, CONTEXT_LENGTH - len(IDS))
    async with running_worker() as worker, worker.gateway() as gateway:
        told = await gateway.run(execution(1, tokens=2**20, ids=IDS, charge_limit=bound))

        assert len(told.token_ids) == want
        assert told.end.reason == (CHARGE_LIMIT if want == tokens else CONTEXT_FULL)


async def test_what_is_spent_is_within_the_limit_and_one_token_more_is_not() -> None:
    bound = limit(1_000, input_price=7_000_001, output_price=33_333_333)
    async with running_worker() as worker, worker.gateway() as gateway:
        told = await gateway.run(execution(1, tokens=500, charge_limit=bound))

        assert told.input_tokens is not None
        costs = [
            Rates(input_price=bound.input_price, output_price=bound.output_price).charge(
                input_tokens=told.input_tokens, output_tokens=len(told.token_ids) + more
            )
            for more in (0, 1)
        ]
        assert costs[0] <= 1_000 < costs[1]
        assert told.end.reason == CHARGE_LIMIT


async def test_what_would_end_before_the_limit_ends_as_ever() -> None:
    bound = limit(20, output_price=10**6)
    async with running_worker() as worker, worker.gateway() as gateway:
        asked = await gateway.run(execution(1, tokens=20, charge_limit=bound))
        stop = asked.token_ids[9]
        stopped = await gateway.run(
            execution(2, tokens=40, stop_ids=[stop], charge_limit=bound),
        )
        full = await gateway.run(
            execution(3, tokens=40, ids=[65] * (CONTEXT_LENGTH - 4), charge_limit=bound)
        )
        free = await gateway.run(execution(4, tokens=30, charge_limit=limit(0)))

        assert (len(asked.token_ids), asked.end.reason) == (20, MAX_TOKENS)
        assert stopped.end.reason == STOP
        assert (len(full.token_ids), full.end.reason) == (4, CONTEXT_FULL)
        assert (len(free.token_ids), free.end.reason) == (30, MAX_TOKENS)


@pytest.mark.parametrize("cut", [0, 1, 6, 7])
async def test_a_continuation_counts_what_was_released_before(cut: int) -> None:
    bound = limit(7, output_price=10**6)
    async with running_worker() as worker, worker.gateway() as gateway:
        whole = await gateway.run(execution(1, tokens=50, charge_limit=bound))

        rest = await gateway.run(
            execution(2, tokens=50, continues=whole.token_ids[:cut], charge_limit=bound)
        )

        assert len(whole.token_ids) == 7
        assert whole.token_ids[:cut] + rest.token_ids == whole.token_ids
        assert rest.end.reason == whole.end.reason == CHARGE_LIMIT


async def test_a_continuation_beyond_the_limit_ends_at_once() -> None:
    """A gateway with another price in mind released more: nothing is taken back."""
    bound = limit(7, output_price=10**6)
    async with running_worker() as worker, worker.gateway() as gateway:
        told = await gateway.run(execution(1, tokens=50, continues=[65] * 9, charge_limit=bound))

        assert (told.token_ids, told.end.reason) == ([], CHARGE_LIMIT)
