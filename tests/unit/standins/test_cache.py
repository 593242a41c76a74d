"""The KV cache of the stand-in, its events, and statistics of both kinds of versions."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from tests.unit.standins.conftest import Load, Standin

OLD, NEW = "1.2.1", "1.3.0rc14"
LONG = list(range(40, 110))
EVENTS = {"event_buffer_max_size": 1000}
QUICK_S = 0.005


async def events_of(llm: Any) -> list[dict[str, Any]]:
    return [event async for event in llm.get_kv_cache_events_async(timeout=QUICK_S)]


async def stats_of(llm: Any) -> list[dict[str, Any]]:
    return [entry async for entry in llm.get_stats_async(timeout=QUICK_S)]


async def test_prompts_share_what_they_have_in_common_within_a_salt(plain: Standin) -> None:
    llm = plain.llm()

    async def cached(prompt: list[int], salt: str | None) -> int:
        result = await plain.run(llm, prompt, max_tokens=1, cache_salt=salt)
        return int(result.cached_tokens)

    assert await cached(LONG, "a") == 0
    assert await cached(LONG, "b") == 0
    assert await cached(LONG, None) == 0
    assert 64 <= await cached(LONG, "a") < len(LONG)
    assert 64 <= await cached([*LONG, 1, 2, 3], "a") <= len(LONG)
    assert await cached([1, *LONG], "a") == 0


async def test_without_partial_reuse_only_whole_blocks_are_shared(plain: Standin) -> None:
    config = {"enable_partial_reuse": False, "tokens_per_block": 16}
    llm = plain.llm(kv_cache_config=config)
    await plain.run(llm, LONG, max_tokens=1)

    assert (await plain.run(llm, LONG, max_tokens=1)).cached_tokens == 64


async def test_events_tell_blocks_with_those_that_are_not_full(plain: Standin) -> None:
    llm = plain.llm(kv_cache_config=EVENTS)

    await plain.run(llm, LONG, max_tokens=4, ignore_eos=True)
    told = await events_of(llm)

    assert [event["event_id"] for event in told] == list(range(len(told)))
    created, first, rest = told
    assert created["data"] == {"type": "created", "num_blocks_per_cache_level": [1024, 0]}
    assert first["data"]["parent_hash"] is None
    assert [len(block["tokens"]) for block in first["data"]["blocks"]] == [32, 32]
    assert rest["data"]["parent_hash"] == first["data"]["blocks"][-1]["block_hash"] >= 1 << 63
    (partial,) = rest["data"]["blocks"]
    assert [token["token_id"] for token in partial["tokens"][:6]] == LONG[64:]
    assert len(partial["tokens"]) == len(LONG) - 64 + 3
    assert "cache_salt" not in partial


async def test_what_is_thrown_out_is_told(plain: Standin) -> None:
    llm = plain.llm(kv_cache_config={**EVENTS, "max_tokens": 96})

    for start in (0, 100):
        await plain.run(llm, list(range(start, start + 70)), max_tokens=1)

    kinds = [event["data"]["type"] for event in await events_of(llm)]
    assert kinds == [
        "created",
        "stored",
        "stored",
        "removed",
        "removed",
        "removed",
        "stored",
        "stored",
    ]


async def test_blocks_move_to_the_host_and_back(plain: Standin) -> None:
    host = 3 * 32 * 1024
    config = {**EVENTS, "max_tokens": 96, "host_cache_size": host, "enable_partial_reuse": False}
    llm = plain.llm(kv_cache_config=config)

    for start in (0, 100):
        await plain.run(llm, list(range(start, start + 64)), max_tokens=1)
    result = await plain.run(llm, list(range(64)), max_tokens=1)

    moves = [event["data"] for event in await events_of(llm) if event["data"]["type"] == "updated"]
    assert result.cached_tokens == 32
    assert {move["cache_level"]["new_value"] for move in moves} == {0, 1}


async def test_the_oldest_events_are_lost(plain: Standin) -> None:
    llm = plain.llm(kv_cache_config={"event_buffer_max_size": 1})

    await plain.run(llm, LONG, max_tokens=40, ignore_eos=True)
    told = [event["event_id"] for event in await events_of(llm)]

    assert 0 not in told


async def test_windows_and_gaps_can_be_had(load: Load) -> None:
    faults = [{"name": "events_windows", "window": 64}, {"name": "events_gap", "event": 3}]
    standin = load(faults=faults)
    llm = standin.llm(kv_cache_config=EVENTS)

    await standin.run(llm, LONG, max_tokens=1)
    told = await events_of(llm)

    assert {event["window_size"] for event in told} == {64, 256}
    assert [event["event_id"] for event in told] == [0, 1, 2, 4, 5]


async def test_before_the_first_request_older_versions_have_nothing(plain: Standin) -> None:
    llm = plain.llm(enable_iter_perf_stats=True, kv_cache_config=EVENTS)

    assert await stats_of(llm) == []
    with pytest.raises(AssertionError, match="not properly instantiated"):
        await events_of(llm)


async def test_statistics_have_to_be_switched_on(plain: Standin) -> None:
    llm = plain.llm()
    await plain.run(llm)

    assert await stats_of(llm) == []


async def test_statistics_tell_of_iterations(plain: Standin) -> None:
    llm = plain.llm(enable_iter_perf_stats=True, enable_iter_req_stats=True)
    await plain.run(llm, LONG, max_tokens=5, ignore_eos=True)

    told = await stats_of(llm)

    assert [entry["iter"] for entry in told] == [1, 2, 3, 4, 5]
    assert [entry["numActiveRequests"] for entry in told] == [1] * 5
    first, last = told[0], told[-1]
    assert first["inflightBatchingStats"]["numCtxTokens"] == len(LONG)
    assert first["kvCacheStats"]["usedNumBlocks"] == 3
    assert first["requestStats"][0]["numGeneratedTokens"] == 1
    # Nothing runs any more, but nobody says so.
    assert last["numCompletedRequests"] == 1
    assert "numCtxKvTokens" not in last["inflightBatchingStats"]


async def test_a_queue_that_was_idle_is_done_until_the_next_request(plain: Standin) -> None:
    llm = plain.llm(enable_iter_perf_stats=True)
    await plain.run(llm, max_tokens=2, ignore_eos=True)
    result = llm.get_stats_async(timeout=QUICK_S)
    assert len([entry async for entry in result]) == 2

    await plain.run(llm, max_tokens=3, ignore_eos=True)

    assert llm.get_stats_async(timeout=QUICK_S) is result
    assert len([entry async for entry in result]) == 3


async def test_newer_versions_block_whoever_asks(load: Load) -> None:
    standin = load(version=NEW)
    llm = standin.llm(enable_iter_perf_stats=True, kv_cache_config=EVENTS)

    started_s = time.monotonic()  # noqa: TID251 - of a real thread
    assert [entry async for entry in llm.get_stats_async(timeout=0.03)] == []
    assert time.monotonic() - started_s >= 0.03  # noqa: TID251 - of a real thread
    await standin.run(llm, LONG, max_tokens=2, cache_salt="tenant")
    told = await stats_of(llm)
    stored = [event for event in await events_of(llm) if event["data"]["type"] == "stored"]

    assert "numCtxKvTokens" in told[0]["inflightBatchingStats"]
    assert stored[0]["data"]["blocks"][0]["cache_salt"] == "tenant"


async def test_statistics_may_lack_what_is_usual(load: Load) -> None:
    missing = {"name": "stats_missing", "keys": ["numQueuedRequests", "kvCacheStats.usedNumBlocks"]}
    standin = load(faults=[missing])
    llm = standin.llm(enable_iter_perf_stats=True)
    await standin.run(llm)

    entry = (await stats_of(llm))[0]

    assert "numQueuedRequests" not in entry
    assert "usedNumBlocks" not in entry["kvCacheStats"]


@pytest.mark.parametrize("fault", ["stats_null_kv", "stats_none", "stats_error"])
async def test_statistics_may_fail(load: Load, fault: str) -> None:
    standin = load(faults=[{"name": fault}])
    llm = standin.llm(enable_iter_perf_stats=True)
    await standin.run(llm)

    if fault == "stats_error":
        with pytest.raises(RuntimeError, match="cannot be read"):
            await stats_of(llm)
        return
    assert [entry["kvCacheStats"] for entry in await stats_of(llm)][:1] == {
        "stats_null_kv": [None],
        "stats_none": [],
    }[fault]


async def test_utilization_starts_more_and_throws_out_who_came_last(plain: Standin) -> None:
    llm = plain.llm(
        enable_iter_perf_stats=True,
        kv_cache_config={"max_tokens": 192, "enable_block_reuse": False},
        scheduler_config={"capacity_scheduler_policy": "MAX_UTILIZATION"},
    )
    alone = [
        (await plain.run(llm, [65 + at], max_tokens=100, ignore_eos=True)).outputs[0].token_ids
        for at in range(3)
    ]
    await stats_of(llm)

    results = await asyncio.gather(
        *(plain.run(llm, [65 + at], max_tokens=100, ignore_eos=True) for at in range(3))
    )

    told = await stats_of(llm)
    assert [one.outputs[0].token_ids for one in results] == alone
    assert max(entry["numActiveRequests"] for entry in told) == 3
    assert sum(entry["inflightBatchingStats"]["numPausedRequests"] for entry in told) > 0
