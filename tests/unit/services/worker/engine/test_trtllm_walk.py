"""Constraints that are followed from the middle of an output."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLMatcher

from services.worker.engine.base import Constraint, ConstraintKind, EngineRequest, Sampling
from services.worker.engine.trtllm_guided import ConstraintUnusable
from services.worker.engine.trtllm_walk import Walks, step_of
from tests.standins.tiny_hf_model import TinyModel, write_model

A, B, C = b"abc"
ASK = EngineRequest(
    prompt_ids=(9,),
    continue_ids=(A, B),
    max_output_tokens=8,
    sampling=Sampling(temperature=1, top_p=1, top_k=0, seed=2**64 - 1),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def walks(model: TinyModel) -> Walks:
    return Walks(model.folder, size=model.vocabulary_rows, end_id=model.eos_id)


def constrained(regex: str) -> EngineRequest:
    grammar = LLMatcher.grammar_from_regex(regex)
    constraint = Constraint(kind=ConstraintKind.REGEX, source=regex, grammar=grammar)
    return replace(ASK, constraint=constraint)


def test_what_may_come_is_what_follows_the_output_so_far(walks: Walks, model: TinyModel) -> None:
    walker = walks.begin(constrained("abb?c?"))
    allowed = walker.allowed(keeps_on=False)
    assert allowed is not None
    kept_on = walker.allowed(keeps_on=True)
    assert kept_on is not None

    assert set(np.flatnonzero(allowed).tolist()) == {B, C, model.eos_id}
    assert set(np.flatnonzero(kept_on).tolist()) == {B, C}
    assert len(allowed) == model.vocabulary_rows
    walker.take(C)
    assert walker.allowed(keeps_on=True) is None


def test_an_output_that_was_complete_has_only_its_end_left(walks: Walks) -> None:
    assert walks.begin(constrained("ab")).allowed(keeps_on=False) is None


def test_an_output_that_does_not_fit_is_refused_without_saying_what_it_was(walks: Walks) -> None:
    with pytest.raises(ConstraintUnusable) as refused:
        walks.begin(constrained("secret"))

    assert "secret" not in str(refused.value)
    walker = walks.begin(constrained("abc"))
    with pytest.raises(ConstraintUnusable):
        walker.take(B)


def test_a_grammar_that_does_not_compile_is_refused(walks: Walks) -> None:
    broken = Constraint(kind=ConstraintKind.GRAMMAR, source="", grammar="no grammar at all")

    with pytest.raises(ConstraintUnusable):
        walks.begin(replace(ASK, constraint=broken))


def test_a_model_without_a_tokenizer_cannot_be_walked(tmp_path: Path) -> None:
    with pytest.raises(ConstraintUnusable):
        Walks(tmp_path, size=10, end_id=1).begin(constrained("ab"))


def test_each_step_is_a_request_of_its_own_with_a_seed_of_its_own() -> None:
    request = replace(constrained("ab"), min_output_tokens=5, ignore_eos=True, stop_texts=("x",))

    steps = [step_of(request, drawn) for drawn in ((), (7,), (7, 8))]

    assert [step.continue_ids for step in steps] == [(A, B), (A, B, 7), (A, B, 7, 8)]
    assert len({step.sampling.seed for step in steps}) == 3
    assert all(0 <= step.sampling.seed < 2**64 for step in steps)
    plain = (None, False, 0, ())
    assert {
        (step.constraint, step.ignore_eos, step.min_output_tokens, step.stop_texts)
        for step in steps
    } == {plain}
