"""What the simulator's abilities cost, and where they are bounded."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TypeVar

import numpy as np
import pytest
from llguidance import LLMatcher

from libs.testing import FakeClock
from services.worker.engine import matcher
from services.worker.engine.base import (
    Adapter,
    AdapterUnusable,
    Constraint,
    ConstraintKind,
    EmbeddingFailed,
    EndReason,
    EngineRequest,
    Sampling,
)
from services.worker.engine.sim import FLAT_OUT, SimCosts, SimEngine
from services.worker.engine.sim_cache import BLOCK_TOKENS, PrefixCache, blocks_of
from services.worker.engine.sim_tokenizer import SimTokenizer

TOKENIZER = SimTokenizer()
COSTS = SimCosts(
    prefill_tokens_per_s=1000,
    prefill_chunk_tokens=100,
    decode_base_s=0.010,
    decode_per_lane_s=0.001,
    adapter_load_s=0.5,
    adapters=2,
)
FREE = Sampling(temperature=1, top_p=1, top_k=0, seed=1)
PROMPT = tuple(range(300, 340))
ENDS = TOKENIZER.end_ids

Result = TypeVar("Result")


def make(clock: FakeClock | None = None, costs: SimCosts = FLAT_OUT) -> SimEngine:
    return SimEngine(
        clock or FakeClock(),
        TOKENIZER,
        capacity=4,
        context_length=1000,
        kv_tokens=4000,
        costs=costs,
    )


def ask(tokens: int = 12, prompt: tuple[int, ...] = PROMPT) -> EngineRequest:
    return EngineRequest(prompt_ids=prompt, max_output_tokens=tokens, sampling=FREE)


def adapter(digit: str) -> Adapter:
    return Adapter(name=f"adapters/{digit}", path=None, digest=f"sha256:{digit * 64}")


async def say(engine: SimEngine, request: EngineRequest) -> tuple[list[int], EndReason]:
    engine.submit(1, request)
    said: list[int] = []
    while True:
        batch = await engine.next_step()
        said += batch.token_ids
        if batch.ended:
            return said, batch.ended[0].reason


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def took(clock: FakeClock, waiting: asyncio.Future[Result]) -> float:
    """Seconds until something is done, to a millisecond."""
    await settle()
    for milliseconds in range(2000):
        if waiting.done():
            return milliseconds / 1000
        clock.advance(0.001)
        await settle()
    raise AssertionError("never")


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (replace(FREE, temperature=0), "Steal were however price in when is. Air more storm live"),
        (FREE, "Of do back city owl in. Men asked make land it"),
    ],
)
async def test_plain_text_is_what_it_always_was(sampling: Sampling, expected: str) -> None:
    said, _ = await say(make(), replace(ask(), sampling=sampling))

    assert b"".join(TOKENIZER.token_bytes(token_id) for token_id in said).decode() == expected


async def test_end_tokens_can_be_forced_and_forbidden_by_bias() -> None:
    ending = make(costs=replace(FLAT_OUT, mean_output_tokens=5))
    forced = replace(FREE, logit_bias=((ENDS[0], 100.0),))
    forbidden = replace(FREE, logit_bias=tuple((end, -100.0) for end in ENDS))

    at_once = await say(make(), replace(ask(90), sampling=forced))
    never = await say(ending, replace(ask(90), sampling=forbidden))

    assert at_once == ([], EndReason.END_OF_SEQUENCE)
    assert (len(never[0]), never[1]) == (90, EndReason.MAX_TOKENS)


async def test_forced_end_tokens_wait_for_the_least_output() -> None:
    forced = replace(FREE, logit_bias=((ENDS[0], 100.0),))

    said, reason = await say(make(), replace(ask(90), sampling=forced, min_output_tokens=7))

    assert (len(said), reason) == (7, EndReason.END_OF_SEQUENCE)


@pytest.mark.parametrize("top", [None, 3])
async def test_the_model_ends_at_the_same_place_whatever_else_is_asked_for(top: int | None) -> None:
    costs = replace(FLAT_OUT, mean_output_tokens=30)
    for seed in range(10):
        request = replace(ask(200), sampling=replace(FREE, seed=seed))
        plain = await say(make(costs=costs), request)
        scored = await say(make(costs=costs), replace(request, top_logprobs=top))
        longer, _ = await say(make(costs=costs), replace(request, min_output_tokens=100))

        assert scored == plain
        assert longer[: len(plain[0])] == plain[0]
        assert len(longer) >= 100


async def test_stop_tokens_end_outputs_with_filters_too() -> None:
    request = replace(ask(30), sampling=replace(FREE, top_p=0.9))
    whole, _ = await say(make(), request)

    said, reason = await say(make(), replace(request, stop_token_ids=frozenset({whole[9]})))

    assert said == whole[: whole.index(whole[9])]
    assert reason is EndReason.STOP_TOKEN


async def test_cached_tokens_cost_no_prefill() -> None:
    clock = FakeClock()
    engine = make(clock, COSTS)
    times = []
    for _ in range(2):
        running = asyncio.ensure_future(say(engine, ask(tokens=1)))
        times.append(await took(clock, running))

    assert times == [pytest.approx(0.050, abs=0.002), pytest.approx(0.018, abs=0.002)]
    await engine.stop()


def test_at_least_one_token_is_computed() -> None:
    cache = PrefixCache(1000)
    prompt = tuple(range(2 * BLOCK_TOKENS))
    root = (b"salt", "")
    cache.keep(root, blocks_of(prompt))

    assert cache.find(root, blocks_of(prompt), len(prompt)) == BLOCK_TOKENS
    assert cache.find(root, blocks_of((*prompt, 1)), len(prompt) + 1) == 2 * BLOCK_TOKENS
    assert cache.find((b"sal", "t"), blocks_of(prompt), len(prompt)) == 0


def test_blocks_hit_only_behind_the_same_beginning() -> None:
    cache = PrefixCache(1000)
    root = (b"", "")
    cache.keep(root, blocks_of((1,) * 16 + (2,) * 16))

    assert cache.find(root, blocks_of((3,) * 16 + (2,) * 16), 33) == 0


def test_blocks_unused_for_longest_make_room() -> None:
    cache = PrefixCache(4 * BLOCK_TOKENS)
    root = (b"", "")
    prompts = [(number,) * (2 * BLOCK_TOKENS + 1) for number in range(3)]
    cache.keep(root, blocks_of(prompts[0]))
    cache.keep(root, blocks_of(prompts[1]))
    cache.keep(root, blocks_of(prompts[0]))

    cache.keep(root, blocks_of(prompts[2]))

    found = [cache.find(root, blocks_of(prompt), len(prompt)) for prompt in prompts]
    assert found == [2 * BLOCK_TOKENS, 0, 2 * BLOCK_TOKENS]
    assert len(cache) == 4


async def test_loading_an_adapter_takes_its_time_once() -> None:
    clock = FakeClock()
    engine = make(clock, COSTS)

    first = await took(clock, asyncio.ensure_future(engine.load_adapter(adapter("a"))))
    second = await took(clock, asyncio.ensure_future(engine.load_adapter(adapter("a"))))

    assert first == pytest.approx(0.5, abs=0.002)
    assert second == 0


async def test_the_adapter_unused_for_longest_is_dropped_and_loaded_again_when_needed() -> None:
    clock = FakeClock()
    engine = make(clock, COSTS)
    for digit in "abc":
        await took(clock, asyncio.ensure_future(engine.load_adapter(adapter(digit))))
    assert engine.load().resident_adapters == ("adapters/b", "adapters/c")

    running = asyncio.ensure_future(say(engine, replace(ask(tokens=1), adapter=adapter("a"))))

    assert await took(clock, running) == pytest.approx(0.550, abs=0.003)
    assert engine.load().resident_adapters == ("adapters/c", "adapters/a")
    await engine.stop()


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:" + "g" * 64, "md5:" + "a" * 64])
async def test_adapters_without_a_digest_are_unusable(digest: str) -> None:
    with pytest.raises(AdapterUnusable, match="adapters/x"):
        await make().load_adapter(Adapter(name="adapters/x", path=None, digest=digest))


async def test_equal_digests_are_the_same_adapter() -> None:
    engine = make()
    first = replace(ask(), adapter=adapter("a"))
    renamed = replace(ask(), adapter=replace(adapter("a"), name="adapters/other"))

    assert await say(engine, first) == await say(engine, renamed)


async def test_embedding_takes_as_long_as_its_prefill() -> None:
    clock = FakeClock()
    engine = make(clock, COSTS)

    waiting = asyncio.ensure_future(engine.embed([PROMPT, PROMPT]))

    assert await took(clock, waiting) == pytest.approx(0.080 + 0.010, abs=0.002)


async def test_others_get_their_turn_while_many_inputs_are_embedded() -> None:
    engine = make()
    embedding = asyncio.ensure_future(engine.embed([PROMPT] * 200))

    said, _ = await say(engine, ask(20))

    assert len(said) == 20
    assert not embedding.done()
    assert len(await embedding) == 200


async def test_texts_that_share_tokens_are_closer() -> None:
    def spell(text: str) -> list[int]:
        return TOKENIZER.encode(text, parse_special=False)

    texts = ["the cat swam in the river", "the cat sat by the river", "quarterly ledger of gateway"]
    found, again = [await make().embed([spell(text) for text in texts]) for _ in range(2)]

    assert found[0] @ found[1] > found[0] @ found[2] + 0.2
    assert np.array_equal(found, again)


@pytest.mark.parametrize("token_ids", [(), (TOKENIZER.vocabulary_size,), (-1,), (1,) * 1001])
async def test_inputs_that_cannot_be_embedded_are_refused(token_ids: tuple[int, ...]) -> None:
    with pytest.raises(EmbeddingFailed):
        await make().embed([PROMPT, token_ids])


async def test_a_constraint_that_takes_too_long_ends_its_output_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its sender pays for what was said: the engine is not to blame."""
    engine = make()
    await engine.start()
    grammar = LLMatcher.grammar_from_regex("[a-z]{12}")
    constraint = Constraint(kind=ConstraintKind.REGEX, source="", grammar=grammar)
    monkeypatch.setattr(matcher, "AHEAD_CPU_S", 0.0)
    monkeypatch.setattr(matcher, "STEP_CPU_S", 0.0)
    try:
        said, reason = await say(engine, replace(ask(), constraint=constraint))
    finally:
        await engine.stop()

    assert reason is EndReason.CONSTRAINT_LIMIT
    assert len(said) < 12
