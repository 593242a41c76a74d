"""Generations that go on with another worker when theirs is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from maas.engine.v1 import engine_pb2
from typing_extensions import override

from libs.errors import Internal, Reason
from libs.testing import eventually
from services.gateway.domain import EndCause
from services.gateway.placement import Target
from services.gateway.running import MOVES_MAX
from tests.integration.services.gateway.client import CONTINUE, Reading, Wish, answer
from tests.integration.services.gateway.harness import Worker, World, gateway
from tests.integration.services.gateway.neighbours import ALICE, NANOS_PER_TOKEN, revoke

IDS = Wish(with_ids=True)
SLOW = Wish(with_ids=True, interval_s=1.0)


async def begun(world: World, wish: Wish = IDS) -> tuple[Reading, engine_pb2.Execution]:
    """Starts a generation on the first worker and reads its first two tokens."""
    stream = world.client.stream(wish)
    execution = await world.accepted()
    world.workers[0].say(execution.lane, "a", "b")
    return await stream.until(2), execution


async def test_the_output_goes_on_exactly_behind_what_was_sent(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        first, second = world.workers
        stream, before = await begun(world)

        first.break_stream()
        after = await world.accepted(second)
        second.say(after.lane, "c", "d", first=2)
        second.end(after.lane)
        await stream.rest()

        assert list(after.continue_token_ids) == [0, 1]
        assert stream.text == "abcd"
        assert stream.token_ids == [0, 1, 2, 3]
        assert stream.sequences == list(range(1, stream.last.sequence + 1))
        assert stream.last.finished.usage.input_tokens == 3
        assert stream.last.finished.charge.nanos == (3 + 4) * NANOS_PER_TOKEN
        assert (await world.only_settlement()).owed == (3 + 4) * NANOS_PER_TOKEN
        assert before.execution_id != after.execution_id
        assert same_but_place(before, after)


def same_but_place(one: engine_pb2.Execution, other: engine_pb2.Execution) -> bool:
    """Tells whether two attempts ask for the same."""
    blank = []
    for execution in (one, other):
        copy = engine_pb2.Execution()
        copy.CopyFrom(execution)
        for field in ("lane", "execution_id", "epoch", "continue_token_ids", "budget"):
            copy.ClearField(field)
        blank.append(copy)
    return blank[0] == blank[1]


async def test_tokens_that_came_and_were_not_sent_yet_are_kept(tmp_path: Path) -> None:
    """The second chunk waits for the reader's interval when the worker is lost."""
    async with gateway(tmp_path, worker_count=2) as world:
        first, second = world.workers
        stream = world.client.stream(SLOW)
        execution = await world.accepted()
        first.say(execution.lane, "a")
        await stream.until(1)
        first.say(execution.lane, "b", "c", first=1)

        first.break_stream()
        after = await world.accepted(second)
        second.say(after.lane, "d", first=3)
        second.end(after.lane)
        await stream.rest()

        assert list(after.continue_token_ids) == [0, 1, 2]
        assert stream.text == "abcd"
        assert stream.token_ids == [0, 1, 2, 3]


async def test_a_unary_call_notices_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        first, second = world.workers
        call = world.client.unary(IDS)
        execution = await world.accepted()
        first.say(execution.lane, "a", "b")

        first.break_stream()
        after = await world.accepted(second)
        second.say(after.lane, "c", first=2)
        second.end(after.lane)
        generation = await answer(call)

        assert list(after.continue_token_ids) == [0, 1]
        assert generation.outputs[0].text == "abc"
        assert list(generation.outputs[0].token_ids) == [0, 1, 2]
        assert (await world.only_settlement()).owed == (3 + 3) * NANOS_PER_TOKEN


