"""The one contract that every engine fulfils: what its abilities promise.

An engine that lacks an ability says so; the worker refuses what it cannot, and there is nothing
more to show.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.worker.engine.base import (
    AdapterUnusable,
    EmbeddingFailed,
    EndReason,
    EngineDied,
    EngineRequest,
    Sampling,
)
from tests.integration.services.worker.engine.contract import (
    CAPACITY,
    CONTEXT_LENGTH,
    GREEDY,
    PATIENCE_S,
    PROMPT,
    Harness,
    ask,
    seeded,
)

LONG_PROMPT = tuple(40 + at % 37 for at in range(70))
SALT = b"one tenant's"
OTHER_SALT = b"another tenant's"


def lacks(ability: object) -> bool:
    """Whether an engine says that it cannot."""
    return not ability


def distinct(token_ids: list[int]) -> int:
    return len(set(token_ids))


async def test_log_probabilities_are_those_of_a_distribution(harness: Harness) -> None:
    most = harness.info.abilities.max_top_logprobs
    if lacks(most is not None):
        return
    assert most is not None
    request = replace(ask(20, sampling=seeded(3)), top_logprobs=most)

    token_ids, _ = await harness.run(1, request)

    told = harness.told[1]
    assert len(told.logprobs) == len(told.tops) == len(token_ids) == 20
    for token_id, logprob, top in zip(token_ids, told.logprobs, told.tops, strict=True):
        values = list(top.values())
        assert len(values) == most
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1.0001
        assert logprob <= values[0] + 1e-4
        if token_id in top:
            assert logprob == pytest.approx(top[token_id], abs=1e-3)


async def test_temperature_0_takes_the_likeliest(harness: Harness) -> None:
    if lacks(harness.info.abilities.max_top_logprobs):
        return

    token_ids, _ = await harness.run(1, replace(ask(20), top_logprobs=1))

    assert [next(iter(top)) for top in harness.told[1].tops] == token_ids


@pytest.mark.parametrize("sampling", [GREEDY, seeded(4)], ids=["greedy", "seeded"])
async def test_asking_for_log_probabilities_changes_no_token(
    harness: Harness, sampling: Sampling
) -> None:
    if lacks(harness.info.abilities.max_top_logprobs is not None):
        return
    plain, _ = await harness.run(1, ask(24, sampling=sampling))

    scored, _ = await harness.run(2, replace(ask(24, sampling=sampling), top_logprobs=0))

    assert scored == plain
    assert all(logprob <= 0 for logprob in harness.told[2].logprobs)
    assert not any(harness.told[2].tops)


async def test_each_lane_gets_the_alternatives_that_it_asked_for(harness: Harness) -> None:
    if lacks((harness.info.abilities.max_top_logprobs or 0) >= 3):
        return
    counts = {1: None, 2: 3, 3: 1}
    for lane, count in counts.items():
        harness.submit(lane, replace(ask(10), top_logprobs=count))

    await harness.until_ended(*counts)

    for lane, count in counts.items():
        told = harness.told[lane]
        rows = [(top, value) for top, value in zip(told.tops, told.logprobs, strict=True)]
        assert all(len(top) == (count or 0) for top, _ in rows)
        assert {math.isnan(value) for _, value in rows} <= {count is None}


async def test_prompts_have_log_probabilities_from_the_second_token_on(harness: Harness) -> None:
    if lacks(harness.info.abilities.prompt_logprobs):
        return
    request = replace(ask(3, prompt=LONG_PROMPT), top_logprobs=2, prompt_logprobs=True)
    await harness.run(1, ask(1, prompt=LONG_PROMPT))

    await harness.run(2, request)

    logprobs: list[float] = []
    for part in harness.told[2].prompt:
        assert part.offset == len(logprobs)
        assert len(part.scores.top_token_ids) == part.scores.top_count * len(part.scores.logprobs)
        logprobs += part.scores.logprobs
    assert len(logprobs) == len(LONG_PROMPT)
    assert math.isnan(logprobs[0])
    assert all(-100 < logprob <= 0 for logprob in logprobs[1:])
    assert harness.told[2].cached_tokens == 0


async def test_bias_forbids_and_forces(harness: Harness) -> None:
    if lacks(harness.info.abilities.logit_bias):
        return
    free, _ = await harness.run(1, ask(16))
    banned = tuple((token_id, -100.0) for token_id in sorted(set(free)))
    forced = next(at for at in range(60, 120) if at not in free)

    without, _ = await harness.run(2, ask(16, sampling=replace(GREEDY, logit_bias=banned)))
    only, _ = await harness.run(
        3, ask(16, sampling=replace(seeded(2), logit_bias=((forced, 100.0),)))
    )

    assert not set(without) & set(free)
    assert only == [forced] * 16


async def test_log_probabilities_are_told_before_bias(harness: Harness) -> None:
    abilities = harness.info.abilities
    if lacks(abilities.logit_bias and abilities.max_top_logprobs):
        return
    free, _ = await harness.run(1, replace(ask(1), top_logprobs=1))
    sampling = replace(GREEDY, logit_bias=((free[0], -100.0),))

    await harness.run(2, replace(ask(1, sampling=sampling), top_logprobs=1))

    assert list(harness.told[2].tops[0]) == free
    assert harness.told[2].tops[0] == pytest.approx(harness.told[1].tops[0], abs=1e-3)


def less_frequent(sampling: Sampling, penalty: float) -> Sampling:
    return replace(sampling, frequency_penalty=penalty)


def less_present(sampling: Sampling, penalty: float) -> Sampling:
    return replace(sampling, presence_penalty=penalty)


@pytest.mark.parametrize("penalized", [less_frequent, less_present])
async def test_penalties_make_more_or_fewer_different_tokens(
    harness: Harness, penalized: Callable[[Sampling, float], Sampling]
) -> None:
    if lacks(harness.info.abilities.penalties):
        return
    counts: dict[float, int] = {}
    lane = 0
    for penalty in (-2.0, 0.0, 2.0):
        for seed in range(3):
            lane += 1
            sampling = replace(seeded(seed), top_k=40)
            token_ids, _ = await harness.run(lane, ask(80, sampling=penalized(sampling, penalty)))
            counts[penalty] = counts.get(penalty, 0) + distinct(token_ids)

    assert counts[-2.0] < counts[0.0] < counts[2.0]


async def test_repetition_penalty_keeps_off_what_was_there(harness: Harness) -> None:
    if lacks(harness.info.abilities.repetition_penalty):
        return
    base = replace(seeded(6), top_k=40)
    free, _ = await harness.run(1, ask(80, sampling=base))

    averse, _ = await harness.run(2, ask(80, sampling=replace(base, repetition_penalty=5.0)))
    fond, _ = await harness.run(3, ask(80, sampling=replace(base, repetition_penalty=0.3)))

    assert distinct(fond) < distinct(free) < distinct(averse)


async def test_filters_that_leave_one_token_leave_the_likeliest(harness: Harness) -> None:
    greedy, _ = await harness.run(1, ask(16))

    by_count, _ = await harness.run(2, ask(16, sampling=replace(seeded(5), top_k=1)))
    by_share, _ = await harness.run(3, ask(16, sampling=replace(seeded(5), top_p=1e-6)))

    assert by_count == by_share == greedy


async def test_min_p_of_1_leaves_the_likeliest(harness: Harness) -> None:
    if lacks(harness.info.abilities.min_p):
        return
    greedy, _ = await harness.run(1, ask(16))

    filtered, _ = await harness.run(2, ask(16, sampling=replace(seeded(5), min_p=1.0)))

    assert filtered == greedy


async def test_the_end_of_sequence_waits_for_the_least_tokens(harness: Harness) -> None:
    if lacks(harness.info.abilities.min_output_tokens):
        return
    for seed in range(4):
        free = ask(90, sampling=seeded(seed), ignore_eos=False)
        whole, _ = await harness.run(seed, free)

        longer, ended = await harness.run(10 + seed, replace(free, min_output_tokens=40))

        assert len(longer) >= 40
        assert longer[: len(whole)] == whole[: len(longer)]
        assert ended.reason in {EndReason.END_OF_SEQUENCE, EndReason.MAX_TOKENS}


async def test_a_second_prompt_with_the_same_salt_hits_the_cache(harness: Harness) -> None:
    """Paired: the same salt must hit, another must not, and nobody's tokens change."""
    if lacks(harness.info.abilities.prompt_cache):
        return
    request = replace(ask(8, prompt=LONG_PROMPT), cache_salt=SALT)
    cold, _ = await harness.run(1, request)

    foreign, _ = await harness.run(2, replace(request, cache_salt=OTHER_SALT))
    warm, _ = await harness.run(3, request)
    unread, _ = await harness.run(4, replace(request, reads_cache=False))

    cached = {lane: harness.told[lane].cached_tokens for lane in (1, 2, 3, 4)}
    assert (cached[1], cached[2], cached[4]) == (0, 0, 0)
    assert 16 <= cached[3] < len(LONG_PROMPT)
    assert cold == foreign == warm == unread


