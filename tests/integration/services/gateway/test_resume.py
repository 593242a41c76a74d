"""Streams that are read on, or again: nothing is lost, doubled or renumbered."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.errors import (
    FailedPrecondition,
    InvalidArgument,
    MaasError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from libs.testing import eventually
from services.gateway.domain import EndCause
from services.gateway.requests import READERS_MAX
from tests.integration.services.gateway.client import CONTINUE, Reading, Wish
from tests.integration.services.gateway.harness import World, gateway
from tests.integration.services.gateway.neighbours import BOB, EVE, NANOS_PER_TOKEN
from tests.integration.services.gateway.richly import Rich, called, chat, deltas_of, tell

DETACHED = Wish(on_disconnect=CONTINUE, with_ids=True)
KEYED = Wish(request_id="r-1", with_ids=True)


async def finished(world: World, wish: Wish = DETACHED, words: str = "abc") -> Reading:
    """Runs a generation to its end, one frame for each word."""
    stream = world.client.stream(wish)
    execution = await world.accepted()
    for number, word in enumerate(words):
        world.workers[0].say(execution.lane, word, first=number)
        await stream.until(number + 1)
    world.workers[0].end(execution.lane)
    return await stream.rest()


async def refused(world: World, generation_id: str, after: int = 0) -> MaasError:
    """Asks for frames that there are not."""
    return await world.client.resume(generation_id, after).failure()


@pytest.mark.parametrize("how", ["cancelled", "dropped"])
async def test_a_stream_goes_on_where_its_caller_has_lost_it(tmp_path: Path, how: str) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        lost = world.dial()
        stream = lost.stream(DETACHED)
        execution = await world.accepted()
        worker.say(execution.lane, "a", "b")
        await stream.until(2)
        if how == "cancelled":
            stream.call.cancel()
        await lost.drop()
        worker.say(execution.lane, "c", "d", first=2)

        rest = await world.client.resume(stream.generation_id, stream.last.sequence).until(4)
        worker.say(execution.lane, "e", first=4)
        worker.end(execution.lane)
        await rest.rest()

        sequences = stream.sequences + rest.sequences
        assert stream.text + rest.text == "abcde"
        assert stream.token_ids + rest.token_ids == [0, 1, 2, 3, 4]
        assert sequences == list(range(1, len(sequences) + 1))
        assert rest.last.finished.usage.output_tokens == 5
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.COMPLETED
        assert settled.owed == (3 + 5) * NANOS_PER_TOKEN


async def test_missed_frames_may_come_as_one_that_names_the_first(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        whole = await finished(world, words="abcd")

        again = await world.client.resume(whole.generation_id, after=2).rest()

        # Frame 1 is `started`, 2 to 5 are the deltas; the end may have a frame of its own.
        merged = again.frames[0]
        assert merged.first_sequence == 3
        assert merged.sequence >= 5
        assert merged.delta.outputs[0].text == "bcd"
        assert list(merged.delta.outputs[0].token_ids) == [1, 2, 3]
        assert merged.output_tokens == 4


async def test_a_finished_generation_is_replayed_whole(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        whole = await finished(world)

        again = await world.client.resume(whole.generation_id).rest()

        assert again.text == whole.text
        assert again.token_ids == whole.token_ids
        assert again.sequences == whole.sequences
        assert again.frames[0].started == whole.frames[0].started
        assert again.last == whole.last
        ends = [out.end for frame in again.frames for out in frame.delta.outputs]
        assert [end.reason for end in ends if end.reason] == [1]


async def test_every_place_to_go_on_from_gives_the_rest(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        whole = await finished(world)
        last = whole.last.sequence

        for after in range(last + 1):
            rest = await world.client.resume(whole.generation_id, after).rest()
            assert rest.sequences == list(range(after + 1, last + 1))
            kept = [frame for frame in whole.frames if frame.sequence > after]
            assert rest.text == Reading(whole.call, kept).text
            assert rest.token_ids == Reading(whole.call, kept).token_ids


async def test_several_readers_get_the_same_at_the_same_time(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        first = world.client.stream(DETACHED)
        execution = await world.accepted()
        await first.until(0)
        readers = [first]
        async with world.dial(BOB) as other:
            for number, word in enumerate("abcdef"):
                # One more reader before each token, from the start or from here on.
                if number % 2:
                    readers.append(other.resume(first.generation_id))
                worker.say(execution.lane, word, first=number)
                for reader in readers:
                    await reader.until(number + 1)
            worker.end(execution.lane)
            for reader in readers:
                await reader.rest()

        assert {reader.text for reader in readers} == {"abcdef"}
        assert [reader.token_ids for reader in readers] == [list(range(6))] * 4
        assert [reader.sequences for reader in readers] == [first.sequences] * 4
        assert (await world.only_settlement()).owed == (3 + 6) * NANOS_PER_TOKEN


async def test_a_reader_may_leave_without_harm_to_the_others(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(KEYED)
        execution = await world.accepted()
        worker.say(execution.lane, "a")
        await stream.until(1)
        other = await world.client.resume(stream.generation_id).until(1)

        stream.call.cancel()
        worker.say(execution.lane, "b", first=1)
        await other.until(2)
        worker.end(execution.lane)
        await other.rest()

        assert other.text == "ab"
        assert (await world.only_settlement()).closing.cause is EndCause.COMPLETED


async def test_a_place_behind_the_last_frame_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        whole = await finished(world)

        error = await refused(world, whole.generation_id, whole.last.sequence + 1)

        assert isinstance(error, InvalidArgument)
        assert [item.field for item in error.violations] == ["after_sequence"]


async def test_other_projects_may_not_read_along(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, world.dial(EVE) as eve:
        running = await finished(world)
        stream = await begun(world)

        for generation_id in (running.generation_id, stream.generation_id):
            error = await eve.resume(generation_id).failure()
            assert isinstance(error, PermissionDenied)
            with pytest.raises(PermissionDenied):
                await eve.cancel(generation_id)
        stream.call.cancel()


async def begun(world: World, wish: Wish = KEYED) -> Reading:
    """Starts a generation that does not end."""
    stream = world.client.stream(wish)
    execution = await world.accepted()
    world.workers[0].say(execution.lane, "a")
    return await stream.until(1)


async def test_what_is_not_kept_cannot_be_read_on(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = await begun(world, Wish())
        while_it_runs = await refused(world, stream.generation_id)
        stream.call.cancel()
        await world.only_settlement()
        afterwards = await refused(world, stream.generation_id)

        for error in (while_it_runs, afterwards):
            assert isinstance(error, FailedPrecondition)
            assert error.reason is Reason.NOT_RESUMABLE
            assert error.metadata == {"generationId": stream.generation_id}


async def test_the_replay_window_ends(tmp_path: Path) -> None:
    async with gateway(tmp_path, replay_window_s=0.1) as world:
        whole = await finished(world)
        await eventually(lambda: world.budget.used == 0)

        error = await refused(world, whole.generation_id)

        assert isinstance(error, OutOfRange)
        assert error.reason is Reason.REPLAY_EXPIRED
        assert error.metadata == {"generationId": whole.generation_id}


@pytest.mark.parametrize(
    "generation_id",
    [
        "gen_g1_nonsense",
        "gen_g2_01ARYZ6S410000000000000000",
        "x",
        "gen_g1_7ZZZZZZZZZ0000000000000000",
    ],
)
async def test_what_never_was_is_not_found(tmp_path: Path, generation_id: str) -> None:
    """No id, another gateway's, no gateway's, and one from the future."""
    async with gateway(tmp_path) as world:
        error = await refused(world, generation_id)

        assert isinstance(error, NotFound)
        assert error.reason is Reason.GENERATION_NOT_FOUND


async def test_a_log_that_was_outgrown_gives_what_it_still_has(tmp_path: Path) -> None:
    async with gateway(tmp_path, replay_bytes_max=300) as world:
        whole = await finished(world, words="abcdef")

        error = await refused(world, whole.generation_id)
        end = await world.client.resume(whole.generation_id, whole.last.sequence - 2).rest()

        assert isinstance(error, OutOfRange)
        assert error.reason is Reason.REPLAY_EXPIRED
        assert end.last == whole.last


async def test_a_failed_generation_is_replayed_and_then_fails_again(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(DETACHED)
        execution = await world.accepted()
        worker.say(execution.lane, "a")
        await stream.until(1)
        worker.fail(execution.lane, 13, "ENGINE_FAILURE")
        first = await stream.failure()

        again = world.client.resume(stream.generation_id)
        second = await again.failure()

        assert again.text == "a"
        assert again.kinds == ["started", "delta"]
        assert (first.code, first.reason) == (second.code, second.reason)
        assert second.reason is Reason.ENGINE_FAILURE
        assert (await world.only_settlement()).owed == 0


async def test_a_failed_generation_gives_everybody_its_own_error(tmp_path: Path) -> None:
    async with gateway(tmp_path, move_wait_s=0.01) as world:
        stream = await begun(world)
        other = await world.client.resume(stream.generation_id).until(1)

        world.workers[0].break_stream()
        errors = [await stream.failure(), await other.failure()]

        assert [type(error) for error in errors] == [Unavailable, Unavailable]


async def test_readers_of_one_generation_are_bounded(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, world.dial() as client:
        stream = await begun(world)
        others = [client.resume(stream.generation_id) for _ in range(READERS_MAX - 1)]
        for other in others:
            await other.until(1)

        errors = [
            await world.client.resume(stream.generation_id).failure(),
            await world.client.stream(KEYED).failure(),
        ]
        others[0].call.cancel()
        await eventually(lambda: len(world.generations._reading) == READERS_MAX - 1)
        late = await world.client.resume(stream.generation_id).until(1)
        world.workers[0].end(1)
        ends = [(await reader.rest()).last for reader in (stream, *others[1:], late)]

        for error in errors:
            assert isinstance(error, ResourceExhausted)
            assert error.reason is Reason.QUEUE_FULL
            assert error.retry_after_s is not None
        assert all(end.HasField("finished") for end in ends)
        assert (await world.only_settlement()).closing.cause is EndCause.COMPLETED


async def test_calls_that_wait_for_one_admission_are_bounded(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, world.dial() as client:
        calls = [client.stream(KEYED) for _ in range(READERS_MAX)]
        entries = world.generations._requests._by_key
        await eventually(lambda: [entry.waiting for entry in entries.values()] == [READERS_MAX])

        error = await world.client.stream(KEYED).failure()
        execution = await world.accepted()
        world.workers[0].end(execution.lane)
        for call in calls:
            await call.rest()

        assert error.reason is Reason.QUEUE_FULL
        assert all(call.last.HasField("finished") for call in calls)
        await world.only_settlement()


async def test_a_call_of_a_tool_goes_on_from_any_of_its_parts(tmp_path: Path) -> None:
    parts = ['{"a"', ":", "[1,", "2]", "}"]
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(Rich(change=chat, on_disconnect=CONTINUE, with_ids=True))
        lane = (await world.accepted()).lane
        tell(worker, lane, called(parts[0], id_="c", name="f"), token_ids=[0])
        for number, part in enumerate(parts[1:], 1):
            await stream.until(number)
            tell(worker, lane, called(part), token_ids=[number])
        worker.end(lane)
        await stream.rest()

        for after in range(1, len(parts) + 1):
            again = await world.client.resume(stream.generation_id, after=after).rest()
            made = [delta for delta in deltas_of(again) if delta.HasField("tool_call")]
            assert [delta.tool_call.arguments_json for delta in made] == parts[after - 1 :]
            assert [delta.tool_call.name for delta in made[:1]] == ["f" if after == 1 else ""]
            assert again.token_ids == list(range(after - 1, len(parts)))
