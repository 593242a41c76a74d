"""Generations that go on without a reader."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from libs.errors import MaasError, OutOfRange, Reason, ResourceExhausted
from libs.testing import eventually
from services.gateway.domain import EndCause
from services.gateway.running import Generation
from tests.integration.services.gateway.client import CONTINUE, Reading, Wish, answer, refusal
from tests.integration.services.gateway.harness import World, gateway
from tests.integration.services.gateway.neighbours import NANOS_PER_TOKEN

DETACHED = Wish(on_disconnect=CONTINUE)


async def left(world: World, wish: Wish = DETACHED) -> tuple[Reading, int]:
    """Starts a generation whose caller leaves after one token; returns its stream and lane."""
    stream = world.client.stream(wish)
    execution = await world.accepted()
    world.workers[0].say(execution.lane, "a")
    await stream.until(1)
    stream.call.cancel()
    return stream, execution.lane


async def test_nobody_reads_and_it_goes_on_to_its_end(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream, lane = await left(world)
        worker.say(lane, "b", "c", first=1)
        worker.end(lane)

        settled = await world.only_settlement()

        assert settled.closing.cause is EndCause.COMPLETED
        assert settled.closing.output_tokens == 3
        assert settled.owed == (3 + 3) * NANOS_PER_TOKEN
        whole = await world.client.resume(stream.generation_id).rest()
        assert whole.text == "abc"
        assert whole.last.finished.usage.output_tokens == 3
        assert whole.last.finished.charge.nanos == settled.owed
        await world.only_settlement()


def recovered(world: World) -> int:
    """Returns the count that a process would find that starts after a kill."""
    world.journal._earlier = [world.journal._path(world.journal._number)]
    ((_, closing),) = world.journal.recover(datetime(2027, 1, 1, tzinfo=UTC)).settlements
    return closing.output_tokens


async def released(generation: Generation, tokens: int) -> None:
    """Waits until that many output tokens are released."""
    await eventually(lambda: generation.output_tokens == tokens)


async def test_what_nobody_reads_is_counted_and_kept_while_it_runs(tmp_path: Path) -> None:
    async with gateway(tmp_path, replay_window_s=0.1) as world:
        stream, lane = await left(world)
        (generation,) = world.generations._running.values()
        used = world.budget.used

        for number in range(1, 4):
            world.workers[0].say(lane, "x" * 1000, first=number)
            await released(generation, 1 + number)
            assert world.budget.used >= used + number * 1000
            assert recovered(world) == 1 + number

        await world.client.cancel(stream.generation_id)
        assert (await world.only_settlement()).owed == (3 + 4) * NANOS_PER_TOKEN
        rest = world.client.resume(stream.generation_id, after=2)
        assert (await rest.failure()).reason is Reason.GENERATION_CANCELLED
        assert rest.text == "x" * 3000


@pytest.mark.parametrize(
    ("code", "reason", "cause"),
    [
        (4, "DEADLINE_EXCEEDED", EndCause.DEADLINE),
        (13, "ENGINE_FAILURE", EndCause.ENGINE_FAILURE),
        (14, "WORKER_DRAINING", EndCause.WORKER_LOST),
    ],
)
async def test_what_nobody_has_read_is_not_lost_when_it_fails(
    tmp_path: Path, code: int, reason: str, cause: EndCause
) -> None:
    async with gateway(tmp_path, move_wait_s=0.01) as world:
        (worker,) = world.workers
        stream, lane = await left(world)
        (generation,) = world.generations._running.values()
        await eventually(lambda: not generation.readers)
        world.scheduler.targets.clear()

        worker.say(lane, "b", "c", first=1)
        worker.fail(lane, code, reason)

        settled = await world.only_settlement()
        assert (settled.closing.cause, settled.closing.output_tokens) == (cause, 3)
        assert settled.owed == (6 * NANOS_PER_TOKEN if cause.is_charged else 0)
        rest = world.client.resume(stream.generation_id, after=2)
        assert (await rest.failure()).reason.value == reason
        assert rest.text == "bc"


async def test_a_worker_that_says_too_much_is_cut_while_nobody_reads(tmp_path: Path) -> None:
    async with gateway(tmp_path, replay_window_s=0.1) as world:
        stream, lane = await left(world, Wish(on_disconnect=CONTINUE, most=3))
        world.workers[0].say(lane, *"bcde", first=1)

        assert await world.workers[0].next_abort() == lane
        settled = await world.only_settlement()
        assert (settled.closing.cause, settled.owed) == (EndCause.ENGINE_FAILURE, 0)
        assert settled.closing.output_tokens <= 3
        assert stream.text == "a"


async def test_a_caller_may_leave_before_a_worker_has_accepted(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        call = world.client.unary(DETACHED)
        execution = await worker.next_start()
        call.cancel()
        worker.accept(execution.lane)
        worker.say(execution.lane, "a")
        worker.end(execution.lane)

        settled = await world.only_settlement()

        assert settled.closing.cause is EndCause.COMPLETED
        assert settled.closing.output_tokens == 1


async def test_a_deadline_of_the_caller_does_not_end_it(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(DETACHED, timeout_s=0.1)
        execution = await world.accepted()
        # It has the method's own deadline instead.
        assert 500 < execution.budget.ToSeconds() <= 600
        await stream.failure()
        worker.say(execution.lane, "a")
        worker.end(execution.lane)

        assert (await world.only_settlement()).closing.cause is EndCause.COMPLETED


async def test_it_can_be_stopped_from_elsewhere(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream, lane = await left(world)

        await world.client.cancel(stream.generation_id)
        await world.client.cancel(stream.generation_id)

        assert await world.workers[0].next_abort() == lane
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.CLIENT_CANCELLED
        assert settled.owed == (3 + 1) * NANOS_PER_TOKEN
        error = await world.client.resume(stream.generation_id).failure()
        assert error.reason is Reason.GENERATION_CANCELLED


async def test_what_is_kept_of_all_is_bounded(tmp_path: Path) -> None:
    """While nothing can be dropped new work is refused; what runs is not harmed."""
    async with gateway(tmp_path, replay_total_bytes_max=1000) as world:
        (worker,) = world.workers
        stream = world.client.stream(DETACHED)
        execution = await world.accepted()
        worker.say(execution.lane, "x" * 2000)
        await stream.until(1)

        error = await world.client.stream(Wish()).failure()
        worker.end(execution.lane)
        await stream.rest()

        assert isinstance(error, ResourceExhausted)
        assert error.reason is Reason.QUEUE_FULL
        assert error.retry_after_s is not None
        assert stream.last.HasField("finished")


async def test_the_oldest_logs_make_room_for_new_work(tmp_path: Path) -> None:
    async with gateway(tmp_path, replay_total_bytes_max=3000) as world:
        (worker,) = world.workers
        ended = [await whole(world, "x" * 1000) for _ in range(2)]
        running = world.client.stream(DETACHED)
        execution = await world.accepted()
        worker.say(execution.lane, "x" * 1500)
        await running.until(1)

        fresh = await whole(world, "y")

        assert fresh.text == "y"
        error = await world.client.resume(ended[0].generation_id).failure()
        assert isinstance(error, OutOfRange)
        assert error.reason is Reason.REPLAY_EXPIRED
        assert (await world.client.resume(ended[1].generation_id).rest()).text == "x" * 1000
        worker.end(execution.lane)
        await running.rest()


async def whole(world: World, text: str) -> Reading:
    """Runs a generation of one token."""
    stream = world.client.stream(DETACHED)
    execution = await world.accepted()
    world.workers[0].say(execution.lane, text)
    world.workers[0].end(execution.lane)
    return await stream.rest()


async def test_a_result_that_somebody_waits_for_does_not_make_room(tmp_path: Path) -> None:
    """It is charged; so it has to arrive, however much is kept."""
    async with gateway(tmp_path, replay_total_bytes_max=1000) as world:
        (worker,) = world.workers
        call = world.client.unary(Wish(request_id="r-1"))
        execution = await world.accepted()
        worker.say(execution.lane, "x" * 2000)
        worker.end(execution.lane)

        generation = await answer(call)

        assert generation.outputs[0].text == "x" * 2000


async def test_the_drain_waits_for_it_and_the_end_of_the_grace_is_our_fault(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world:
        stream, lane = await left(world)
        draining = asyncio.create_task(world.generations.drain())
        await asyncio.sleep(0)
        assert (await world.client.stream().failure()).metadata == {"dependency": "gateway"}
        assert not draining.done()

        world.generations.stop()

        await draining
        assert await world.workers[0].next_abort() == lane
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.GATEWAY_LOST
        assert (settled.closing.output_tokens, settled.owed) == (1, 0)
        error = await world.client.resume(stream.generation_id).failure()
        assert error.reason is Reason.SERVICE_UNAVAILABLE


async def test_who_leaves_during_the_drain_pays_for_what_was_sent(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream()
        execution = await world.accepted()
        world.workers[0].say(execution.lane, "a")
        await stream.until(1)
        draining = asyncio.create_task(world.generations.drain())
        await asyncio.sleep(0)

        stream.call.cancel()
        await draining

        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.CLIENT_CANCELLED
        assert settled.owed == (3 + 1) * NANOS_PER_TOKEN


async def test_a_drain_that_runs_out_of_time_ends_streams_with_a_reason_and_for_free(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream()
        execution = await world.accepted()
        world.workers[0].say(execution.lane, "a")
        await stream.until(1)

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await world.generations.drain()

        assert (await stream.failure()).reason is Reason.SERVICE_UNAVAILABLE
        assert await world.workers[0].next_abort() == execution.lane
        settled = await world.only_settlement()
        assert (settled.closing.cause, settled.owed) == (EndCause.GATEWAY_LOST, 0)


async def test_a_drain_waits_for_streams_and_refuses_new_ones(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream()
        execution = await world.accepted()
        draining = asyncio.create_task(world.generations.drain())
        await asyncio.sleep(0)

        refused = await world.client.stream().failure()
        world.workers[0].end(execution.lane)
        await stream.rest()
        await draining

        assert refused.reason is Reason.SERVICE_UNAVAILABLE
        assert stream.last.HasField("finished")


@pytest.mark.parametrize("how", ["stream", "unary"])
async def test_what_the_end_of_the_grace_cuts_is_free(tmp_path: Path, how: str) -> None:
    async with gateway(tmp_path) as world:
        failing: asyncio.Task[MaasError]
        if how == "stream":
            failing = asyncio.create_task(world.client.stream().failure())
        else:
            failing = asyncio.create_task(refusal(world.client.unary()))
        execution = await world.accepted()
        world.workers[0].say(execution.lane, "a")
        await eventually(lambda: bool(world.generations._running))

        world.generations.stop()

        assert (await failing).reason is Reason.SERVICE_UNAVAILABLE
        settled = await world.only_settlement()
        assert (settled.closing.cause, settled.owed) == (EndCause.GATEWAY_LOST, 0)
