"""What statistics of iterations say, and what they leave open."""

from __future__ import annotations

import json

import pytest

from services.worker.engine.trtllm_load import KvUse, Measured, StatsReader

KV = {"maxNumBlocks": 100, "usedNumBlocks": 8, "freeNumBlocks": 92, "tokensPerBlock": 32}


def entry(iteration: int = 1, **changed: object) -> dict[str, object]:
    return {"iter": iteration, "numActiveRequests": 5, "kvCacheStats": KV, **changed}


def test_blocks_become_tokens() -> None:
    found = StatsReader().read([entry(3), json.dumps(entry(4))])

    assert found == Measured(iteration=4, kv=KvUse(used_tokens=256, total_tokens=3200))


@pytest.mark.parametrize(
    "stats",
    [None, {}, {"usedNumBlocks": 8}, {"tokensPerBlock": 32}, {**KV, "usedNumBlocks": None}, 5],
)
def test_what_is_missing_is_not_known_rather_than_nothing(stats: object) -> None:
    assert StatsReader().read([entry(kvCacheStats=stats)]) == Measured(iteration=1, kv=None)


def test_a_cache_without_a_size_has_none() -> None:
    found = StatsReader().read([entry(kvCacheStats={**KV, "maxNumBlocks": 0})])

    assert found.kv == KvUse(used_tokens=256, total_tokens=None)


def test_the_last_word_stays_while_nothing_is_told() -> None:
    reader = StatsReader()
    before = reader.read([entry(7)])

    assert reader.read([]) == before
    assert reader.read([entry(8, kvCacheStats=None)]) == Measured(iteration=8, kv=before.kv)


def test_ranks_add_up() -> None:
    reader = StatsReader()
    reader.read([entry(attentionDpRank=0), entry(attentionDpRank=1)])

    found = reader.read([entry(2, attentionDpRank=1, kvCacheStats={**KV, "usedNumBlocks": 1})])

    assert found.kv == KvUse(used_tokens=9 * 32, total_tokens=6400)


@pytest.mark.parametrize("record", ["no json", "5", {"iter": "x"}, {}])
def test_what_cannot_be_read_says_nothing(record: dict[str, object] | str) -> None:
    assert StatsReader().read([record]) == Measured()
