"""When frames leave: at once, after an interval, or as soon as the client can take them."""

from __future__ import annotations

import asyncio
import itertools
import math
from pathlib import Path

import pytest

from libs.errors import FieldRule, InvalidArgument
from libs.testing import eventually
from tests.integration.services.gateway.client import Reading, Wish
from tests.integration.services.gateway.harness import World, gateway

INTERVAL_S = 0.1
# Together more than any window takes while nobody reads.
WORDS = 900
WORD = "x" * 20_000
# What the contract allows for one frame.
FRAME_MAX = 256 * 1024


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def arrivals(stream: Reading, tokens: int) -> list[float]:
    """Reads until that many tokens have come; returns when each delta came."""
    times = []
    while not stream.frames or stream.last.output_tokens < tokens:
        frame = await stream.next()
        assert frame is not None
        if frame.HasField("delta"):
            times.append(now_s())
    return times


async def say_slowly(world: World, lane: int, count: int) -> None:
    for number in range(count):
        world.workers[0].say(lane, "x", first=number)
        await asyncio.sleep(INTERVAL_S / 10)


async def test_deltas_keep_their_distance_and_nothing_is_lost(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Wish(interval_s=INTERVAL_S))
        execution = await world.accepted()
        saying = asyncio.create_task(say_slowly(world, execution.lane, 22))

        times = await arrivals(stream, 22)
        await saying
        world.workers[0].end(execution.lane)
        await stream.rest()

        assert stream.frames[1].output_tokens == 1
        # The first token goes at once; all others leave at the multiples of the interval.
        intervals = math.ceil((times[-1] - times[0]) / INTERVAL_S)
        assert len(times) <= 2 + intervals
        assert stream.text == "x" * 22
        assert stream.sequences == list(range(1, stream.last.sequence + 1))


async def test_the_first_delta_is_not_delayed(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Wish(interval_s=1.0))
        execution = await world.accepted()
        await stream.until(0)
        started_s = now_s()

        world.workers[0].say(execution.lane, "a")
        await stream.until(1)

        assert now_s() - started_s < 0.5
        stream.call.cancel()


async def test_the_end_is_not_delayed(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Wish(interval_s=1.0))
        execution = await world.accepted()
        world.workers[0].say(execution.lane, "a")
        await stream.until(1)
        started_s = now_s()

        world.workers[0].say(execution.lane, "b", "c", first=1)
        world.workers[0].end(execution.lane)
        await stream.rest()

        assert now_s() - started_s < 0.5
        assert stream.text == "abc"


async def test_the_interval_of_one_reader_is_not_that_of_another(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        fast = world.client.stream(Wish(request_id="r-1"))
        execution = await world.accepted()
        await fast.until(0)
        slow = world.client.resume(fast.generation_id, interval_s=1.0)
        for number in range(5):
            world.workers[0].say(execution.lane, "x", first=number)
            await fast.until(number + 1)
            if not number:
                await slow.until(1)
        world.workers[0].end(execution.lane)
        await fast.rest()
        await slow.rest()

        assert len(fast.frames) >= 7
        # Started, the first token, the other four with the end, finished.
        assert [frame.output_tokens for frame in slow.frames] == [0, 1, 5, 5]
        assert slow.sequences == fast.sequences
        assert slow.text == fast.text == "xxxxx"


async def test_what_was_missed_comes_at_once(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Wish(request_id="r-1"))
        execution = await world.accepted()
        world.workers[0].say(execution.lane, "a", "b", "c")
        await stream.until(3)
        started_s = now_s()

        await world.client.resume(stream.generation_id, after=1, interval_s=1.0).until(3)

        assert now_s() - started_s < 0.5
        stream.call.cancel()


@pytest.mark.parametrize("interval_s", [1.001, -0.001, 60.0])
async def test_an_interval_has_its_bounds(tmp_path: Path, interval_s: float) -> None:
    async with gateway(tmp_path) as world:
        stream = await world.client.stream(Wish(interval_s=interval_s)).failure()
        resumed = await world.client.resume("gen_g1_x", interval_s=interval_s).failure()

        for error, field in ((stream, "stream.frame_interval"), (resumed, "frame_interval")):
            assert isinstance(error, InvalidArgument)
            (violation,) = error.violations
            assert (violation.field, violation.rule) == (field, FieldRule.OUT_OF_RANGE)
        assert world.workers[0].requests.empty()


async def test_tokens_are_packed_while_the_client_does_not_take_them(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Wish(most=1000))
        execution = await world.accepted()
        await stream.until(0)
        # The first ones fill the window; those behind them wait.
        for number in range(WORDS):
            world.workers[0].say(execution.lane, WORD, first=number)
        world.workers[0].end(execution.lane)
        (generation,) = world.generations._running.values()
        await eventually(lambda: generation._sink.is_over)

        await stream.rest()

        counts = [frame.output_tokens for frame in stream.frames]
        largest = max(after - before for before, after in itertools.pairwise(counts))
        assert largest > 10
        assert max(frame.ByteSize() for frame in stream.frames) <= FRAME_MAX
        assert stream.text == WORD * WORDS
        assert stream.sequences == list(range(1, len(stream.frames) + 1))
        assert stream.last.finished.usage.output_tokens == WORDS