async def test_a_detached_generation_moves_while_nobody_reads(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        first, second = world.workers
        stream, _ = await begun(world, Wish(on_disconnect=CONTINUE, with_ids=True))
        stream.call.cancel()

        first.break_stream()
        after = await world.accepted(second)
        second.say(after.lane, "c", first=2)
        second.end(after.lane)

        assert (await world.only_settlement()).owed == (3 + 3) * NANOS_PER_TOKEN
        whole = await world.client.resume(stream.generation_id).rest()
        assert (whole.text, whole.token_ids) == ("abc", [0, 1, 2])


async def test_a_reader_may_come_while_it_moves(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        first, second = world.workers
        stream, _ = await begun(world, Wish(request_id="r-1"))
        first.break_stream()
        after = await second.next_start()

        other = await world.client.resume(stream.generation_id).until(2)
        second.accept(after.lane)
        second.say(after.lane, "c", first=2)
        second.end(after.lane)

        assert (await other.rest()).text == (await stream.rest()).text == "abc"


async def test_a_worker_that_drains_is_left(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        first, second = world.workers
        stream, execution = await begun(world)

        first.fail(execution.lane, 14, "WORKER_DRAINING")
        after = await world.accepted(second)
        second.say(after.lane, "c", first=2)
        second.end(after.lane)

        assert (await stream.rest()).text == "abc"
        assert list(after.continue_token_ids) == [0, 1]
        assert (await world.only_settlement()).closing.cause is EndCause.COMPLETED


async def test_a_failure_of_the_engine_is_not_carried_to_another_worker(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        stream, execution = await begun(world)

        world.workers[0].fail(execution.lane, 13, "ENGINE_FAILURE")

        assert (await stream.failure()).reason is Reason.ENGINE_FAILURE
        assert world.workers[1].requests.empty()


async def test_an_end_that_came_before_the_loss_counts(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        stream, execution = await begun(world)

        world.workers[0].end(execution.lane)
        world.workers[0].break_stream()

        assert (await stream.rest()).last.HasField("finished")
        assert world.workers[1].requests.empty()


async def test_the_only_worker_may_come_back(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream, _ = await begun(world)

        worker.break_stream()
        after = await world.accepted()
        worker.say(after.lane, "c", first=2)
        worker.end(after.lane)

        assert (await stream.rest()).text == "abc"
        assert list(after.continue_token_ids) == [0, 1]
        assert worker.streams == 2
        await world.only_settlement()


async def test_a_request_that_loses_worker_after_worker_ends_and_is_free(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2, move_wait_s=60.0) as world:
        stream, _ = await begun(world)
        for number in range(MOVES_MAX):
            world.workers[number % 2].break_stream()
            worker = world.workers[(number + 1) % 2]
            after = await world.accepted(worker)
            assert len(after.continue_token_ids) == 2 + number
            worker.say(after.lane, "x", first=2 + number)
            await stream.until(3 + number)

        world.workers[MOVES_MAX % 2].break_stream()
        error = await stream.failure()

        assert error.reason is Reason.WORKER_LOST
        assert stream.text == "ab" + "x" * MOVES_MAX
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.WORKER_LOST
        assert (settled.closing.output_tokens, settled.owed) == (2 + MOVES_MAX, 0)


async def test_without_another_worker_it_ends_in_time_and_is_free(tmp_path: Path) -> None:
    async with gateway(tmp_path, move_wait_s=0.05) as world:
        stream, _ = await begun(world)

        world.scheduler.targets.clear()
        world.workers[0].break_stream()
        error = await stream.failure()

        assert error.reason is Reason.WORKER_LOST
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.WORKER_LOST
        assert (settled.closing.output_tokens, settled.owed) == (2, 0)


async def test_a_worker_that_does_not_answer_is_not_waited_for_longer(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2, move_wait_s=0.05) as world:
        first, second = world.workers
        stream, _ = await begun(world)

        first.break_stream()
        silent = await second.next_start()
        error = await stream.failure()

        assert error.reason is Reason.WORKER_LOST
        assert await second.next_abort() == silent.lane
        assert (await world.only_settlement()).closing.cause is EndCause.WORKER_LOST


async def test_a_worker_that_counts_the_prompt_otherwise_is_refused(tmp_path: Path) -> None:
    """Another tokenizer or template: it would go on with another text."""
    async with gateway(tmp_path, worker_count=2) as world:
        first, second = world.workers
        stream, _ = await begun(world)

        first.break_stream()
        after = await world.accepted(second, input_tokens=4)
        second.say(after.lane, "z", first=2)
        error = await stream.failure()

        assert error.reason is Reason.WORKER_LOST
        assert stream.text == "ab"
        assert await second.next_abort() == after.lane
        settled = await world.only_settlement()
        assert (settled.closing.cause, settled.owed) == (EndCause.WORKER_LOST, 0)


def leave(_: World, stream: Reading) -> None:
    stream.call.cancel()


def take_away_key(world: World, _: Reading) -> None:
    revoke(world.keys, ALICE)


def end_grace(world: World, _: Reading) -> None:
    world.generations.stop()


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (leave, EndCause.CLIENT_CANCELLED),
        (take_away_key, EndCause.REVOKED),
        (end_grace, EndCause.GATEWAY_LOST),
    ],
)
async def test_what_ends_while_it_moves_leaves_nothing_running(
    tmp_path: Path, end: Callable[[World, Reading], None], cause: EndCause
) -> None:
    async with gateway(tmp_path, worker_count=2, move_wait_s=60.0) as world:
        first, second = world.workers
        stream, _ = await begun(world)
        first.break_stream()
        after = await second.next_start()

        end(world, stream)

        assert await second.next_abort() == after.lane
        settled = await world.only_settlement()
        assert settled.closing.cause is cause
        assert settled.owed == (5 * NANOS_PER_TOKEN if cause.is_charged else 0)
        assert world.scheduler.released == [f"slot-{after.execution_id}"]


async def test_many_generations_move_at_once(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        first, second = world.workers
        streams = [(await begun(world))[0] for _ in range(6)]

        first.break_stream()
        for _ in streams:
            await say_the_rest(world, second)
        for stream in streams:
            await stream.rest()

        assert [stream.text for stream in streams] == ["abc"] * 6
        await world.settlements(6)
        await eventually(lambda: not world.generations._running)


async def say_the_rest(world: World, worker: Worker) -> None:
    """Takes a generation over and ends it."""
    after = await world.accepted(worker)
    worker.say(after.lane, "c", first=2)
    worker.end(after.lane)


class Torn(list[Target]):
    """Workers with a defect."""

    @override
    def __iter__(self) -> Iterator[Target]:
        """Fails."""
        raise RuntimeError("a defect")


async def test_a_defect_while_it_moves_ends_that_generation_and_nothing_else(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        stream, _ = await begun(world)
        working, world.scheduler.targets = world.scheduler.targets, Torn()

        world.workers[0].break_stream()
        error = await stream.failure()

        assert isinstance(error, Internal)
        assert error.reason is Reason.INTERNAL
        settled = await world.only_settlement()
        assert (settled.closing.cause, settled.owed) == (EndCause.GATEWAY_LOST, 0)
        assert world.failures == []
        world.scheduler.targets = working[1:]
        other = world.client.stream()
        world.workers[1].end((await world.accepted(world.workers[1])).lane)
        assert (await other.rest()).last.HasField("finished")
