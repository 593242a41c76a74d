"""What piled up during a halt leaves in portions, so that who leaves pays for little of it."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from maas.engine.v1 import engine_pb2
from typing_extensions import override

from libs.clock import SystemClock
from libs.errors import DeadlineExceeded
from libs.testing import eventually
from services.gateway.domain import EndCause
from services.gateway.pacing import PORTION, SPAN_S
from tests.integration.services.gateway.client import CONTINUE, Reading, Wish
from tests.integration.services.gateway.harness import World, gateway
from tests.integration.services.gateway.richly import Rich, lanes_of, several

# The promise for a client that reads: docs/money.md.
OVER_MAX = 64
ROWS = 10
PILE = ROWS * PORTION


class ShiftedClock(SystemClock):
    """Real time, which can jump ahead as during a halt."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    @override
    def monotonic_s(self) -> float:
        """Seconds that never go back."""
        return super().monotonic_s() + self.ahead_s


async def piled_up(
    world: World, clock: ShiftedClock, wish: Wish, *, halt_s: float = 5.0
) -> tuple[Reading, int]:
    """Starts a stream, has it stand still, and sends what was made meanwhile."""
    stream = world.client.stream(wish)
    lane = (await world.accepted()).lane
    await stream.until(0)
    clock.ahead_s += halt_s
    for number in range(ROWS):
        events = engine_pb2.StepEvents(
            lanes=[lane],
            token_counts=[PORTION],
            token_ids=range(number * PORTION, (number + 1) * PORTION),
            texts=[f"{number} "],
        )
        world.workers[0].responses.put_nowait(events)
    return stream, lane


