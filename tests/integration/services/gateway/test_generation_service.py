"""One request through a gateway, whatever its worker and its client do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from maas.inference.v1 import generation_pb2, generation_service_pb2

from libs.errors import FailedPrecondition, MaasError, Reason, Unavailable
from libs.rpc.status import error_of
from services.gateway import placement
from services.gateway.domain import EndCause
from tests.integration.services.gateway.harness import gateway

if TYPE_CHECKING:
    from tests.integration.services.gateway.harness import Stream

NANOS_PER_TOKEN = 1000


async def frames_of(stream: Stream) -> list[generation_pb2.GenerationFrame]:
    """Reads a stream to its end. Raises what the gateway raised."""
    frames: list[generation_pb2.GenerationFrame] = []
    try:
        while isinstance(
            response := await stream.read(), generation_service_pb2.StreamGenerateResponse
        ):
            frames.append(response.frame)
    except grpc.aio.AioRpcError as failure:
        raise error_of(failure) from failure
    return frames


async def failure_of(stream: Stream) -> MaasError:
    """Reads a stream that has to fail."""
    with pytest.raises(MaasError) as caught:
        await frames_of(stream)
    return caught.value


async def read_tokens(stream: Stream, tokens: int) -> None:
    """Reads frames until that many tokens have come."""
    count = 0
    while count < tokens:
        response = await stream.read()
        assert isinstance(response, generation_service_pb2.StreamGenerateResponse)
        count = response.frame.output_tokens


async def test_a_stream_is_numbered_counted_and_charged(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.stream()
        (worker,) = world.workers
        execution = await worker.next_start()
        worker.accept(execution.lane, input_tokens=3)
        worker.say(execution.lane, "a", "b", "c")
        worker.end(execution.lane)

        frames = await frames_of(stream)

        text = "".join(out.text for frame in frames for out in frame.delta.outputs)
        finished = frames[-1].finished
        assert text == "abc"
        assert [frame.sequence for frame in frames] == list(range(1, len(frames) + 1))
        assert frames[0].started.input_tokens == 3
        assert (finished.usage.input_tokens, finished.usage.output_tokens) == (3, 3)
        assert finished.charge.nanos == 6 * NANOS_PER_TOKEN
        settled = await world.only_settlement()
        assert settled.opening.generation_id == frames[0].started.generation_id
        assert (settled.closing.cause, settled.owed) == (EndCause.COMPLETED, 6 * NANOS_PER_TOKEN)


async def test_nothing_is_sent_before_a_worker_accepts(tmp_path: Path) -> None:
    """A worker that refuses for a reason of its own is replaced, and the client sees nothing."""
    async with gateway(tmp_path, worker_count=2) as world:
        stream = world.stream()
        first, second = world.workers
        refused = await first.next_start()
        first.fail(refused.lane, 14, "WORKER_DRAINING")
        execution = await second.next_start()
        second.accept(execution.lane)
        second.end(execution.lane)

        frames = await frames_of(stream)

        kinds = [frame.WhichOneof("event") for frame in frames]
        assert kinds == ["started", "delta", "finished"]
        assert world.scheduler.released == []


async def test_a_refusal_of_the_request_itself_ends_the_search(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        stream = world.stream()
        execution = await world.workers[0].next_start()
        world.workers[0].fail(execution.lane, 3, "CONTEXT_LENGTH_EXCEEDED")

        error = await failure_of(stream)

        assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
        assert [item.field for item in error.violations] == ["spec.text"]
        assert len(world.scheduler.released) == 1
        await world.settler.flush()
        assert world.billing.settled == []


async def test_the_scheduler_away_places_from_the_table(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        world.scheduler.is_away = True
        stream = world.stream()
        (worker,) = world.workers
        execution = await worker.next_start()
        worker.accept(execution.lane)
        worker.end(execution.lane)

        assert (await frames_of(stream))[-1].HasField("finished")


async def test_a_worker_lost_in_mid_stream_costs_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.stream()
        (worker,) = world.workers
        execution = await worker.next_start()
        worker.accept(execution.lane)
        worker.say(execution.lane, "a", "b")
        await read_tokens(stream, 2)

        worker.break_stream()
        error = await failure_of(stream)

        assert isinstance(error, Unavailable)
        assert error.reason is Reason.WORKER_LOST
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.WORKER_LOST
        assert (settled.closing.output_tokens, settled.owed) == (2, 0)


async def test_a_client_that_leaves_aborts_the_engine_and_pays_what_was_sent(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world:
        stream = world.stream()
        (worker,) = world.workers
        execution = await worker.next_start()
        worker.accept(execution.lane)
        worker.say(execution.lane, "a", "b")
        await read_tokens(stream, 2)

        stream.cancel()

        assert await worker.next_abort() == execution.lane
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.CLIENT_CANCELLED
        assert settled.owed == (3 + 2) * NANOS_PER_TOKEN


async def test_a_client_that_leaves_before_acceptance_pays_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.stream()
        (worker,) = world.workers
        execution = await worker.next_start()

        stream.cancel()

        assert await worker.next_abort() == execution.lane
        await world.settler.flush()
        assert world.billing.settled == []
        await world.book.close_idle(0.0)
        assert world.book.open_ids() == []


async def test_a_deadline_is_its_own_cause(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.stream(timeout_s=1)
        (worker,) = world.workers
        execution = await worker.next_start()
        assert 0 < execution.budget.ToMilliseconds() <= 1100
        worker.accept(execution.lane)
        worker.say(execution.lane, "a")

        await failure_of(stream)

        assert await worker.next_abort() == execution.lane
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.DEADLINE
        assert settled.owed == (3 + 1) * NANOS_PER_TOKEN


async def test_a_prompt_above_its_bound_needs_credit_for_the_rest(tmp_path: Path) -> None:
    """Only a template that adds more than its version says can do that; nothing is charged."""
    held = (5 + 2 + 100) * NANOS_PER_TOKEN
    async with gateway(tmp_path, available=held) as world:
        stream = world.stream(most=100)
        (worker,) = world.workers
        execution = await worker.next_start()
        worker.accept(execution.lane, input_tokens=500)

        error = await failure_of(stream)

        assert isinstance(error, FailedPrecondition)
        assert error.reason is Reason.INSUFFICIENT_CREDIT
        assert await worker.next_abort() == execution.lane
        await world.settler.flush()
        assert world.billing.settled == []


async def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    async with gateway(tmp_path, stall_limit_s=0.4) as world:
        stream = world.stream(most=1000)
        (worker,) = world.workers
        execution = await worker.next_start()
        worker.accept(execution.lane)
        # More than any window takes while nobody reads.
        for _ in range(300):
            worker.say(execution.lane, "x" * 200_000)

        assert await worker.next_abort() == execution.lane
        settled = await world.only_settlement()

        assert settled.closing.cause is EndCause.STALLED
        assert 0 < settled.closing.output_tokens < 300
        error = await failure_of(stream)
        assert error.reason is Reason.CONSUMER_STALLED


async def test_a_drain_waits_for_streams_and_refuses_new_ones(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.stream()
        (worker,) = world.workers
        execution = await worker.next_start()
        worker.accept(execution.lane)
        draining = asyncio.create_task(world.generations.drain())
        await asyncio.sleep(0)

        refused = await failure_of(world.stream())
        worker.end(execution.lane)
        frames = await frames_of(stream)
        await draining

        assert refused.reason is Reason.SERVICE_UNAVAILABLE
        assert frames[-1].HasField("finished")


async def test_generations_are_bounded(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        streams = [world.stream() for _ in range(8)]
        (worker,) = world.workers
        for _ in streams:
            await worker.next_start()

        error = await failure_of(world.stream())

        assert error.reason is Reason.QUEUE_FULL
        for stream in streams:
            stream.cancel()


async def test_a_worker_that_never_accepts_is_left_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "ACCEPT_WAIT_S", 0.2)
    async with gateway(tmp_path, worker_count=2) as world:
        stream = world.stream()
        first, second = world.workers
        ignored = await first.next_start()
        execution = await second.next_start()
        second.accept(execution.lane)
        second.end(execution.lane)

        assert await first.next_abort() == ignored.lane
        assert (await frames_of(stream))[-1].HasField("finished")


async def test_a_generation_is_cancelled_from_elsewhere_while_nobody_reads(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world:
        stream = world.stream(most=1000)
        (worker,) = world.workers
        execution = await worker.next_start()
        worker.accept(execution.lane)
        response = await stream.read()
        assert isinstance(response, generation_service_pb2.StreamGenerateResponse)
        for _ in range(300):
            worker.say(execution.lane, "x" * 200_000)
        request = generation_service_pb2.CancelGenerationRequest(
            generation_id=response.frame.started.generation_id
        )

        await world.peer.call(world.stub.CancelGeneration, request)

        assert await worker.next_abort() == execution.lane
        error = await failure_of(stream)
        assert error.reason is Reason.GENERATION_CANCELLED
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.CLIENT_CANCELLED
