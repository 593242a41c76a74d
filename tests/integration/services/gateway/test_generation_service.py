"""One request through a gateway, whatever its worker and its client do."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.errors import FailedPrecondition, Internal, OutOfRange, Reason
from libs.testing import eventually
from services.gateway import placement
from services.gateway.domain import EndCause
from tests.integration.services.gateway.client import CONTINUE, Wish, answer, refusal
from tests.integration.services.gateway.harness import CountingClock, World, gateway
from tests.integration.services.gateway.neighbours import NANOS_PER_TOKEN


async def test_a_stream_is_numbered_counted_and_charged(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream()
        execution = await world.accepted(input_tokens=3)
        (worker,) = world.workers
        worker.say(execution.lane, "a", "b", "c")
        worker.end(execution.lane)

        await stream.rest()

        finished = stream.last.finished
        assert stream.text == "abc"
        assert stream.sequences == list(range(1, len(stream.frames) + 1))
        assert stream.frames[0].started.input_tokens == 3
        assert (finished.usage.input_tokens, finished.usage.output_tokens) == (3, 3)
        assert finished.charge.nanos == 6 * NANOS_PER_TOKEN
        settled = await world.only_settlement()
        assert settled.opening.generation_id == stream.generation_id
        assert (settled.closing.cause, settled.owed) == (EndCause.COMPLETED, 6 * NANOS_PER_TOKEN)


async def test_a_unary_call_gets_the_same_counts_and_charge(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        call = world.client.unary(Wish(with_ids=True))
        execution = await world.accepted(input_tokens=3)
        (worker,) = world.workers
        worker.say(execution.lane, "a", "b", "c")
        worker.end(execution.lane)

        generation = await answer(call)

        (output,) = generation.outputs
        assert (output.text, list(output.token_ids)) == ("abc", [0, 1, 2])
        assert (generation.usage.input_tokens, generation.usage.output_tokens) == (3, 3)
        assert generation.charge.nanos == 6 * NANOS_PER_TOKEN
        assert (await world.only_settlement()).owed == 6 * NANOS_PER_TOKEN


async def test_nothing_is_kept_of_unary_calls_that_nobody_can_come_back_for(
    tmp_path: Path,
) -> None:
    """Else the budget for replays fills up for ever, and then everything is refused."""
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        for _ in range(2):
            call = world.client.unary()
            execution = await world.accepted()
            worker.say(execution.lane, "a", "b")
            worker.end(execution.lane)
            await answer(call)
        failing = world.client.unary()
        execution = await world.accepted()
        worker.fail(execution.lane, 13, "ENGINE_FAILURE")
        await refusal(failing)

        assert world.budget.used == 0


async def test_a_unary_result_is_whole_however_little_is_kept_of_streams(tmp_path: Path) -> None:
    """It is charged, so it has to be there: also when somebody reads along and it is late."""
    async with gateway(tmp_path, replay_bytes_max=300) as world:
        (worker,) = world.workers
        wish = Wish(request_id="r-1", on_disconnect=CONTINUE)
        first = world.client.unary(wish)
        execution = await world.accepted()
        (generation_id,) = await started(world)
        first.cancel()
        reading = world.client.resume(generation_id)
        for number in range(10):
            worker.say(execution.lane, "x" * 100, first=number)
            await reading.until(number + 1)
        worker.end(execution.lane)
        await reading.rest()

        again = await answer(world.client.unary(wish))

        assert again.outputs[0].text == "x" * 1000
        assert again.charge.nanos == (await world.only_settlement()).owed == 13 * NANOS_PER_TOKEN


async def started(world: World) -> list[str]:
    """Waits for a generation; returns the ids of all."""
    await eventually(lambda: bool(world.generations._running))
    return list(world.generations._running)


async def test_a_stream_that_has_outgrown_its_log_has_no_whole_result(tmp_path: Path) -> None:
    async with gateway(tmp_path, replay_bytes_max=300) as world:
        (worker,) = world.workers
        stream = world.client.stream(Wish(request_id="r-1"))
        execution = await world.accepted()
        for number in range(10):
            worker.say(execution.lane, "x" * 100, first=number)
            await stream.until(number + 1)
        worker.end(execution.lane)
        await stream.rest()

        error = await refusal(world.client.unary(Wish(request_id="r-1")))

        assert isinstance(error, OutOfRange)
        assert error.reason is Reason.REPLAY_EXPIRED


async def test_a_unary_call_that_is_cancelled_pays_for_its_input_only(tmp_path: Path) -> None:
    """Nothing of it was released, however long it had run."""
    clock = CountingClock()
    async with gateway(tmp_path, replay_window_s=0.02, clock=clock) as world:
        call = world.client.unary()
        execution = await world.accepted()
        world.workers[0].say(execution.lane, "a", "b")
        await started(world)
        (generation,) = world.generations._running.values()
        await eventually(lambda: generation._sink.waiting == 2)
        await clock.rounds(3)

        call.cancel()

        assert (await world.only_settlement()).owed == 3 * NANOS_PER_TOKEN


@pytest.mark.parametrize("request_id", ["", "r-1"])
async def test_a_worker_that_says_too_much_is_cut_while_nobody_takes_it(
    tmp_path: Path, request_id: str
) -> None:
    async with gateway(tmp_path, replay_window_s=0.1) as world:
        call = world.client.unary(Wish(most=2, request_id=request_id))
        execution = await world.accepted()
        world.workers[0].say(execution.lane, "a", "b", "c")

        error = await refusal(call)

        assert error.reason is Reason.ENGINE_FAILURE
        assert await world.workers[0].next_abort() == execution.lane
        assert (await world.only_settlement()).owed == 0


async def test_nothing_is_sent_before_a_worker_accepts(tmp_path: Path) -> None:
    """A worker that refuses for a reason of its own is replaced, and the client sees nothing."""
    async with gateway(tmp_path, worker_count=2) as world:
        stream = world.client.stream()
        first, second = world.workers
        refused = await first.next_start()
        first.fail(refused.lane, 14, "WORKER_DRAINING")
        execution = await world.accepted(second)
        second.end(execution.lane)

        await stream.rest()

        assert stream.kinds == ["started", "delta", "finished"]
        assert world.scheduler.released == []


async def test_a_refusal_of_the_request_itself_ends_the_search(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        stream = world.client.stream()
        execution = await world.workers[0].next_start()
        world.workers[0].fail(execution.lane, 3, "CONTEXT_LENGTH_EXCEEDED")

        error = await stream.failure()

        assert error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
        assert [item.field for item in error.violations] == ["spec.text"]
        assert len(world.scheduler.released) == 1
        await world.no_settlement()


async def test_the_scheduler_away_places_from_the_table(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        world.scheduler.is_away = True
        stream = world.client.stream()
        execution = await world.accepted()
        world.workers[0].end(execution.lane)

        assert (await stream.rest()).last.HasField("finished")


async def test_a_worker_that_says_more_than_was_asked_for_is_cut(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Wish(most=2))
        execution = await world.accepted()
        (worker,) = world.workers
        worker.say(execution.lane, "a", "b", "c")

        error = await stream.failure()

        assert isinstance(error, Internal)
        assert error.reason is Reason.ENGINE_FAILURE
        assert error.metadata == {"worker": "workers/w0"}
        assert await worker.next_abort() == execution.lane
        settled = await world.only_settlement()
        assert (settled.closing.cause, settled.owed) == (EndCause.ENGINE_FAILURE, 0)


async def test_a_client_that_leaves_aborts_the_engine_and_pays_what_was_sent(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream()
        execution = await world.accepted()
        (worker,) = world.workers
        worker.say(execution.lane, "a", "b")
        await stream.until(2)

        stream.call.cancel()

        assert await worker.next_abort() == execution.lane
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.CLIENT_CANCELLED
        assert settled.owed == (3 + 2) * NANOS_PER_TOKEN


async def test_a_client_that_leaves_before_acceptance_pays_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream()
        (worker,) = world.workers
        execution = await worker.next_start()

        stream.call.cancel()

        assert await worker.next_abort() == execution.lane
        await world.no_settlement()


async def test_a_deadline_is_its_own_cause(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(timeout_s=0.3)
        (worker,) = world.workers
        execution = await world.accepted()
        assert 0 < execution.budget.ToMilliseconds() <= 400
        worker.say(execution.lane, "a")

        await stream.failure()

        assert await worker.next_abort() == execution.lane
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.DEADLINE
        assert settled.owed == (3 + 1) * NANOS_PER_TOKEN


async def test_a_prompt_above_its_bound_needs_credit_for_the_rest(tmp_path: Path) -> None:
    """Only a template that adds more than its version says can do that; nothing is charged."""
    held = (5 + 2 + 100) * NANOS_PER_TOKEN
    async with gateway(tmp_path, available=held) as world:
        stream = world.client.stream(Wish(most=100))
        execution = await world.accepted(input_tokens=500)

        error = await stream.failure()

        assert isinstance(error, FailedPrecondition)
        assert error.reason is Reason.INSUFFICIENT_CREDIT
        assert await world.workers[0].next_abort() == execution.lane
        await world.no_settlement()


async def test_generations_are_bounded(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        streams = [world.client.stream() for _ in range(8)]
        (worker,) = world.workers
        for _ in streams:
            await worker.next_start()

        error = await world.client.stream().failure()

        assert error.reason is Reason.QUEUE_FULL
        for stream in streams:
            stream.call.cancel()


async def test_a_worker_that_never_accepts_is_left_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "ACCEPT_WAIT_S", 0.1)
    async with gateway(tmp_path, worker_count=2) as world:
        stream = world.client.stream()
        first, second = world.workers
        ignored = await first.next_start()
        execution = await world.accepted(second)
        second.end(execution.lane)

        assert await first.next_abort() == ignored.lane
        assert (await stream.rest()).last.HasField("finished")
