"""Executions come, speak, break and go in any order: each ends once, and the books agree."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace

import pytest

from services.worker.engine.base import EngineRequest
from services.worker.engine.trtllm_state import LaneLimits
from tests.unit.services.worker.engine.test_trtllm_lanes import (
    EOS,
    PLAIN,
    REGEX,
    RequestError,
    Result,
    World,
)

LANES = 6
ACTS = 400


def some_request(chance: random.Random) -> EngineRequest:
    request = replace(
        PLAIN,
        prompt_ids=(9,) * chance.randint(1, 40),
        max_output_tokens=chance.randint(0, 6),
        is_background=chance.random() < 0.3,
        ignore_eos=chance.random() < 0.3,
        stop_token_ids=frozenset({50} if chance.random() < 0.3 else ()),
        top_logprobs=chance.choice((None, 0)),
    )
    kind = chance.random()
    if kind < 0.2:
        return replace(request, constraint=REGEX)
    if kind < 0.3:
        return replace(request, constraint=REGEX, continue_ids=(5, 6))
    if kind < 0.4:
        return replace(request, constraint=replace(REGEX, grammar="bad"))
    return request


def act(chance: random.Random, world: World, inside: set[int], submitted: Counter[int]) -> None:
    """Does one thing that a parent or an engine may do at any time."""
    free = sorted(set(range(1, LANES + 1)) - inside)
    said = [result for result in world.started if is_open(result)]
    kind = chance.random()
    if kind < 0.3 and free:
        lane = chance.choice(free)
        world.refusal = ValueError("no") if chance.random() < 0.1 else None
        inside.add(lane)
        submitted[lane] += 1
        world.lanes.submit(lane, some_request(chance))
        world.refusal = None
    elif kind < 0.45:
        world.lanes.abort(chance.randint(1, LANES + 1))
    elif said:
        speak(chance, chance.choice(said))


def is_open(result: Result) -> bool:
    return not result.finished and not result.is_told_to_end


def speak(chance: random.Random, result: Result) -> None:
    kind = chance.random()
    if kind < 0.1:
        result.is_told_to_end = True
        result.fail(RequestError("broken"))
    elif kind < 0.4:
        result.is_told_to_end = True
        result.say(*chance.choices((11, EOS, 50), k=chance.randint(0, 2)), end=an_end(chance))
    else:
        result.say(*chance.choices((11, 12, 50), k=chance.randint(0, 3)))


def an_end(chance: random.Random) -> str:
    return chance.choice(("stop", "length", "cancelled", "timeout"))


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_happens_each_ends_once_and_the_books_agree(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - a test's
    world = World(
        limits=LaneLimits(capacity=2, context_length=30, end_ids=frozenset({EOS})),
    )
    inside: set[int] = set()
    submitted: Counter[int] = Counter()
    seen = 0
    for _ in range(ACTS):
        act(chance, world, inside, submitted)
        if chance.random() < 0.5:
            await asyncio.sleep(0)
        counts = world.lanes.counts
        assert min(counts.running, counts.waiting, counts.waiting_tokens, counts.held_tokens) >= 0
        for ended in world.ended[seen:]:
            inside.remove(ended.lane)
        seen = len(world.ended)
    await close(world)

    counts = world.lanes.counts
    assert Counter(ended.lane for ended in world.ended) == submitted
    assert (counts.running, counts.waiting, counts.waiting_tokens, counts.held_tokens) == (0,) * 4
    assert not world.deaths
    assert_in_order(world)


async def close(world: World) -> None:
    """Has all that is left end."""
    async with asyncio.timeout(5):
        while world.lanes.counts.running or world.lanes.counts.waiting:
            for result in list(filter(is_open, world.started)):
                result.is_told_to_end = True
                result.say(end="stop")
            await asyncio.sleep(0.001)
    await world.settle()


def assert_in_order(world: World) -> None:
    """Each execution is prefilled at most once, before its rows, and silent behind its end."""
    begun: set[int] = set()
    for batch in world.batches:
        for prefilled in batch.prefilled:
            assert prefilled.lane not in begun
            begun.add(prefilled.lane)
        assert set(batch.lanes) <= begun
        begun -= {ended.lane for ended in batch.ended}
