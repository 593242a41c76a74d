"""The prefix cache, adapters and the background in the batch in flight."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from services.worker.engine.base import (
    Adapter,
    AdapterUnusable,
    Ended,
    EndReason,
    EngineRequest,
)
from services.worker.engine.llamacpp_adapters import AdapterShelf
from tests.unit.services.worker.engine.llamacpp_world import (
    CAPACITY,
    SIZE,
    FakeDecoder,
    World,
    ask,
    continued,
)

PROMPT = tuple(range(2, 26))
PATIENCE_S = 10.0


class Loader:
    """Handles are the digests' numbers; "sha256:13" is unusable."""

    def __init__(self) -> None:
        self.loaded: set[int] = set()

    def check_adapter(self, adapter: Adapter) -> None:
        if adapter.digest == "sha256:13":
            raise AdapterUnusable("it does not fit")

    def load_adapter(self, adapter: Adapter) -> int:
        handle = int(adapter.digest.removeprefix("sha256:"))
        self.loaded.add(handle)
        return handle

    def free_adapter(self, handle: int) -> None:
        self.loaded.remove(handle)


def adapter_of(number: int) -> Adapter:
    return Adapter(name=f"adapters/{number}", path=Path("a.gguf"), digest=f"sha256:{number}")


def adapted(prompt: tuple[int, ...], tokens: int, number: int) -> EngineRequest:
    adapter = adapter_of(number) if number else None
    return replace(ask(prompt, tokens), adapter=adapter)


def world_with_adapters(*, resident_max: int = 8) -> World:
    return World(shelf=AdapterShelf(Loader(), resident_max=resident_max))


@pytest.fixture
def world() -> World:
    return World()


# The prefix cache.


def test_a_repeated_prompt_is_computed_from_its_last_token_on(world: World) -> None:
    world.batch.submit(0, ask(PROMPT, 5))
    world.run()
    computed = sum(len(step) for step in world.decoder.steps)

    world.batch.submit(1, ask(PROMPT, 5))
    world.run()

    assert world.cached == {0: 0, 1: len(PROMPT) - 1}
    assert world.outputs[1] == world.outputs[0] == continued(PROMPT, 5)
    assert sum(len(step) for step in world.decoder.steps) == computed + 5


def test_a_conversation_goes_on_behind_its_output(world: World) -> None:
    world.batch.submit(0, ask(PROMPT, 6))
    world.run()
    longer = (*PROMPT, *world.outputs[0], 7, 8)

    world.batch.submit(1, ask(longer, 4))
    world.run()

    # The last token of the output was never computed.
    assert world.cached[1] == len(PROMPT) + 5
    assert world.outputs[1] == continued(longer, 4)


@pytest.mark.parametrize(
    "change",
    [{"cache_salt": b"another"}, {"reads_cache": False}, {"prompt_logprobs": True}],
    ids=lambda change: next(iter(change)),
)
def test_the_cache_is_not_read(world: World, change: dict[str, object]) -> None:
    world.batch.submit(0, ask(PROMPT, 5))
    world.run()

    world.batch.submit(1, replace(ask(PROMPT, 5), **change))  # type: ignore[arg-type]
    world.run()

    assert world.cached[1] == 0
    assert world.outputs[1] == world.outputs[0]


def test_a_running_lane_s_prompt_is_copied(world: World) -> None:
    world.batch.submit(0, ask(PROMPT, 12))
    for _ in range(5):
        world.step()
    world.batch.submit(1, ask((*PROMPT[:20], 50, 51), 5))
    world.run()

    assert world.decoder.copies == [(0, 1)]
    assert world.cached[1] == 20
    assert world.outputs[0] == continued(PROMPT, 12)
    assert world.outputs[1] == continued((*PROMPT[:20], 50, 51), 5)


def test_kept_tokens_are_no_load(world: World) -> None:
    world.batch.submit(0, ask(PROMPT, 5))
    world.run()

    assert world.counters.kv_used_tokens == 0
    assert world.decoder.histories[0]


def test_a_decoder_that_cannot_drop_ends_keeps_nothing() -> None:
    world = World(FakeDecoder(is_partial=False))
    for lane in range(2):
        world.batch.submit(lane, ask(PROMPT, 5))
        world.run()

    assert world.cached == {0: 0, 1: 0}
    assert world.outputs[1] == continued(PROMPT, 5)
    assert not any(world.decoder.histories.values())


# Adapters.


def test_each_lane_is_computed_with_its_own_adapter_only() -> None:
    world = world_with_adapters()
    for lane, number in enumerate((0, 1, 2, 1)):
        world.batch.submit(lane, adapted(PROMPT, 8, number))

    world.run()

    for lane, number in enumerate((0, 1, 2, 1)):
        assert world.outputs[lane] == continued(PROMPT, 8, adapter=number)
    assert {ended.reason for ended in world.ended.values()} == {EndReason.MAX_TOKENS}


