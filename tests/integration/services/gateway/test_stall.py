"""Clients that stop reading."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import override

from libs.auth import Principal, Role
from libs.errors import Reason
from libs.testing import eventually
from services.gateway.domain import EndCause
from tests.integration.services.gateway.client import CONTINUE, Reading, Wish
from tests.integration.services.gateway.harness import CountingClock, World, gateway
from tests.integration.services.gateway.neighbours import ALICE, NANOS_PER_TOKEN

# Together more than any window takes while nobody reads.
WORDS = 100
WORD = "x" * 200_000
STALL_S = 0.15


async def flooded(world: World, wish: Wish) -> tuple[Reading, int]:
    """Has a worker say more than the client reads; returns the client's call and the lane."""
    stream = world.client.stream(wish)
    execution = await world.accepted()
    await stream.until(0)
    for number in range(WORDS):
        world.workers[0].say(execution.lane, WORD, first=number)
    return stream, execution.lane


async def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path) -> None:
    async with gateway(tmp_path, stall_limit_s=STALL_S) as world:
        stream, lane = await flooded(world, Wish(most=1000))

        assert await world.workers[0].next_abort() == lane
        settled = await world.only_settlement()

        assert settled.closing.cause is EndCause.STALLED
        assert 0 < settled.closing.output_tokens < WORDS
        error = await stream.failure()
        assert error.reason is Reason.CONSUMER_STALLED
        assert error.metadata == {
            "stallSeconds": f"{STALL_S:g}",
            "generationId": stream.generation_id,
            "resumable": "false",
        }


async def test_a_detached_generation_outlives_the_client_that_does_not_read(
    tmp_path: Path,
) -> None:
    async with gateway(
        tmp_path, stall_limit_s=STALL_S, replay_bytes_max=2 * WORDS * len(WORD)
    ) as world:
        stream, lane = await flooded(world, Wish(most=1000, on_disconnect=CONTINUE))
        # Cut, but not before all that was sent has been read: the status comes behind it.
        await eventually(lambda: not readers(world, stream.generation_id))
        error = await stream.failure()
        world.workers[0].say(lane, "end", first=WORDS)
        world.workers[0].end(lane)
        rest = await world.client.resume(stream.generation_id, stream.last.sequence).rest()

        assert error.reason is Reason.CONSUMER_STALLED
        assert error.metadata["resumable"] == "true"
        assert stream.text + rest.text == WORD * WORDS + "end"
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.COMPLETED
        assert settled.owed == (3 + WORDS + 1) * NANOS_PER_TOKEN


def readers(world: World, generation_id: str) -> int:
    """Counts the calls that read a generation."""
    principal = Principal(
        key_id=ALICE.key_id, role=Role.TENANT, project=ALICE.project, organization="o"
    )
    return len(world.generations.find(generation_id, principal).readers)


async def test_a_replay_that_is_not_read_is_cut_off_too(tmp_path: Path) -> None:
    async with gateway(
        tmp_path, stall_limit_s=STALL_S, replay_bytes_max=2 * WORDS * len(WORD)
    ) as world:
        stream, lane = await flooded(world, Wish(most=1000, request_id="r-1"))
        world.workers[0].end(lane)
        await stream.rest()
        again = world.client.resume(stream.generation_id)
        assert await again.next() is not None
        await eventually(lambda: readers(world, stream.generation_id) == 1)
        await eventually(lambda: not readers(world, stream.generation_id))

        error = await again.failure()

        assert error.reason is Reason.CONSUMER_STALLED
        assert (await world.only_settlement()).closing.cause is EndCause.COMPLETED


async def test_one_stalled_reader_of_two_harms_only_itself(tmp_path: Path) -> None:
    async with gateway(
        tmp_path, stall_limit_s=STALL_S, replay_bytes_max=2 * WORDS * len(WORD)
    ) as world:
        (worker,) = world.workers
        stalled, lane = await flooded(world, Wish(most=1000, request_id="r-1"))
        async with world.dial() as client:
            reading = await client.resume(stalled.generation_id).until(WORDS)
            await eventually(lambda: readers(world, stalled.generation_id) == 1)
            worker.end(lane)
            await reading.rest()

        assert (await stalled.failure()).reason is Reason.CONSUMER_STALLED
        assert reading.text == WORD * WORDS
        assert (await world.only_settlement()).closing.cause is EndCause.COMPLETED


async def test_a_generation_is_cancelled_from_elsewhere_while_nobody_reads(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as world:
        stream, lane = await flooded(world, Wish(most=1000))
        async with world.dial() as client:
            await client.cancel(stream.generation_id)

        assert await world.workers[0].next_abort() == lane
        error = await stream.failure()
        assert error.reason is Reason.GENERATION_CANCELLED
        settled = await world.only_settlement()
        assert settled.closing.cause is EndCause.CLIENT_CANCELLED


class OtherZero(CountingClock):
    """A clock that counts from another moment than the event loop does."""

    @override
    def monotonic_s(self) -> float:
        """Seconds, a thousand more than the loop's."""
        return super().monotonic_s() + 1000


async def test_how_long_a_client_stalls_is_measured_with_one_clock(tmp_path: Path) -> None:
    clock = OtherZero()
    async with gateway(tmp_path, replay_window_s=0.02, clock=clock) as world:
        stream, _ = await flooded(world, Wish(most=1000))
        (reader,) = world.generations._reading
        await eventually(lambda: reader.writing_since_s is not None)

        await clock.rounds(3)

        assert not reader.done.done()
        stream.call.cancel()