async def test_a_longer_prompt_hits_what_it_shares(harness: Harness) -> None:
    if lacks(harness.info.abilities.prompt_cache):
        return
    longer = (*LONG_PROMPT, 65, 66, 67)
    alone, _ = await harness.run(1, replace(ask(8, prompt=longer), cache_salt=OTHER_SALT))
    await harness.run(2, replace(ask(1, prompt=LONG_PROMPT), cache_salt=SALT))

    shared, _ = await harness.run(3, replace(ask(8, prompt=longer), cache_salt=SALT))

    assert 16 <= harness.told[3].cached_tokens <= len(LONG_PROMPT)
    assert shared == alone


async def test_adapters_change_the_output_and_the_base_stays_as_it_was(
    harness: Harness, tmp_path: Path
) -> None:
    if lacks(harness.info.abilities.adapters):
        return
    first, second = (harness.row.adapter(tmp_path, number) for number in (1, 2))
    base, _ = await harness.run(1, ask(16))
    await harness.engine.load_adapter(first)
    await harness.engine.load_adapter(first)
    await harness.engine.load_adapter(second)

    by_first, _ = await harness.run(2, ask(16, adapter=first))
    by_second, _ = await harness.run(3, ask(16, adapter=second))
    again, _ = await harness.run(4, ask(16, adapter=first))
    plain, _ = await harness.run(5, ask(16))

    assert len({tuple(base), tuple(by_first), tuple(by_second)}) == 3
    assert again == by_first
    assert plain == base
    assert set(harness.engine.load().resident_adapters) >= {first.name, second.name}


