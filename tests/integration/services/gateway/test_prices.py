"""All that a price says: reasoning, the request, background; and the engine's time beside it."""

from __future__ import annotations

from pathlib import Path

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, generation_service_pb2

from libs.errors import FieldRule
from libs.testing import eventually
from libs.units import Rates
from services.gateway import convert
from services.gateway.domain import EndCause
from tests.integration.services.gateway.client import Wish, answer, refusal
from tests.integration.services.gateway.harness import END, Worker, gateway
from tests.integration.services.gateway.neighbours import NANOS_PER_TOKEN
from tests.integration.services.gateway.richly import Rich, Spec, chat, said, tell, thought

REQUEST = 70_000
RATES = Rates(
    input_price=NANOS_PER_TOKEN * 10**6,
    output_price=2 * NANOS_PER_TOKEN * 10**6,
    reasoning_price=5 * NANOS_PER_TOKEN * 10**6,
    request_price=REQUEST,
    background_discount_percent=25,
)
MOVED_S = 0.25


def background(spec: Spec) -> None:
    """Asks for what may wait."""
    spec.priority = generation_pb2.PRIORITY_CLASS_BACKGROUND


def end(worker: Worker, lane: int, engine_time_ns: int) -> None:
    """Ends an output well, and says what it took."""
    ended = engine_pb2.Ended(lane=lane, end=END)
    ended.engine_time.FromNanoseconds(engine_time_ns)
    worker.responses.put_nowait(engine_pb2.StepEvents(ended=[ended]))


async def test_reasoning_and_the_request_have_prices_of_their_own(tmp_path: Path) -> None:
    async with gateway(tmp_path, rates=RATES) as world:
        stream = world.client.stream(Rich(change=chat, most=10))
        lane = (await world.accepted(input_tokens=3)).lane
        tell(world.workers[0], lane, thought("hm"), token_ids=[1, 2], reasoning_tokens=2)
        tell(world.workers[0], lane, said("so"), token_ids=[3])
        world.workers[0].end(lane)
        await stream.rest()

        # 3 of input, 1 of output, 2 of reasoning, and the request.
        want = (3 + 2 + 2 * 5) * NANOS_PER_TOKEN + REQUEST
        assert stream.last.finished.charge.nanos == want
        assert (await world.only_settlement()).owed == want


async def test_background_costs_less_and_is_settled_as_such(tmp_path: Path) -> None:
    async with gateway(tmp_path, rates=RATES) as world:
        call = world.client.unary(Rich(change=background, most=10))
        execution = await world.accepted(input_tokens=4)
        world.workers[0].say(execution.lane, "a", "b")
        world.workers[0].end(execution.lane)

        generation = await answer(call)

        want = (4 + 2 * 2) * NANOS_PER_TOKEN * 75 // 100 + REQUEST * 75 // 100
        assert generation.charge.nanos == want
        settled = await world.only_settlement()
        assert (settled.owed, settled.opening.background) == (want, True)


async def test_a_quote_is_what_is_held_with_every_price(tmp_path: Path) -> None:
    async with gateway(tmp_path, rates=RATES) as world:
        spec = Rich(change=background, most=10).spec()
        request = generation_service_pb2.QuoteGenerationRequest(spec=spec)
        said = await world.client.stub.QuoteGeneration(request, metadata=world.client.metadata)

        # The dearest output there can be, and two tokens that a tokenizer may add.
        most = 10 * 5 * NANOS_PER_TOKEN * 75 // 100 + REQUEST * 75 // 100
        hold = (5 + 2) * NANOS_PER_TOKEN * 75 // 100 + most
        assert said.hold.nanos == hold
        assert said.most.nanos == said.input_tokens * NANOS_PER_TOKEN * 75 // 100 + most
        call = world.client.unary(Rich(change=background, most=10))
        await world.accepted()
        assert world.billing.acquired[0][1] == hold
        call.cancel()


async def test_a_limit_of_the_charge_pays_for_the_request_too(tmp_path: Path) -> None:
    async with gateway(tmp_path, rates=RATES) as world:
        limit = REQUEST + 20 * NANOS_PER_TOKEN
        call = world.client.unary(Wish(max_charge=limit))
        execution = await world.accepted(input_tokens=3)

        bound = execution.charge_limit
        assert bound.nanos == 20 * NANOS_PER_TOKEN
        assert bound.input_price == RATES.input_price
        # It may all be reasoning.
        assert bound.output_price == RATES.reasoning_price
        world.workers[0].say(execution.lane, "a", "b", "c")
        world.workers[0].end(execution.lane)
        assert (await answer(call)).charge.nanos <= limit

        refused = await refusal(world.client.unary(Wish(max_charge=REQUEST - 1)))

        (violation,) = refused.violations
        assert (violation.field, violation.rule) == ("spec.max_charge", FieldRule.OUT_OF_RANGE)
        assert str(REQUEST) in violation.description
        assert len(await world.settlements(1)) == 1


async def test_the_time_of_all_outputs_and_workers_is_settled(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        stream = world.client.stream()
        first = await world.accepted()
        world.workers[0].say(first.lane, "a")
        await stream.until(1)
        failure = engine_pb2.Failure(code=14, reason="WORKER_DRAINING", message="drains")
        ended = engine_pb2.Ended(lane=first.lane, failure=failure)
        ended.engine_time.FromNanoseconds(int(MOVED_S * 1e9))
        world.workers[0].responses.put_nowait(engine_pb2.StepEvents(ended=[ended]))
        second = await world.accepted(world.workers[1])
        world.workers[1].say(second.lane, "b", first=1)
        end(world.workers[1], second.lane, 500_000_001)
        await stream.rest()

        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.COMPLETED
        assert settled.closing.engine_time_ns == int(MOVED_S * 1e9) + 500_000_001
        made = convert.settlement_to_pb(
            settled.opening, settled.closing, engine_time_ns=settled.engine_time_ns
        )
        assert made.engine_time.ToNanoseconds() == 750_000_001


async def test_what_a_worker_says_just_after_a_cancelled_end_counts_too(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream()
        execution = await world.accepted()
        world.workers[0].say(execution.lane, "a")
        await stream.until(1)
        await world.client.cancel(stream.generation_id)
        await world.workers[0].next_abort()
        end(world.workers[0], execution.lane, 7_000_000)
        await eventually(lambda: world.settler._queue[0].engine_time_ns == 7_000_000)

        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.CLIENT_CANCELLED
        assert (settled.closing.engine_time_ns, settled.engine_time_ns) == (0, 7_000_000)
