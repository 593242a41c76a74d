"""Keys that are revoked while they are in use."""

from __future__ import annotations

from pathlib import Path

from libs.errors import Aborted, Reason, Unauthenticated
from libs.testing import eventually
from services.gateway.domain import EndCause
from tests.integration.services.gateway.client import CONTINUE, Client, Reading, Wish, refusal
from tests.integration.services.gateway.harness import World, gateway
from tests.integration.services.gateway.neighbours import (
    ALICE,
    BOB,
    EVE,
    NANOS_PER_TOKEN,
    revoke,
)

KEYED = Wish(request_id="r-1")


async def begun(world: World, client: Client, wish: Wish | None = None) -> tuple[Reading, int]:
    """Starts a generation and reads its first token; returns its stream and lane."""
    stream = client.stream(wish)
    execution = await world.accepted()
    world.workers[0].say(execution.lane, "a")
    return await stream.until(1), execution.lane


def assert_revoked(error: Exception) -> None:
    """Sees that a call was ended because of its key."""
    assert isinstance(error, Unauthenticated)
    assert error.reason is Reason.CREDENTIALS_REVOKED


def assert_cancelled(error: Exception, generation_id: str) -> None:
    """Sees that a call was ended because its generation was."""
    assert isinstance(error, Aborted)
    assert error.reason is Reason.GENERATION_CANCELLED
    assert error.metadata == {"generationId": generation_id}


async def test_running_calls_of_the_key_end_and_pay_what_was_sent(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream, lane = await begun(world, world.client)
        call = world.client.unary()
        unary = await world.accepted()
        await eventually(lambda: len(world.generations._running) == 2)

        revoke(world.keys, ALICE)

        assert_revoked(await stream.failure())
        assert_revoked(await refusal(call))
        assert {await worker.next_abort(), await worker.next_abort()} == {lane, unary.lane}
        settled = await world.settlements(2)
        assert {item.closing.cause for item in settled} == {EndCause.REVOKED}
        assert sorted(item.owed for item in settled) == [
            3 * NANOS_PER_TOKEN,
            4 * NANOS_PER_TOKEN,
        ]


async def test_streams_of_other_keys_go_on(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, world.dial(BOB) as bob, world.dial(EVE) as eve:
        mine, _ = await begun(world, world.client)
        others = [await begun(world, client) for client in (bob, eve)]

        revoke(world.keys, ALICE)
        await mine.failure()
        for stream, lane in others:
            world.workers[0].say(lane, "b", first=1)
            world.workers[0].end(lane)
            await stream.rest()

        assert [stream.text for stream, _ in others] == ["ab", "ab"]


async def test_a_detached_generation_ends_with_its_key(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, world.dial(BOB) as bob:
        stream, lane = await begun(world, world.client, Wish(on_disconnect=CONTINUE))
        stream.call.cancel()

        revoke(world.keys, ALICE)

        assert await world.workers[0].next_abort() == lane
        assert (await world.only_settlement()).closing.cause is EndCause.REVOKED
        assert_cancelled(await bob.resume(stream.generation_id).failure(), stream.generation_id)


async def test_to_good_keys_that_read_along_the_generation_is_cancelled(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, world.dial(BOB) as bob:
        stream, _ = await begun(world, world.client, KEYED)
        resumed = await bob.resume(stream.generation_id).until(1)
        joined = await bob.stream(KEYED).until(1)
        whole = bob.unary(KEYED)
        await eventually(lambda: len(world.generations._reading) == 4)

        revoke(world.keys, ALICE)

        assert_revoked(await stream.failure())
        for error in (await resumed.failure(), await joined.failure(), await refusal(whole)):
            assert_cancelled(error, stream.generation_id)
        assert (await world.only_settlement()).closing.cause is EndCause.REVOKED


async def test_a_good_key_that_waits_for_the_admission_of_a_revoked_one_is_told_so(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world, world.dial(BOB) as bob:
        (worker,) = world.workers
        first = world.client.stream(KEYED)
        execution = await worker.next_start()
        second = bob.stream(KEYED)
        entries = world.generations._requests._by_key
        await eventually(lambda: [entry.waiting for entry in entries.values()] == [2])

        revoke(world.keys, ALICE)
        worker.accept(execution.lane)

        assert_revoked(await first.failure())
        error = await second.failure()
        assert isinstance(error, Aborted)
        assert error.reason is Reason.GENERATION_CANCELLED
        await world.no_settlement()
        # The key of the request is free again.
        again = bob.stream(KEYED)
        world.workers[0].end((await world.accepted()).lane)
        assert (await again.rest()).last.HasField("finished")


async def test_who_reads_along_with_a_revoked_key_is_cut_and_the_generation_lives(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world, world.dial(BOB) as bob:
        stream, lane = await begun(world, world.client, KEYED)
        resumed = await bob.resume(stream.generation_id).until(1)
        joined = await bob.stream(KEYED).until(1)
        whole = bob.unary(KEYED)
        await eventually(lambda: len(world.generations._reading) == 4)

        revoke(world.keys, BOB)
        errors = [await resumed.failure(), await joined.failure(), await refusal(whole)]
        world.workers[0].say(lane, "b", first=1)
        world.workers[0].end(lane)
        await stream.rest()

        for error in errors:
            assert_revoked(error)
        assert stream.text == "ab"
        assert (await world.only_settlement()).closing.cause is EndCause.COMPLETED


async def test_a_key_revoked_during_admission_starts_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        calls = [world.client.stream(), world.client.stream(KEYED)]
        executions = [await worker.next_start() for _ in calls]

        revoke(world.keys, ALICE)
        for execution in executions:
            worker.accept(execution.lane)

        for call in calls:
            assert_revoked(await call.failure())
        aborted = {await worker.next_abort() for _ in calls}
        assert aborted == {execution.lane for execution in executions}
        await world.no_settlement()


async def test_a_key_revoked_while_it_waits_for_anothers_admission_gets_nothing(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world, world.dial(BOB) as bob:
        (worker,) = world.workers
        first = world.client.stream(KEYED)
        execution = await worker.next_start()
        second = bob.stream(KEYED)
        entries = world.generations._requests._by_key
        await eventually(lambda: [entry.waiting for entry in entries.values()] == [2])

        revoke(world.keys, BOB)
        worker.accept(execution.lane)
        worker.say(execution.lane, "a")
        worker.end(execution.lane)

        assert_revoked(await second.failure())
        assert second.frames == []
        assert (await first.rest()).text == "a"


async def test_a_revoked_key_that_waited_alone_leaves_nothing_running(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, world.dial(BOB) as bob:
        (worker,) = world.workers
        first = world.client.stream(KEYED)
        execution = await worker.next_start()
        second = bob.stream(KEYED)
        entries = world.generations._requests._by_key
        await eventually(lambda: [entry.waiting for entry in entries.values()] == [2])
        first.call.cancel()
        await eventually(lambda: [entry.waiting for entry in entries.values()] == [1])

        revoke(world.keys, BOB)
        worker.accept(execution.lane)

        assert_revoked(await second.failure())
        assert await worker.next_abort() == execution.lane
        assert (await world.only_settlement()).owed == 3 * NANOS_PER_TOKEN


async def test_new_calls_with_the_key_are_refused_at_the_door(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        revoke(world.keys, ALICE)

        assert_revoked(await world.client.stream().failure())
        assert world.workers[0].requests.empty()
