"""The prefix cache: who shares it, and who does not."""

from __future__ import annotations

from dataclasses import replace

from tools.conformance.engine.check import ADAPTERS, PROMPT_CACHE, Book
from tools.conformance.engine.harness import LONG_PROMPT, Harness, ask
from tools.conformance.verdict import expect, expect_equal

CACHE = Book("cache")
_LEAST_HIT = 16


@CACHE.check(PROMPT_CACHE)
async def a_second_prompt_with_the_same_salt_hits_the_cache(harness: Harness) -> None:
    """Paired: the same salt must hit, another must not, and nobody's tokens change."""
    request = replace(ask(8, prompt=LONG_PROMPT), cache_salt=harness.salt)
    cold, _ = await harness.run(1, request)

    foreign, _ = await harness.run(2, replace(request, cache_salt=harness.salt + b"'s other"))
    warm, _ = await harness.run(3, request)
    unread, _ = await harness.run(4, replace(request, reads_cache=False))

    cached = [harness.told[lane].cached_tokens for lane in (1, 2, 4)]
    expect_equal(cached, [0, 0, 0], "cached tokens, cold, with another salt, unread")
    hit = harness.told[3].cached_tokens
    expect(_LEAST_HIT <= hit < len(LONG_PROMPT), f"{hit} cached tokens of the same prompt")
    harness.expect_same(foreign, cold, "with another salt")
    harness.expect_same(warm, cold, "from the cache")
    harness.expect_same(unread, cold, "without reading the cache")


@CACHE.check(PROMPT_CACHE)
async def a_longer_prompt_hits_what_it_shares(harness: Harness) -> None:
    """What two prompts begin with is computed once."""
    longer = (*LONG_PROMPT, 65, 66, 67)
    other = replace(ask(8, prompt=longer), cache_salt=harness.salt + b"'s other")
    alone, _ = await harness.run(1, other)
    await harness.run(2, replace(ask(1, prompt=LONG_PROMPT), cache_salt=harness.salt))

    shared, _ = await harness.run(3, replace(other, cache_salt=harness.salt))

    hit = harness.told[3].cached_tokens
    expect(_LEAST_HIT <= hit <= len(LONG_PROMPT), f"{hit} cached tokens of a longer prompt")
    harness.expect_same(shared, alone, "from the cache")


@CACHE.check(PROMPT_CACHE)
async def prompts_that_run_together_do_not_mix(harness: Harness) -> None:
    """Three salts at once, twice: the first time nobody hits, the second time everybody."""
    salts = {lane: harness.salt + b"%d" % lane for lane in (1, 2, 3)}
    for lane, salt in salts.items():
        harness.submit(lane, replace(ask(8, prompt=LONG_PROMPT), cache_salt=salt))
    await harness.until_ended(*salts)
    first = [harness.told[lane].cached_tokens for lane in salts]

    for lane, salt in salts.items():
        await harness.run(10 + lane, replace(ask(8, prompt=LONG_PROMPT), cache_salt=salt))

    expect_equal(first, [0, 0, 0], "cached tokens of three salts")
    hits = [harness.told[10 + lane].cached_tokens for lane in salts]
    expect(min(hits) >= _LEAST_HIT, f"cached tokens of their second prompts: {hits}")


@CACHE.check(PROMPT_CACHE, ADAPTERS)
async def an_adapter_does_not_share_the_cache(harness: Harness) -> None:
    """What the base model computed is nothing to a model with an adapter."""
    adapter = harness.row.adapter(harness.folder, 1)
    await harness.load_adapter(adapter)
    plain = replace(ask(4, prompt=LONG_PROMPT), cache_salt=harness.salt)
    await harness.run(1, plain)
    request = replace(plain, adapter=adapter)

    cold, _ = await harness.run(2, request)
    warm, _ = await harness.run(3, request)

    expect_equal(harness.told[2].cached_tokens, 0, "cached tokens at first")
    expect(harness.told[3].cached_tokens > 0, "the second prompt hit nothing")
    harness.expect_same(warm, cold, "from the cache")