async def test_who_stays_gets_all_in_portions(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with gateway(tmp_path, clock=clock) as world:
        stream, lane = await piled_up(world, clock, Wish(most=2 * PILE, with_ids=True))
        world.workers[0].end(lane)

        await stream.rest()

        assert stream.token_ids == list(range(PILE))
        assert stream.sequences == list(range(1, stream.last.sequence + 1))
        counts = [frame.output_tokens for frame in stream.frames[1:-1]]
        assert counts == [PORTION * (number + 1) for number in range(ROWS)]
        assert (await world.only_settlement()).closing.output_tokens == PILE


async def test_who_leaves_pays_for_what_was_read_and_a_little_more(tmp_path: Path) -> None:
    """Without portions all of it would be counted by then."""
    clock = ShiftedClock()
    async with gateway(tmp_path, clock=clock) as world:
        stream, _ = await piled_up(world, clock, Wish(most=2 * PILE))
        await stream.until(PORTION)
        # Long enough for all of it to be released, if it were.
        await asyncio.sleep(SPAN_S / 2)

        stream.call.cancel()

        closing = (await world.only_settlement()).closing
        assert closing.cause is EndCause.CLIENT_CANCELLED
        assert 0 <= closing.output_tokens - stream.last.output_tokens <= OVER_MAX


async def test_a_pile_does_not_wait_for_the_interval_of_its_reader(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with gateway(tmp_path, clock=clock) as world:
        stream, lane = await piled_up(world, clock, Wish(most=2 * PILE, interval_s=1.0))
        # What comes behind it does.
        await asyncio.wait_for(stream.until(PILE), timeout=1 + 3 * ROWS * SPAN_S)
        frames = len(stream.frames)
        for number in range(2):
            world.workers[0].say(lane, "x", first=PILE + number)
        world.workers[0].end(lane)

        await stream.rest()

        assert len(stream.frames) == frames + 2
        assert stream.last.output_tokens == PILE + 2


async def test_what_nobody_reads_any_more_is_released_all_the_same(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with gateway(tmp_path, clock=clock) as world:
        stream, lane = await piled_up(world, clock, Wish(most=2 * PILE, on_disconnect=CONTINUE))
        await stream.until(PORTION)
        (generation,) = world.generations._running.values()

        stream.call.cancel()
        await eventually(lambda: generation.output_tokens == PILE)

        world.workers[0].end(lane)
        assert (await world.only_settlement()).closing.output_tokens == PILE


async def test_a_stream_that_is_fast_by_itself_does_not_pause(tmp_path: Path) -> None:
    """Packing is what makes it cheap."""
    clock = ShiftedClock()
    async with gateway(tmp_path, clock=clock) as world:
        # However slow this machine is, its mean is high.
        stream, _ = await piled_up(world, clock, Wish(most=2 * PILE), halt_s=-100.0)
        began = asyncio.get_running_loop().time()

        await stream.until(PILE)

        assert asyncio.get_running_loop().time() - began < (ROWS - 1) * SPAN_S
        stream.call.cancel()


async def test_what_waits_when_its_worker_is_lost_is_released_once_and_in_order(
    tmp_path: Path,
) -> None:
    clock = ShiftedClock()
    async with gateway(tmp_path, clock=clock, worker_count=2) as world:
        first, second = world.workers
        stream, _ = await piled_up(world, clock, Wish(most=2 * PILE, with_ids=True))
        await stream.until(PORTION)

        first.break_stream()
        after = await world.accepted(second)
        second.say(after.lane, "x", first=PILE)
        second.end(after.lane)
        await stream.rest()

        assert list(after.continue_token_ids) == list(range(PILE))
        assert stream.token_ids == list(range(PILE + 1))
        steps = [frame.output_tokens for frame in stream.frames[1:-1]]
        assert max(b - a for a, b in itertools.pairwise([0, *steps])) <= PORTION
        assert (await world.only_settlement()).closing.output_tokens == PILE + 1


async def test_who_comes_back_during_a_pause_reads_on_without_a_gap(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with gateway(tmp_path, clock=clock) as world:
        wish = Wish(most=2 * PILE, with_ids=True, on_disconnect=CONTINUE)
        stream, lane = await piled_up(world, clock, wish)
        await stream.until(PORTION)

        others = [world.client.resume(stream.generation_id, after) for after in (0, 1)]
        world.workers[0].end(lane)
        await asyncio.gather(stream.rest(), *(other.rest() for other in others))

        assert stream.token_ids == list(range(PILE))
        assert [other.token_ids for other in others] == 2 * [list(range(PILE))]
        assert (await world.only_settlement()).closing.output_tokens == PILE


async def test_a_deadline_in_a_pause_charges_what_was_released(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with gateway(tmp_path, clock=clock) as world:
        stream, _ = await piled_up(world, clock, Wish(most=2 * PILE))
        await stream.until(PORTION)
        (generation,) = world.generations._running.values()

        generation.end(DeadlineExceeded("too late"), EndCause.DEADLINE)

        assert isinstance(await stream.failure(), DeadlineExceeded)
        closing = (await world.only_settlement()).closing
        assert 0 <= closing.output_tokens - stream.last.output_tokens <= OVER_MAX
        # The timer of the pause finds nothing to do.
        await asyncio.sleep(2 * SPAN_S)
        assert world.failures == []
        assert generation.output_tokens == closing.output_tokens


async def test_several_outputs_share_their_portions(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with gateway(tmp_path, clock=clock) as world:
        stream = world.client.stream(Rich(most=PILE, change=several(2)))
        lanes = lanes_of(await world.accepted())
        await stream.until(0)
        clock.ahead_s += 5.0
        for lane in lanes * ROWS:
            events = engine_pb2.StepEvents(
                lanes=[lane], token_counts=[PORTION], token_ids=range(PORTION), texts=["x "]
            )
            world.workers[0].responses.put_nowait(events)
        for lane in lanes:
            world.workers[0].end(lane)

        await stream.rest()

        counts = [frame.output_tokens for frame in stream.frames[1:-1]]
        assert counts[-1] == 2 * PILE
        assert max(b - a for a, b in itertools.pairwise([0, *counts])) <= PORTION
        assert (await world.only_settlement()).closing.output_tokens == 2 * PILE
