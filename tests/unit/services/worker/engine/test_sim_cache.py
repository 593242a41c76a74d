"""What the simulated prefix cache tells of itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from libs.testing import FakeClock
from services.worker.engine.base import EngineRequest, Sampling
from services.worker.engine.kv_events import KvEvent, KvRemoved, KvStored, chain
from services.worker.engine.sim import FLAT_OUT, SimEngine
from services.worker.engine.sim_cache import BLOCK_TOKENS, PrefixCache, Root, blocks_of, name_of
from services.worker.engine.sim_tokenizer import SimTokenizer
from tools.conformance.engine.kv_model import KvModel

ROOT: Root = (b"", "")
OTHER: Root = (b"another's", "")
TOKENIZER = SimTokenizer()


def prompt_of(letters: str, rest: int = 1) -> tuple[int, ...]:
    """A block for each letter, and some tokens that fill none."""
    return tuple(ord(letter) for letter in letters for _ in range(BLOCK_TOKENS)) + (32,) * rest


def names_of(letters: str) -> list[int]:
    names: list[int] = []
    for letter in letters:
        names.append(chain(names[-1] if names else None, [ord(letter)] * BLOCK_TOKENS))
    return names


def keep(cache: PrefixCache, letters: str, root: Root = ROOT) -> list[KvEvent]:
    return cache.keep(root, blocks_of(prompt_of(letters)))


def stored(letters: str, known: int = 0) -> KvStored:
    names = names_of(letters)
    return KvStored(tuple(names[known:]), names[known - 1] if known else None)


def test_blocks_have_the_names_that_everybody_gives_them() -> None:
    tokens = [0, 1, 127, 128, 255, 256, 65535, 65536, 1 << 20, (1 << 31) - 1, *range(6)]
    block = blocks_of(tokens)[0]

    assert name_of(None, block) == chain(None, tokens)
    assert name_of((1 << 64) - 1, block) == chain((1 << 64) - 1, tokens)


def test_what_is_new_is_told_behind_what_was_there() -> None:
    cache = PrefixCache(8 * BLOCK_TOKENS)

    assert keep(cache, "ab") == [stored("ab")]
    assert keep(cache, "ab") == []
    assert keep(cache, "abcd") == [stored("abcd", known=2)]
    assert keep(cache, "b") == [stored("b")]


def test_what_makes_room_is_told_before_what_comes() -> None:
    cache = PrefixCache(3 * BLOCK_TOKENS)
    keep(cache, "ab")
    names = names_of("ab")

    assert keep(cache, "xy") == [KvRemoved((names[1],)), stored("xy")]
    assert keep(cache, "z") == [KvRemoved((names[0],)), stored("z")]


def test_equal_blocks_of_several_salts_are_there_until_the_last_has_gone() -> None:
    cache = PrefixCache(4 * BLOCK_TOKENS)
    keep(cache, "a", ROOT)
    keep(cache, "b", ROOT)

    assert keep(cache, "a", OTHER) == []
    assert keep(cache, "xy") == [stored("xy")], "the first a made room, and another is there"
    assert keep(cache, "z") == [KvRemoved(tuple(names_of("b"))), stored("z")]
    assert keep(cache, "w") == [KvRemoved(tuple(names_of("a"))), stored("w")]


def test_of_a_prompt_that_is_too_long_the_beginning_is_kept() -> None:
    cache = PrefixCache(2 * BLOCK_TOKENS)

    assert keep(cache, "abc") == [stored("ab")]
    assert len(cache) == 2


@pytest.mark.parametrize("seed", range(5))
def test_who_hears_all_events_knows_what_each_prompt_would_find(seed: int) -> None:
    """Of several salts that share blocks it is the one that has most."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    roots: list[Root] = [(b"", ""), (b"s", ""), (b"", "sha256:1")]
    most = chance.randrange(2, 12)
    cache, model = PrefixCache(most * BLOCK_TOKENS), KvModel(BLOCK_TOKENS)
    for _ in range(150):
        for event in keep(cache, _letters(chance), chance.choice(roots)):
            model.apply([event])
            assert len(model.names) <= most

        prompt = prompt_of(_letters(chance), rest=chance.randrange(2))
        found = [cache.find(root, blocks_of(prompt), len(prompt)) for root in roots]
        assert model.prefix_blocks(prompt) * BLOCK_TOKENS == max(found)
        assert len(model.names) <= len(cache)


@pytest.mark.parametrize("seed", range(3))
async def test_prompts_read_from_the_cache_what_was_told(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - no secret
    engine = SimEngine(
        FakeClock(),
        TOKENIZER,
        capacity=2,
        context_length=8 * BLOCK_TOKENS,
        kv_tokens=12 * BLOCK_TOKENS,
        costs=FLAT_OUT,
    )
    info = await engine.start()
    model = KvModel(info.abilities.kv_block_tokens)
    for lane in range(60):
        prompt = prompt_of(_letters(chance), rest=chance.randrange(1, BLOCK_TOKENS))
        told = model.prefix_blocks(prompt)

        assert await cached(engine, lane, prompt, model) == told * BLOCK_TOKENS
        assert model.prefix_blocks(prompt) == len(prompt) // BLOCK_TOKENS


async def test_what_is_aborted_before_its_prefill_is_not_told() -> None:
    engine = SimEngine(
        FakeClock(), TOKENIZER, capacity=1, context_length=100, kv_tokens=100, costs=FLAT_OUT
    )
    engine.submit(1, ask(prompt_of("a")))
    engine.submit(2, ask(prompt_of("b")))
    engine.abort(2)

    events: list[KvEvent] = []
    ended = 0
    while ended < 2:
        batch = await engine.next_step()
        events += batch.kv_events
        ended += len(batch.ended)

    assert events == [stored("a")]


async def cached(engine: SimEngine, lane: int, prompt: Sequence[int], model: KvModel) -> int | None:
    """Runs a prompt; returns how many of its tokens the cache had."""
    engine.submit(lane, ask(prompt))
    tokens = None
    while True:
        batch = await engine.next_step()
        model.apply(batch.kv_events)
        for prefilled in batch.prefilled:
            tokens = prefilled.cached_tokens
        if batch.ended:
            return tokens


def ask(prompt: Sequence[int]) -> EngineRequest:
    sampling = Sampling(temperature=0, top_p=1, top_k=0, seed=0)
    return EngineRequest(prompt_ids=tuple(prompt), max_output_tokens=2, sampling=sampling)


def _letters(chance: random.Random) -> str:
    return "".join(chance.choices("ab", k=chance.randrange(6)))
