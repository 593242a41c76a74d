"""Frames that say what an engine is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.base import (
    ConstraintKind,
    EngineAbilities,
    EngineInfo,
    LoadProgress,
    LoadStage,
)
from services.worker.engine.kv_events import KvCleared, KvRemoved, KvStored, KvTier, chain
from services.worker.engine.wire import FrameReader
from services.worker.engine.wire_facts import (
    Setting,
    pack_kv,
    pack_progress,
    pack_ready,
    pack_settings,
    unpack_kv,
    unpack_progress,
    unpack_ready,
    unpack_settings,
)

HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=5).map(tuple)
EVENTS = (
    st.builds(KvStored, HASHES, st.none() | st.integers(0, 2**64 - 1), st.sampled_from(KvTier))
    | st.builds(KvRemoved, HASHES)
    | st.just(KvCleared())
)
INFO = EngineInfo(
    engine="some",
    version="1",
    context_length=10,
    max_running=2,
    vocabulary_size=3,
    digest="sha256:00",
    is_deterministic=False,
    abilities=EngineAbilities(
        constraints=frozenset({ConstraintKind.REGEX, ConstraintKind.TOOLS}),
        max_top_logprobs=5,
        kv_block_tokens=32,
    ),
)


def body_of(frame: bytes) -> bytes:
    ((_, body),) = FrameReader().feed(frame)
    return body


@given(events=st.lists(EVENTS, max_size=6))
def test_changes_of_the_cache_arrive_as_they_were_sent(
    events: list[KvStored | KvRemoved | KvCleared],
) -> None:
    assert unpack_kv(body_of(pack_kv(events))) == events


@pytest.mark.parametrize("info", [INFO, replace(INFO, abilities=EngineAbilities())])
@pytest.mark.parametrize("kv_total_tokens", [None, 0, 2**40])
def test_what_an_engine_is_arrives_as_it_was_sent(
    info: EngineInfo, kv_total_tokens: int | None
) -> None:
    assert unpack_ready(body_of(pack_ready(info, kv_total_tokens))) == (info, kv_total_tokens)


@pytest.mark.parametrize("stage", LoadStage)
@pytest.mark.parametrize("fraction", [None, 0.25])
def test_progress_arrives_as_it_was_sent(stage: LoadStage, fraction: float | None) -> None:
    progress = LoadProgress(stage, fraction)

    assert unpack_progress(body_of(pack_progress(progress))) == progress


def test_settings_may_be_nested() -> None:
    settings: dict[str, Setting] = {"a": {"b": [1, None, "x"]}, "c": 0.5}

    assert unpack_settings(body_of(pack_settings(settings))) == settings


def test_the_name_of_a_block_says_all_that_stands_before_it() -> None:
    first, second = chain(None, [1, 2]), chain(None, [3, 2])

    # BLAKE2b over eight zeros and the two ids, by hand.
    assert first == 18389742664249816232
    assert first != second
    assert chain(first, [5]) != chain(second, [5])
    assert chain(first, [5]) == chain(chain(None, [1, 2]), [5])
    assert chain(None, [1, 2, 5]) != chain(first, [5])
