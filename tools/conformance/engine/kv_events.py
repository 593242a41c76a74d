"""What an engine tells of its prefix cache is what it reads from it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from services.worker.engine.base import EngineRequest, Lane
from tools.conformance.engine.check import KV_EVENTS, Book
from tools.conformance.engine.harness import Harness, ask
from tools.conformance.engine.kv_model import KvModel
from tools.conformance.verdict import CannotShow, expect, expect_equal

EVENTS = Book("kv_events")
_PROMPT_TOKENS = 100
_TOKENS_MAX = 4096
"""Largest cache that a check fills up."""


@EVENTS.check(KV_EVENTS)
async def blocks_that_are_told_are_read_by_who_has_the_salt(harness: Harness) -> None:
    """A prompt's blocks are told, and the next one reads just these, unless its salt differs."""
    model = KvModel(harness.info.abilities.kv_block_tokens)
    prompt = _own_prompt(harness, 0)
    request = replace(ask(1, prompt=prompt), cache_salt=harness.salt)
    expect_equal(model.prefix_blocks(prompt), 0, "blocks before the prompt")

    await _run(harness, model, 1, request)
    await _until(harness, model, prompt, len(prompt) // harness.info.abilities.kv_block_tokens)
    longer = (*prompt, *_own_prompt(harness, 1)[:9])
    told = model.prefix_blocks(longer)
    request = replace(request, prompt_ids=longer)
    await _run(harness, model, 2, replace(request, cache_salt=harness.salt + b"'s other"))
    await _run(harness, model, 3, request)

    expect_equal(harness.told[2].cached_tokens, 0, "cached tokens with another salt")
    expect_equal(_cached_blocks(harness, 3), told, "cached blocks")


@EVENTS.check(KV_EVENTS)
async def blocks_that_are_told_to_be_gone_are_not_read(harness: Harness) -> None:
    """Prompts that fill the cache drive out the first, which is told and then computed anew."""
    fits = harness.engine.load().kv_total_tokens
    if fits is None or fits > _TOKENS_MAX:
        raise CannotShow("its cache is too large to be filled, or its size is not known")
    model = KvModel(harness.info.abilities.kv_block_tokens)
    first = _own_prompt(harness, 0)
    request = replace(ask(1, prompt=first), cache_salt=harness.salt)
    await _run(harness, model, 1, request)
    await _until(harness, model, first, 1)

    lane = 2
    while model.prefix_blocks(first) and lane < 4 + 2 * fits // _PROMPT_TOKENS:
        await _run(harness, model, lane, replace(request, prompt_ids=_own_prompt(harness, lane)))
        lane += 1
    while model.prefix_blocks(first):
        model.apply((await harness.step()).kv_events)
    await _run(harness, model, lane, request)

    expect_equal(_cached_blocks(harness, lane), 0, "cached blocks")


async def _run(harness: Harness, model: KvModel, lane: Lane, request: EngineRequest) -> None:
    harness.submit(lane, request)
    while harness.told[lane].ended is None:
        model.apply((await harness.step()).kv_events)


async def _until(harness: Harness, model: KvModel, prompt: Sequence[int], blocks: int) -> None:
    """Events may come later than the end of what caused them."""
    blocks = min(blocks, (len(prompt) - 1) // harness.info.abilities.kv_block_tokens)
    expect(blocks > 0, "the prompt has no whole block")
    while model.prefix_blocks(prompt) < blocks:
        model.apply((await harness.step()).kv_events)


def _cached_blocks(harness: Harness, lane: Lane) -> int:
    return harness.told[lane].cached_tokens // harness.info.abilities.kv_block_tokens


def _own_prompt(harness: Harness, number: int) -> tuple[int, ...]:
    """A prompt whose blocks no other check has had in the cache, with any salt."""
    seed = harness.salt + number.to_bytes(4, "little")
    return tuple(40 + byte % 64 for byte in hashlib.shake_128(seed).digest(_PROMPT_TOKENS))
