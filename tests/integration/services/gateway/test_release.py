"""Release: counted before it is sent, once per turn for all, and one defect stays alone."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path

from maas.engine.v1 import engine_pb2
from maas.inference.v1.generation_service_pb2 import StreamGenerateResponse
from typing_extensions import override

from libs.auth import Principal, Role
from libs.errors import Reason
from libs.testing import eventually
from services.gateway.domain import EndCause
from services.gateway.journal import Journal
from services.gateway.reader import Reader
from services.gateway.replay import Budget, ReplayLog
from tests.integration.services.gateway.client import CONTINUE, Reading, Wish, answer, refusal
from tests.integration.services.gateway.harness import END, World, gateway
from tests.integration.services.gateway.neighbours import ALICE, NANOS_PER_TOKEN

LATER = datetime(2027, 1, 1, tzinfo=UTC)


class NotingJournal(Journal):
    """The real one; notes the batches of counts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.batches: list[list[tuple[int, int]]] = []

    @override
    def progress(self, counts: list[tuple[int, int]]) -> None:
        """Notes a batch, and writes it."""
        self.batches.append(list(counts))
        super().progress(counts)


def fill_disk(journal: Journal) -> int:
    """Has every further write fail as on a full disk; returns the descriptor that works."""
    working = journal._descriptor
    journal._descriptor = os.open("/dev/full", os.O_WRONLY)
    return working


def free_disk(journal: Journal, working: int) -> None:
    """Undoes `fill_disk`."""
    os.close(journal._descriptor)
    journal._descriptor = working


async def begun(
    world: World, count: int, wish: Wish | None = None
) -> tuple[list[Reading], list[int]]:
    """Starts generations; returns their streams and lanes."""
    streams = []
    lanes = []
    for _ in range(count):
        streams.append(world.client.stream(wish))
        lanes.append((await world.accepted()).lane)
        await streams[-1].until(0)
    return streams, lanes


async def test_one_message_for_many_generations_is_one_write(tmp_path: Path) -> None:
    async with gateway(tmp_path, make_journal=NotingJournal) as world:
        assert isinstance(world.journal, NotingJournal)
        streams, lanes = await begun(world, 5)

        world.workers[0].step(lanes, ["a"] * 5)
        for stream in streams:
            await stream.until(1)

        assert world.journal.batches == [[(ordinal, 1) for ordinal in range(1, 6)]]
        for stream in streams:
            stream.call.cancel()


async def test_what_is_sent_is_in_the_journal_before(tmp_path: Path) -> None:
    """What a process finds that starts after a kill, at every frame that a client has."""
    async with gateway(tmp_path) as world:
        (stream,), (lane,) = await begun(world, 1)
        for number in range(5):
            world.workers[0].say(lane, "x", first=number)
            await stream.until(number + 1)
            world.journal._earlier = [world.journal._path(world.journal._number)]
            ((_, closing),) = world.journal.recover(LATER).settlements
            assert closing.output_tokens == stream.last.output_tokens == number + 1
            assert closing.cause is EndCause.GATEWAY_LOST
        stream.call.cancel()


