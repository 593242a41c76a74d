"""What SamplingParams are made with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.worker.engine.base import Constraint, ConstraintKind, EngineRequest, Sampling
from services.worker.engine.trtllm_sampling import NEVER, Ends, biases_of, sampling_keywords

ENDS = Ends(all_ids=frozenset({2, 3}), known_id=2)
PLAIN = EngineRequest(
    prompt_ids=(9, 9, 9),
    max_output_tokens=8,
    sampling=Sampling(temperature=1, top_p=1, top_k=0, seed=5),
)
REGEX = Constraint(kind=ConstraintKind.REGEX, source="a", grammar="start: /a/")


def keywords(request: EngineRequest, *stop_texts: str) -> dict[str, object]:
    return sampling_keywords(
        request, room=8, ends=ENDS, vocabulary_size=1000, stop_texts=stop_texts
    )


def test_everything_that_has_a_surprising_default_is_written_out() -> None:
    assert keywords(PLAIN) == {
        "max_tokens": 8,
        "seed": 5,
        "detokenize": False,
        "include_stop_str_in_output": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "stop_token_ids": [2, 3],
    }


@pytest.mark.parametrize("temperature", [0, 1e-30])
def test_temperature_0_is_the_likeliest_token_in_the_one_way_that_all_understand(
    temperature: float,
) -> None:
    cold = Sampling(temperature=temperature, top_p=0.3, top_k=9, seed=5)
    greedy = replace(PLAIN, sampling=cold)

    assert {name: keywords(greedy)[name] for name in ("temperature", "top_p", "top_k")} == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 1,
    }


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (999, 999), (1000, 0), (2**31 - 1, 0)])
def test_no_more_tokens_are_kept_than_there_are(asked: int, given: int) -> None:
    request = replace(PLAIN, sampling=replace(PLAIN.sampling, top_k=asked))

    assert keywords(request)["top_k"] == given


def test_seeds_have_63_bits_and_the_64th_counts() -> None:
    seeds = [0, 1, 2**63, 2**63 + 1, 2**64 - 1]
    found = [
        keywords(replace(PLAIN, sampling=replace(PLAIN.sampling, seed=seed)))["seed"]
        for seed in seeds
    ]

    assert len(set(found)) == len(seeds)
    assert all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in found)


def test_stop_tokens_go_along_with_all_ends_of_the_model() -> None:
    assert keywords(replace(PLAIN, stop_token_ids=frozenset({70, 2})), "x")["stop"] == ["x"]
    assert keywords(replace(PLAIN, stop_token_ids=frozenset({70}))) == {
        **keywords(PLAIN),
        "stop_token_ids": [2, 3, 70],
    }


def test_ignored_ends_switch_off_all_stops_so_none_are_given() -> None:
    request = replace(PLAIN, ignore_eos=True, stop_token_ids=frozenset({70}), min_output_tokens=4)

    found = keywords(request, "x")

    assert found["ignore_eos"] is True
    assert not {"stop", "stop_token_ids", "min_tokens"} & set(found)
    assert biases_of(request, ENDS) == {}


def test_penalties_are_those_of_the_output_but_for_repetition() -> None:
    sampling = replace(PLAIN.sampling, frequency_penalty=1, repetition_penalty=2, min_p=0.5)
    found = keywords(replace(PLAIN, sampling=sampling, continue_ids=(4,)))

    assert found["frequency_penalty"] == 1.0
    assert found["prompt_ignore_length"] == 3
    assert found["repetition_penalty"] == 2.0
    assert found["min_p"] == 0.5
    assert "presence_penalty" not in found


@pytest.mark.parametrize(("asked", "wanted"), [(0, 1), (1, 1), (5, 5)])
def test_log_probabilities_of_none_but_the_token_are_asked_for_as_one(
    asked: int, wanted: int
) -> None:
    assert keywords(replace(PLAIN, top_logprobs=asked))["logprobs"] == wanted
    assert "logprobs" not in keywords(PLAIN)


def test_ends_that_the_engine_does_not_know_cannot_come_while_it_holds_back_its_own() -> None:
    request = replace(PLAIN, min_output_tokens=6, continue_ids=(4, 4))

    assert keywords(request)["min_tokens"] == 4
    assert biases_of(request, ENDS) == {3: NEVER}
    done = replace(request, min_output_tokens=2)
    assert "min_tokens" not in keywords(done)
    assert biases_of(done, ENDS) == {}


@pytest.mark.parametrize("changed", [{"ignore_eos": True}, {"min_output_tokens": 6}])
def test_under_a_constraint_an_end_is_only_made_unlikely(changed: dict[str, bool | int]) -> None:
    """Forbidden, it could leave nothing to draw; ignored, it could leave nothing to match."""
    request = replace(PLAIN, constraint=REGEX, **changed)  # type: ignore[arg-type] # one of both

    assert not {"ignore_eos", "min_tokens"} & set(keywords(request))
    assert keywords(request)["stop_token_ids"] == [2, 3]
    assert biases_of(request, ENDS) == {2: NEVER, 3: NEVER}


def test_biases_of_the_request_are_kept() -> None:
    sampling = replace(PLAIN.sampling, logit_bias=((7, -1.5),))

    assert biases_of(replace(PLAIN, sampling=sampling), ENDS) == {7: -1.5}