async def test_adapters_in_one_batch_do_not_mix(harness: Harness, tmp_path: Path) -> None:
    if lacks(harness.info.abilities.adapters):
        return
    adapter = harness.row.adapter(tmp_path, 1)
    await harness.engine.load_adapter(adapter)
    base, _ = await harness.run(1, ask(16))
    adapted, _ = await harness.run(2, ask(16, adapter=adapter))

    harness.submit(3, ask(16))
    harness.submit(4, ask(16, adapter=adapter))
    await harness.until_ended(3, 4)

    assert harness.told[3].token_ids == base
    assert harness.told[4].token_ids == adapted


async def test_an_adapter_does_not_share_the_cache(harness: Harness, tmp_path: Path) -> None:
    abilities = harness.info.abilities
    if lacks(abilities.adapters and abilities.prompt_cache):
        return
    adapter = harness.row.adapter(tmp_path, 1)
    await harness.engine.load_adapter(adapter)
    await harness.run(1, replace(ask(4, prompt=LONG_PROMPT), cache_salt=SALT))
    request = replace(ask(4, prompt=LONG_PROMPT, adapter=adapter), cache_salt=SALT)

    cold, _ = await harness.run(2, request)
    warm, _ = await harness.run(3, request)

    assert harness.told[2].cached_tokens == 0
    assert harness.told[3].cached_tokens > 0
    assert warm == cold