async def test_what_cannot_be_counted_is_not_sent_and_not_charged(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        streams, lanes = await begun(world, 2)
        call = world.client.unary()
        unary = await world.accepted()
        await eventually(lambda: len(world.generations._running) == 3)
        working = fill_disk(world.journal)

        world.workers[0].step(lanes, ["a", "b"])
        errors = [await stream.failure() for stream in streams]
        world.workers[0].say(unary.lane, "c")
        world.workers[0].end(unary.lane)
        errors.append(await refusal(call))
        free_disk(world.journal, working)

        for error in errors:
            assert error.reason is Reason.SERVICE_UNAVAILABLE
            assert error.metadata == {"dependency": "journal"}
        assert [stream.kinds for stream in streams] == [["started"]] * 2
        settled = await world.settlements(3)
        assert [(item.closing.cause, item.owed) for item in settled] == [
            (EndCause.GATEWAY_LOST, 0)
        ] * 3
        aborted = {await world.workers[0].next_abort() for _ in lanes}
        assert aborted == set(lanes)


async def test_what_cannot_be_counted_is_not_replayed_either(tmp_path: Path) -> None:
    """And the record counts what was sent."""
    async with gateway(tmp_path) as world:
        (stream,), (lane,) = await begun(world, 1, Wish(request_id="r-1"))
        world.workers[0].say(lane, "a")
        await stream.until(1)
        working = fill_disk(world.journal)

        world.workers[0].say(lane, "b", "c", first=1)
        first = await stream.failure()
        again = world.client.resume(stream.generation_id, after=2)
        second = await again.failure()
        free_disk(world.journal, working)

        assert (stream.text, again.frames) == ("a", [])
        for error in (first, second):
            assert error.metadata == {"dependency": "journal"}
        settled = await world.only_settlement()
        assert (settled.closing.output_tokens, settled.owed) == (1, 0)
        assert world.budget.used == 0


async def test_without_a_journal_replays_go_on(tmp_path: Path) -> None:
    """Also beside output of the same turn that cannot be counted."""
    async with gateway(tmp_path) as world:
        streams, lanes = await begun(world, 2, Wish(on_disconnect=CONTINUE))
        ended, running = world.generations._running.values()
        world.workers[0].say(lanes[0], "a")
        world.workers[0].end(lanes[0])
        await streams[0].rest()
        working = fill_disk(world.journal)
        got: list[bytes] = []

        async def write(response: bytes) -> None:
            got.append(response)

        reader = Reader(ALICE.key_id, write=write)
        ended.attach(reader)
        running._sink.inlets[0].push("b", [1])
        async with asyncio.timeout(5):
            await reader.done
        ended.detach(reader)

        assert (await streams[1].failure()).metadata == {"dependency": "journal"}
        free_disk(world.journal, working)
        frames = [StreamGenerateResponse.FromString(response).frame for response in got]
        assert [frame.output_tokens for frame in frames] == [0, 1, 1]
        assert frames[-1].HasField("finished")


async def test_a_defect_at_one_end_leaves_the_other_ends_of_the_turn_alone(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world:
        streams, lanes = await begun(world, 3)
        (_, bad, _) = world.generations._running.values()
        # As if more were owed than is held: the book of slices asserts that it is not.
        world.book.shrink(bad._hold, 0)
        world.workers[0].step(lanes, ["a", "b", "c"])
        for stream in streams:
            await stream.until(1)

        world.workers[0].responses.put_nowait(
            engine_pb2.StepEvents(ended=[engine_pb2.Ended(lane=lane, end=END) for lane in lanes])
        )
        error = await streams[1].failure()
        for stream in (streams[0], streams[2]):
            assert (await stream.rest()).last.HasField("finished")

        assert error.reason is Reason.INTERNAL
        settled = {item.opening.generation_id: item for item in await world.settlements(3)}
        ours = settled.pop(streams[1].generation_id)
        assert (ours.closing.cause, ours.owed) == (EndCause.GATEWAY_LOST, 0)
        assert {item.owed for item in settled.values()} == {(3 + 1) * NANOS_PER_TOKEN}
        assert not world.generations._running


async def test_without_a_journal_nothing_is_started(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        await warm(world)
        working = fill_disk(world.journal)
        stream = world.client.stream()
        execution = await world.accepted()

        error = await stream.failure()
        free_disk(world.journal, working)

        assert error.metadata == {"dependency": "journal"}
        assert await world.workers[0].next_abort() == execution.lane
        assert (await world.only_settlement()).closing.cause is EndCause.COMPLETED


async def warm(world: World) -> None:
    """Runs a generation, so that there is a credit slice."""
    stream = world.client.stream()
    execution = await world.accepted()
    world.workers[0].end(execution.lane)
    await stream.rest()


async def test_an_end_that_cannot_be_journaled_is_settled_all_the_same(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (stream,), (lane,) = await begun(world, 1)
        world.workers[0].say(lane, "a")
        await stream.until(1)
        working = fill_disk(world.journal)

        stream.call.cancel()
        assert await world.workers[0].next_abort() == lane
        free_disk(world.journal, working)

        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.CLIENT_CANCELLED
        assert settled.owed == (3 + 1) * NANOS_PER_TOKEN


class TornLog(ReplayLog):
    """A log with a defect."""

    @override
    def append(self, text: str, output_tokens: int) -> None:
        """Fails."""
        del text, output_tokens
        raise RuntimeError("a defect")


async def test_the_defect_of_one_generation_stays_its_own(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (bad,), (bad_lane,) = await begun(world, 1, Wish(request_id="r-1"))
        streams, lanes = await begun(world, 2)
        principal = Principal(
            key_id=ALICE.key_id, role=Role.TENANT, project=ALICE.project, organization="o"
        )
        generation = world.generations.find(bad.generation_id, principal)
        generation.log = TornLog(Budget(1000), 1000)

        world.workers[0].step([lanes[0], bad_lane, lanes[1]], ["a", "b", "c"])
        error = await bad.failure()
        for lane in lanes:
            world.workers[0].end(lane)
        for stream in streams:
            await stream.rest()

        assert error.reason is Reason.INTERNAL
        assert [stream.text for stream in streams] == ["a", "c"]
        settled = {item.opening.generation_id: item for item in await world.settlements(3)}
        ours = settled.pop(bad.generation_id)
        assert (ours.closing.cause, ours.owed) == (EndCause.GATEWAY_LOST, 0)
        assert {item.owed for item in settled.values()} == {(3 + 1) * NANOS_PER_TOKEN}


async def test_an_output_without_a_token_ends_well(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream, call = world.client.stream(), world.client.unary()
        for _ in range(2):
            execution = await world.accepted()
            world.workers[0].end(execution.lane)
        usages = [(await stream.rest()).last.finished.usage, (await answer(call)).usage]

        assert [(usage.input_tokens, usage.output_tokens) for usage in usages] == [(3, 0)] * 2
        settled = await world.settlements(2)
        assert [item.owed for item in settled] == [3 * NANOS_PER_TOKEN] * 2


async def test_what_fails_while_the_first_frame_is_on_its_way_fails_the_call(
    tmp_path: Path,
) -> None:
    """Until that one has left grpc refuses to take a status, and the client would wait for ever."""
    async with gateway(tmp_path) as world:
        stream = world.client.stream()
        await world.accepted()
        async with asyncio.timeout(5):
            while not any(reader.writing_since_s for reader in world.generations._reading):  # noqa: ASYNC110 - a state between two turns of the loop
                await asyncio.sleep(0)

        world.generations.stop()

        assert (await stream.failure()).reason is Reason.SERVICE_UNAVAILABLE
        assert (await world.only_settlement()).closing.cause is EndCause.GATEWAY_LOST
