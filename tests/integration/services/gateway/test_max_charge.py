"""Requests that say what they may cost at most."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.errors import Internal, InvalidArgument, Reason
from services.gateway.domain import EndCause
from tests.integration.services.gateway.client import Wish
from tests.integration.services.gateway.harness import gateway
from tests.integration.services.gateway.neighbours import NANOS_PER_TOKEN

# The prompt and 4 tokens, and not quite a fifth one.
LIMIT = 8 * NANOS_PER_TOKEN - 1
CAPPED = Wish(max_charge=LIMIT, most=100)


async def test_the_worker_is_told_the_limit_and_the_frozen_price(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(CAPPED)
        execution = await world.accepted(input_tokens=3)

        assert execution.charge_limit.nanos == LIMIT
        assert execution.charge_limit.input_price == NANOS_PER_TOKEN * 10**6
        assert execution.charge_limit.output_price == NANOS_PER_TOKEN * 10**6
        world.workers[0].say(execution.lane, "a", "b", "c", "d")
        world.workers[0].end(execution.lane)
        await stream.rest()
        assert stream.last.finished.charge.nanos == 7 * NANOS_PER_TOKEN <= LIMIT


async def test_without_a_limit_the_worker_gets_none(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream()
        execution = await world.accepted()

        assert not execution.HasField("charge_limit")
        stream.call.cancel()


async def test_no_more_than_the_limit_is_held(tmp_path: Path) -> None:
    """So little credit is enough, although 100 tokens would cost more."""
    async with gateway(tmp_path, available=LIMIT) as world:
        stream = world.client.stream(CAPPED)
        execution = await world.accepted(input_tokens=3)
        world.workers[0].end(execution.lane)

        await stream.rest()

        assert (await world.only_settlement()).owed == 3 * NANOS_PER_TOKEN


async def test_a_limit_above_the_worst_case_holds_the_worst_case(tmp_path: Path) -> None:
    worst = (5 + 2 + 100) * NANOS_PER_TOKEN
    async with gateway(tmp_path, available=worst) as world:
        stream = world.client.stream(Wish(max_charge=10**9, most=100))
        execution = await world.accepted()
        world.workers[0].end(execution.lane)

        await stream.rest()


async def test_a_worker_that_overruns_the_limit_is_cut_and_nothing_is_charged(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(CAPPED)
        execution = await world.accepted(input_tokens=3)
        (worker,) = world.workers
        for number, word in enumerate("abcde"):
            worker.say(execution.lane, word, first=number)

        error = await stream.failure()

        assert isinstance(error, Internal)
        assert error.reason is Reason.ENGINE_FAILURE
        assert stream.last.output_tokens <= 4
        assert await worker.next_abort() == execution.lane
        settled = await world.only_settlement()
        assert (settled.closing.cause, settled.owed) == (EndCause.ENGINE_FAILURE, 0)


@pytest.mark.parametrize("input_tokens", [7, 8, 500])
async def test_a_worker_that_accepts_what_leaves_no_room_is_not_believed(
    tmp_path: Path, input_tokens: int
) -> None:
    """Else the prompt alone might be charged above the limit."""
    async with gateway(tmp_path) as world:
        stream = world.client.stream(CAPPED)
        execution = await world.accepted(input_tokens=input_tokens)
        world.workers[0].end(execution.lane)

        error = await stream.failure()

        assert error.reason is Reason.ENGINE_FAILURE
        await world.no_settlement()


@pytest.mark.parametrize("nanos", [0, -1])
async def test_a_limit_has_to_be_above_zero(tmp_path: Path, nanos: int) -> None:
    async with gateway(tmp_path) as world:
        error = await world.client.stream(Wish(max_charge=nanos)).failure()

        assert isinstance(error, InvalidArgument)
        assert [item.field for item in error.violations] == ["spec.max_charge.nanos"]
        await world.no_settlement()


@pytest.mark.parametrize("currency", ["EUR", ""])
async def test_a_limit_is_in_the_currency_of_prices(tmp_path: Path, currency: str) -> None:
    async with gateway(tmp_path) as world:
        wish = Wish(max_charge=LIMIT, currency=currency)
        error = await world.client.stream(wish).failure()

        assert isinstance(error, InvalidArgument)
        await world.no_settlement()


async def test_the_wrong_currency_is_named(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        error = await world.client.stream(Wish(max_charge=LIMIT, currency="EUR")).failure()

        assert error.reason is Reason.CURRENCY_MISMATCH
        assert error.metadata == {"left": "EUR", "right": "USD"}
        assert [item.field for item in error.violations] == ["spec.max_charge.currency_code"]
