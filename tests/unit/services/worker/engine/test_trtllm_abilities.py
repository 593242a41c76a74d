"""What each version of TensorRT-LLM is promised to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import pytest

from services.worker.engine.base import ConstraintKind, EngineAbilities
from services.worker.engine.trtllm_abilities import abilities_of, version_of
from services.worker.engine.trtllm_settings import read_settings
from services.worker.trtllm_config import TrtllmSection
from tests.unit.services.worker.engine.trtllm_world import installed, told


def abilities(
    version: str,
    section: Mapping[str, object] = MappingProxyType({}),
    *,
    has_tensors: bool = True,
    end_count: int = 2,
) -> EngineAbilities:
    with installed(version) as surface:
        trtllm = TrtllmSection.model_validate(dict(section)).model_dump(mode="json")
        settings = read_settings({**told(), "trtllm": trtllm})
        return abilities_of(settings, surface, has_tensors=has_tensors, end_count=end_count)


def test_a_candidate_comes_before_its_release() -> None:
    texts = ["1.2.1", "1.3.0rc9", "1.3.0rc14", "1.3.0rc14.post1", "1.3.0", "1.4.0rc1"]

    assert [version_of(text) for text in texts] == sorted(map(version_of, texts))
    assert version_of("1.3") == version_of("1.3.0")
    assert version_of("nightly") == (0, 0, 0, 0)


def test_old_versions_are_not_promised_what_they_take_and_leave_out() -> None:
    old, new = abilities("1.2.1"), abilities("1.4.0rc1")

    left_out = ("min_p", "penalties", "repetition_penalty", "min_output_tokens")
    assert not any(getattr(old, name) for name in left_out)
    assert all(getattr(new, name) for name in left_out)
    facts = dataclasses.asdict(old).items() ^ dataclasses.asdict(new).items()
    assert {name for name, _ in facts} == set(left_out)


def test_what_nobody_can_do_is_promised_nowhere() -> None:
    found = abilities("1.4.0rc1")

    assert not found.prompt_logprobs
    assert found.embedding_dimensions == 0
    assert found.max_top_logprobs == 20


def test_without_tensors_there_are_no_biases_and_what_takes_them() -> None:
    found = abilities("1.4.0rc1", has_tensors=False)

    assert not found.logit_bias
    assert not found.min_output_tokens
    assert abilities("1.4.0rc1", has_tensors=False, end_count=1).min_output_tokens


def test_a_sampler_inside_the_models_graph_draws_plainly() -> None:
    found = abilities("1.4.0rc1", {"speculative": {"kind": "mtp", "tokens": 2}})

    assert found.max_top_logprobs is None
    assert not any((found.logit_bias, found.penalties, found.min_p, found.min_output_tokens))


@pytest.mark.parametrize(("backend", "count"), [("llguidance", 6), ("xgrammar", 3), ("none", 0)])
def test_constraints_are_those_of_the_backend(backend: str, count: int) -> None:
    found = abilities("1.2.1", {"guided_decoding": {"backend": backend}})

    assert len(found.constraints) == count
    assert (ConstraintKind.JSON_SCHEMA in found.constraints) == (backend == "llguidance")


def test_adapters_cache_and_events_are_as_configured() -> None:
    plain = abilities("1.2.1")
    changed = abilities(
        "1.2.1",
        {
            "lora": {"enabled": True},
            "kv_cache": {"reuse": False},
            "statistics": {"kv_events": False},
        },
    )

    assert (plain.adapters, plain.prompt_cache, plain.kv_block_tokens) == (False, True, 32)
    assert (changed.adapters, changed.prompt_cache, changed.kv_block_tokens) == (True, False, 0)