async def test_an_unusable_adapter_is_refused_and_harms_nobody(
    harness: Harness, tmp_path: Path
) -> None:
    if lacks(harness.info.abilities.adapters):
        return
    before, _ = await harness.run(1, ask(8))

    with pytest.raises(AdapterUnusable):
        await harness.engine.load_adapter(harness.row.unusable(tmp_path))

    after, _ = await harness.run(2, ask(8))
    assert after == before


async def test_embeddings_have_length_1_and_depend_on_the_input_alone(harness: Harness) -> None:
    dimensions = harness.info.abilities.embedding_dimensions
    if lacks(dimensions):
        return
    inputs = [PROMPT, LONG_PROMPT, PROMPT, LONG_PROMPT[:60]]

    together = await harness.engine.embed(inputs)
    alone = await harness.engine.embed(inputs[1:2])

    assert together.dtype == np.float32
    assert together.shape == (4, dimensions)
    assert np.linalg.norm(together, axis=1) == pytest.approx([1.0] * 4, abs=1e-4)
    assert together[2] == pytest.approx(together[0], abs=1e-4)
    assert alone[0] == pytest.approx(together[1], abs=1e-3)
    assert together[1] @ together[3] > together[1] @ together[0]


async def test_embedding_does_not_disturb_generation(harness: Harness) -> None:
    if lacks(harness.info.abilities.embedding_dimensions):
        return
    alone, _ = await harness.run(1, ask(40))
    harness.submit(2, ask(40))
    await harness.step()

    embedding = asyncio.ensure_future(harness.engine.embed([LONG_PROMPT] * 4))
    await harness.until_ended(2)
    async with asyncio.timeout(PATIENCE_S):
        while not embedding.done():  # noqa: ASYNC110 - an engine may embed within its steps only
            await asyncio.sleep(0.001)

    assert harness.told[2].token_ids == alone
    assert len(embedding.result()) == 4


async def test_an_embedding_may_be_cancelled(harness: Harness) -> None:
    if lacks(harness.info.abilities.embedding_dimensions):
        return
    embedding = asyncio.ensure_future(harness.engine.embed([LONG_PROMPT] * 8))
    await asyncio.sleep(0)

    embedding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await embedding

    again = await harness.engine.embed([PROMPT])
    token_ids, _ = await harness.run(1, ask(5))
    assert again.shape[0] == 1
    assert len(token_ids) == 5


async def test_what_cannot_be_embedded_is_an_error(harness: Harness) -> None:
    if lacks(harness.info.abilities.embedding_dimensions):
        return

    with pytest.raises(EmbeddingFailed):
        await harness.engine.embed([(65,) * (CONTEXT_LENGTH + 1)])

    assert (await harness.engine.embed([PROMPT])).shape[0] == 1


async def test_a_stopped_engine_neither_embeds_nor_loads(harness: Harness, tmp_path: Path) -> None:
    abilities = harness.info.abilities
    adapter = harness.row.adapter(tmp_path, 1)
    await harness.engine.stop()

    if abilities.embedding_dimensions:
        with pytest.raises(EngineDied):
            await harness.engine.embed([PROMPT])
    if abilities.adapters:
        with pytest.raises(EngineDied):
            await harness.engine.load_adapter(adapter)


async def test_background_starts_when_nobody_else_waits(harness: Harness) -> None:
    def background(tokens: int) -> EngineRequest:
        return replace(ask(tokens), is_background=True)

    running = range(1, CAPACITY + 1)
    for lane in running:
        harness.submit(lane, ask(20))
    await harness.step()
    for lane in (11, 12):
        harness.submit(lane, background(4))
    for lane in (21, 22, 23, 24):
        harness.submit(lane, ask(4))

    await harness.until_ended(*running, 11, 12, 21, 22, 23, 24)

    firsts = {lane: harness.told[lane].first_batch or 0 for lane in (11, 12, 21, 22, 23, 24)}
    assert max(firsts[lane] for lane in (21, 22, 23, 24)) <= min(firsts[11], firsts[12])
    assert all(len(harness.told[lane].token_ids) == 4 for lane in firsts)
