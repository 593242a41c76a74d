"""What changes logits before a token is drawn, against a plain reading of the rules."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.base import EngineRequest, Sampling
from services.worker.engine.llamacpp_logits import LogitRules, changes_logits
from services.worker.engine.matcher import MatcherError

SIZE = 40
END = 39
IS_END = np.arange(SIZE) == END
PLAIN = Sampling(temperature=1, top_p=1, top_k=0, seed=0)
IDS = st.integers(0, SIZE - 2)


def logits_of(seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 4, SIZE).astype(np.float32)


class WordMatcher:
    """Lets the tokens of one word follow each other, and then only the end."""

    def __init__(self, *word: int) -> None:
        self._left = list(word)

    def mask(self) -> npt.NDArray[np.bool_]:
        allowed = np.zeros(SIZE, np.bool_)
        allowed[self._left[0] if self._left else END] = True
        return allowed

    def accept(self, token_id: int) -> None:
        if not self._left or token_id != self._left[0]:
            raise MatcherError(f"token {token_id} does not fit")
        del self._left[0]

    @property
    def is_over(self) -> bool:
        return not self._left


class EndlessMatcher:
    """Lets token 3 follow itself for ever; the end may always come."""

    def mask(self) -> npt.NDArray[np.bool_]:
        allowed: npt.NDArray[np.bool_] = IS_END.copy()
        allowed[3] = True
        return allowed

    def accept(self, token_id: int) -> None:
        assert token_id == 3

    @property
    def is_over(self) -> bool:
        return False


def request_of(sampling: Sampling = PLAIN, /, **fields: object) -> EngineRequest:
    request = EngineRequest(prompt_ids=(1, 2, 2), max_output_tokens=99, sampling=sampling)
    return replace(request, **fields)  # type: ignore[arg-type]


@settings(max_examples=200)
@given(
    prompt=st.lists(IDS, min_size=1, max_size=6),
    continued=st.lists(IDS, max_size=4),
    output=st.lists(IDS, max_size=10),
    bias=st.dictionaries(IDS, st.floats(-100, 100, width=32), max_size=4),
    repetition=st.sampled_from([1.0, 0.5, 1.3]),
    frequency=st.sampled_from([0.0, -1.5, 0.7]),
    presence=st.sampled_from([0.0, 1.1, -2.0]),
    seed=st.integers(0, 100),
)
def test_bias_and_penalties_do_what_the_rule_says(
    prompt: list[int],
    continued: list[int],
    output: list[int],
    bias: dict[int, float],
    repetition: float,
    frequency: float,
    presence: float,
    seed: int,
) -> None:
    sampling = replace(
        PLAIN,
        logit_bias=tuple(sorted(bias.items())),
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    rules = LogitRules(
        request_of(sampling, prompt_ids=tuple(prompt), continue_ids=tuple(continued)), IS_END, None
    )
    for token_id in output:
        rules.take(token_id)
    got = logits_of(seed)
    rules.apply(got, len(continued) + len(output))

    expected = logits_of(seed).astype(np.float64)
    for token_id, value in bias.items():
        expected[token_id] += value
    for token_id in {*prompt, *continued, *output}:
        value = expected[token_id]
        expected[token_id] = value / repetition if value > 0 else value * repetition
    for token_id, count in Counter(continued + output).items():
        expected[token_id] -= count * frequency + presence
    assert np.allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_the_end_is_not_drawn_before_there_is_enough_output() -> None:
    rules = LogitRules(request_of(min_output_tokens=3, continue_ids=(5,)), IS_END, None)

    for outputs, is_hidden in ((1, True), (2, True), (3, False)):
        logits = logits_of(1)
        rules.apply(logits, outputs)
        assert np.isneginf(logits).tolist() == [is_hidden and bool(end) for end in IS_END]


def test_a_constraint_leaves_what_it_allows_and_ends_the_output() -> None:
    rules = LogitRules(request_of(), IS_END, WordMatcher(7, 8))

    for token_id in (7, 8):
        assert not rules.is_over
        logits = logits_of(2)
        rules.apply(logits, 0)
        assert np.flatnonzero(np.isfinite(logits)).tolist() == [token_id]
        rules.take(token_id)
    assert rules.is_over


@pytest.mark.parametrize(
    "fields", [{"min_output_tokens": 9}, {"ignore_eos": True}], ids=["too early", "ignored"]
)
def test_an_end_that_is_not_wanted_yet_comes_only_where_nothing_else_may(
    fields: dict[str, object],
) -> None:
    logits = logits_of(3)
    LogitRules(request_of(**fields), IS_END, EndlessMatcher()).apply(logits, 0)
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [3]

    logits = logits_of(3)
    LogitRules(request_of(**fields), IS_END, WordMatcher()).apply(logits, 0)
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [END]


def test_output_from_elsewhere_counts_for_the_constraint() -> None:
    rules = LogitRules(request_of(continue_ids=(7,)), IS_END, WordMatcher(7, 8))
    logits = logits_of(4)

    rules.apply(logits, 1)

    assert np.flatnonzero(np.isfinite(logits)).tolist() == [8]


def test_output_that_does_not_fit_is_refused_without_naming_it() -> None:
    with pytest.raises(MatcherError, match="an output token does not fit") as failure:
        LogitRules(request_of(continue_ids=(31,)), IS_END, WordMatcher(7, 8))

    assert "31" not in str(failure.value)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (request_of(), False),
        (request_of(replace(PLAIN, min_p=0.5)), False),
        (request_of(min_output_tokens=1, continue_ids=(1,)), False),
        (request_of(min_output_tokens=2, continue_ids=(1,)), True),
        (request_of(replace(PLAIN, presence_penalty=-0.1)), True),
        (request_of(replace(PLAIN, repetition_penalty=1.1)), True),
        (request_of(replace(PLAIN, logit_bias=((1, 0.5),))), True),
    ],
)
def test_only_who_asks_for_rules_has_some(request_: EngineRequest, expected: bool) -> None:  # noqa: FBT001
    assert changes_logits(request_) is expected