def test_every_adapter_gets_a_call_in_every_step() -> None:
    world = world_with_adapters()
    for lane, number in enumerate((0, 1, 2, 1)):
        world.batch.submit(lane, adapted((1, lane), 9, number))
    world.step()
    world.decoder.steps.clear()

    world.step()

    assert sorted(world.decoder.steps) == [[0], [1, 3], [2]]
    assert {lane: len(tokens) for lane, tokens in world.outputs.items()} == dict.fromkeys(
        range(4), 2
    )


def test_what_one_adapter_computed_is_no_prefix_for_another() -> None:
    world = world_with_adapters()
    for lane, number in enumerate((1, 2, 0, 1)):
        world.batch.submit(lane, adapted(PROMPT, 8, number))
        world.run()
        assert world.outputs[lane] == continued(PROMPT, 8, adapter=number)

    assert world.cached == {0: 0, 1: 0, 2: 0, 3: len(PROMPT) - 1}


def test_a_lane_waits_while_all_adapters_in_memory_are_in_use_and_plain_ones_pass_it() -> None:
    world = world_with_adapters(resident_max=1)
    world.batch.submit(0, adapted(PROMPT, 5, 1))
    world.batch.submit(1, adapted(PROMPT, 5, 2))
    # It could go, but would keep the other one waiting.
    world.batch.submit(2, adapted(PROMPT, 5, 1))
    world.batch.submit(3, ask(PROMPT, 5))
    world.step()
    assert (world.counters.running, world.counters.waiting) == (2, 2)

    world.run()

    assert world.prefilled.index(1) < world.prefilled.index(2)
    assert world.prefilled.index(3) < world.prefilled.index(1)
    for lane, number in enumerate((1, 2, 1, 0)):
        assert world.outputs[lane] == continued(PROMPT, 5, adapter=number)


def test_an_adapter_that_became_unusable_fails_its_lane_alone() -> None:
    world = world_with_adapters()
    world.batch.submit(0, adapted(PROMPT, 5, 13))
    world.batch.submit(1, ask(PROMPT, 5))

    world.run()

    assert world.ended[0] == Ended(0, EndReason.FAILED, None, "it does not fit")
    assert world.outputs[1] == continued(PROMPT, 5)


# Background.


def test_lanes_in_the_background_start_when_nothing_else_waits(world: World) -> None:
    for lane in range(CAPACITY):
        world.batch.submit(lane, ask((1, lane), 3 + lane))
    world.step()
    world.batch.submit(10, replace(ask((2, 3), 3), is_background=True))
    world.batch.submit(11, ask((2, 4), 3))
    world.batch.submit(12, ask((2, 5), 3))

    world.run()

    assert world.prefilled[CAPACITY:] == [11, 12, 10]
    assert world.outputs[10] == continued((2, 3), 3)


def test_a_lane_in_the_background_can_be_aborted_while_it_waits(world: World) -> None:
    for lane in range(CAPACITY + 1):
        world.batch.submit(lane, replace(ask((1, lane), 9), is_background=lane == CAPACITY))
    world.step()

    world.batch.abort(CAPACITY)
    world.report()

    assert world.ended[CAPACITY].reason is EndReason.ABORTED
    assert world.counters.waiting == world.counters.waiting_tokens == 0


# All at once.


@pytest.mark.parametrize("seed", range(20))
def test_lanes_of_all_kinds_at_random_get_what_they_get_alone(seed: int) -> None:
    world, rng = world_with_adapters(resident_max=2), random.Random(seed)  # noqa: S311 - no secret
    texts = [tuple(rng.choices(range(SIZE), k=26)) for _ in range(2)]
    lanes: dict[int, tuple[EngineRequest, int]] = {}
    for _ in range(100):
        if rng.random() < 0.5:
            prompt = (*rng.choice(texts)[: rng.randint(5, 26)], rng.randrange(SIZE))
            number = rng.choice([0, 0, 0, 1, 2, 3])
            request = replace(
                adapted(prompt, rng.randint(1, 12), number),
                cache_salt=rng.choice([b"a", b"a", b"b"]),
                is_background=rng.random() < 0.2,
                prompt_logprobs=rng.random() < 0.2,
                top_logprobs=rng.choice([None, 0, 2]),
            )
            lanes[len(lanes)] = (request, number)
            world.batch.submit(len(lanes) - 1, request)
        if lanes and rng.random() < 0.2:
            world.batch.abort(rng.randrange(len(lanes)))
        world.decoder.fails_on = {rng.randrange(CAPACITY)} if rng.random() < 0.03 else set()
        world.step()
    world.decoder.fails_on = set()
    world.run()

    assert set(world.ended) == set(lanes)
    for lane, (request, number) in lanes.items():
        tokens = continued(request.prompt_ids, request.max_output_tokens, adapter=number)
        is_whole = world.ended[lane].reason is EndReason.MAX_TOKENS
        assert world.outputs[lane] == (tokens if is_whole else tokens[: len(world.outputs[lane])])
    assert any(world.cached.values())
    assert world.counters.kv_used_tokens == world.counters.waiting_tokens == 0
