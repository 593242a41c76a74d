"""Constraints, other rules and scores in the batch in flight."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from services.worker.engine.base import (
    Constraint,
    ConstraintKind,
    Ended,
    EndReason,
    EngineRequest,
)
from services.worker.engine.llamacpp_logits import OutputMatcher
from services.worker.engine.matcher import MatcherError
from tests.unit.services.worker.engine.llamacpp_world import (
    END,
    GREEDY,
    SIZE,
    World,
    ask,
    continued,
    next_id,
)

PROMPT = tuple(range(2, 26))
PATIENCE_S = 10.0


def constrained(grammar: str, *, tokens: int = 20, **fields: object) -> EngineRequest:
    constraint = Constraint(kind=ConstraintKind.GRAMMAR, source="", grammar=grammar)
    return replace(ask((1, 2), tokens), constraint=constraint, **fields)  # type: ignore[arg-type]


class CountingMatcher:
    """Lets numbers below 10 through, as many as the grammar says, and then only the end."""

    def __init__(self, left: int) -> None:
        self._left = left

    def mask(self) -> npt.NDArray[np.bool_]:
        if self._left < 0:
            raise MatcherError("nothing fits")
        ids = np.arange(SIZE)
        return np.asarray(ids < 10 if self._left else ids == END)

    def accept(self, token_id: int) -> None:
        if token_id >= 10 or not self._left:
            raise MatcherError(f"token {token_id} does not fit")
        # 101 is a grammar that breaks behind its first token.
        self._left = -1 if self._left == 101 else self._left - 1

    @property
    def is_over(self) -> bool:
        return self._left == 0


def compile_grammar(grammar: str) -> OutputMatcher:
    if not grammar.isdigit():
        raise MatcherError("the grammar is malformed")
    return CountingMatcher(int(grammar))


@pytest.fixture
def world() -> World:
    return World()


# Constraints and other rules.


def test_a_constrained_output_ends_where_nothing_more_may_follow() -> None:
    world = World(compile_grammar=compile_grammar)
    world.batch.submit(0, constrained("4"))
    world.batch.submit(1, ask((1, 2), 9))

    world.run()

    assert len(world.outputs[0]) == 4
    assert max(world.outputs[0]) < 10
    assert world.ended[0].reason is EndReason.END_OF_SEQUENCE
    assert world.outputs[1] == continued((1, 2), 9)


def test_a_limit_ends_a_constrained_output_before() -> None:
    world = World(compile_grammar=compile_grammar)
    world.batch.submit(0, constrained("9", tokens=3))

    world.run()

    assert len(world.outputs[0]) == 3
    assert world.ended[0].reason is EndReason.MAX_TOKENS


@pytest.mark.parametrize(
    ("grammar", "message", "reason"),
    [
        ("malformed", "the grammar is malformed", EndReason.FAILED),
        ("101", "nothing fits", EndReason.CONSTRAINT_LIMIT),
    ],
    ids=["does not compile", "cannot be followed"],
)
def test_a_broken_constraint_ends_its_lane_alone(
    grammar: str, message: str, reason: EndReason
) -> None:
    world = World(compile_grammar=compile_grammar)
    world.batch.submit(0, constrained(grammar))
    world.batch.submit(1, ask((1, 2), 9))

    world.run()

    assert world.ended[0] == Ended(0, reason, None, message)
    assert world.outputs[1] == continued((1, 2), 9)


def test_a_continued_output_that_is_complete_ends_without_a_step() -> None:
    world = World(compile_grammar=compile_grammar)
    world.batch.submit(0, constrained("2", continue_ids=(3, 4)))

    world.run()

    assert world.ended[0].reason is EndReason.END_OF_SEQUENCE
    assert not world.decoder.steps


def test_a_continued_output_that_does_not_fit_fails() -> None:
    world = World(compile_grammar=compile_grammar)
    world.batch.submit(0, constrained("2", continue_ids=(3, 44)))

    world.run()

    assert world.ended[0].reason is EndReason.FAILED
    assert "44" not in world.ended[0].message


def test_others_pass_a_lane_whose_constraint_is_being_compiled() -> None:
    may_compile = threading.Event()

    def compile_late(grammar: str) -> OutputMatcher:
        assert may_compile.wait(PATIENCE_S)
        return compile_grammar(grammar)

    world = World(compile_grammar=compile_late)
    world.batch.submit(0, constrained("4"))
    world.batch.submit(1, ask((1, 2), 5))
    world.batch.submit(2, replace(ask((1, 2), 5), is_background=True))
    while 1 not in world.ended:
        world.step()
    assert world.prefilled == [1]

    may_compile.set()
    world.run()

    assert world.prefilled == [1, 0, 2]
    assert world.ended[0].reason is EndReason.END_OF_SEQUENCE


def test_a_compiler_that_breaks_fails_its_lane_alone_and_shows_nothing() -> None:
    def break_down(grammar: str) -> OutputMatcher:
        raise ValueError(grammar)

    world = World(compile_grammar=break_down)
    world.batch.submit(0, constrained("secret"))
    world.batch.submit(1, ask((1, 2), 5))

    world.run()

    message = "the constraint cannot be compiled: ValueError"
    assert world.ended[0] == Ended(0, EndReason.FAILED, None, message)
    assert world.outputs[1] == continued((1, 2), 5)


def test_a_lane_whose_constraint_is_being_compiled_can_be_aborted() -> None:
    may_compile = threading.Event()

    def compile_late(grammar: str) -> OutputMatcher:
        assert may_compile.wait(PATIENCE_S)
        return compile_grammar(grammar)

    world = World(compile_grammar=compile_late)
    for lane in range(2):
        world.batch.submit(lane, constrained("4"))
    for lane in range(2):
        world.batch.abort(lane)
    world.report()

    assert world.batch.is_idle
    assert {ended.reason for ended in world.ended.values()} == {EndReason.ABORTED}
    may_compile.set()


def test_without_a_compiler_constraints_fail(world: World) -> None:
    world.batch.submit(0, constrained("4"))

    world.run()

    assert world.ended[0].reason is EndReason.FAILED


def test_a_biased_token_comes_and_its_neighbours_keep_theirs(world: World) -> None:
    sampling = replace(GREEDY, logit_bias=((33, 200.0),))
    world.batch.submit(0, ask((1, 2), 4))
    world.batch.submit(1, ask((1, 3), 4, sampling=sampling))
    world.batch.submit(2, ask((1, 4), 4))

    world.run()

    assert world.outputs[1] == [33] * 4
    assert world.outputs[0] == continued((1, 2), 4)
    assert world.outputs[2] == continued((1, 4), 4)


def test_a_bias_outside_the_vocabulary_fails_its_lane(world: World) -> None:
    world.batch.submit(0, ask((1,), 4, sampling=replace(GREEDY, logit_bias=((SIZE, 1.0),))))

    world.run()

    assert world.ended[0].message == "a token id is not in the vocabulary"


# Scores.


def test_only_rows_that_asked_have_scores_and_those_are_the_model_s_own(world: World) -> None:
    biased = replace(GREEDY, logit_bias=((33, 200.0),))
    world.batch.submit(0, ask((1, 2), 3))
    world.batch.submit(1, replace(ask((1, 3), 3, sampling=biased), top_logprobs=2))
    world.batch.submit(2, replace(ask((1, 4), 3), top_logprobs=0))

    world.run()

    for place in range(3):
        assert np.isnan(world.scores[0][place].logprobs)
        # The model would have taken another token, with a logit that is 100 higher.
        scores = world.scores[1][place]
        assert scores.logprobs == pytest.approx([-100], abs=1e-3)
        assert scores.top_token_ids[0] != 33
        assert scores.top_logprobs[0] == pytest.approx(0, abs=1e-3)
        assert world.scores[2][place].logprobs == pytest.approx([0], abs=1e-3)
        assert set(world.scores[2][place].top_token_ids) == {-1}


def test_a_token_that_is_not_told_has_no_scores(world: World) -> None:
    stop = continued((1, 2), 3)[1]
    world.batch.submit(0, replace(ask((1, 2), 3, stops=frozenset({stop})), top_logprobs=1))
    world.batch.submit(1, replace(ask((1, 5), 3), top_logprobs=1))

    world.run()

    assert len(world.scores[0]) == len(world.outputs[0]) == 1
    for lane in (0, 1):
        tops = [scores.top_token_ids[0] for scores in world.scores[lane]]
        assert tops == world.outputs[lane]


def test_a_step_that_tells_nothing_but_a_scored_end_can_be_read(world: World) -> None:
    first = next(token for token in range(END) if next_id([token]) == END)
    world.batch.submit(0, replace(ask((first,), 3, ignore_eos=False), top_logprobs=1))

    world.run()

    assert world.ended[0].reason is EndReason.END_OF_SEQUENCE
    assert world.outputs[0] == []


@pytest.mark.parametrize("company", [0, 2])
def test_a_prompt_is_scored_in_parts_from_its_first_token_on(world: World, company: int) -> None:
    for lane in range(company):
        world.batch.submit(lane, ask((9, lane, *PROMPT), 9))
    request = replace(ask(PROMPT, 3), prompt_logprobs=True, top_logprobs=1)
    world.batch.submit(7, request)

    world.run()

    parts = [part for part in world.prompt_scores if part.lane == 7]
    offsets = [part.offset for part in parts]
    counts = [len(part.scores.logprobs) for part in parts]
    assert offsets == [sum(counts[:place]) for place in range(len(parts))]
    assert sum(counts) == len(PROMPT)
    assert len(parts) > 2
    assert np.isnan(parts[0].scores.logprobs[0])
    for part in parts[1:]:
        for place, top in enumerate(part.scores.top_token_ids, part.offset):
            follower = continued(PROMPT[:place], 1)[0]
            assert top == follower
            is_likely = part.scores.logprobs[place - part.offset] > -1
            assert is_likely is (PROMPT[place] == follower)
    assert world.outputs[7] == continued(PROMPT, 3)


def test_the_prompt_of_one_token_has_no_probability(world: World) -> None:
    world.batch.submit(0, replace(ask((5,), 3), prompt_logprobs=True))

    world.run()

    (part,) = world.prompt_scores
    assert part.offset == 0
    assert np.isnan(part.scores.logprobs).tolist() == [True]


def test_a_failed_step_is_scored_apart(world: World) -> None:
    world.batch.submit(0, ask((1, 2), 9))
    world.step()
    world.batch.submit(1, replace(ask(PROMPT, 3), prompt_logprobs=True))
    world.decoder.fails_on = {0}
    world.step()
    world.decoder.fails_on = set()

    world.run()

    assert world.ended[0].reason is EndReason.FAILED
    places = [
        place
        for part in world.prompt_scores
        for place in range(part.offset, part.offset + len(part.scores.logprobs))
    ]
    assert places == list(range(len(PROMPT)))
    assert world.outputs[1] == continued(PROMPT, 3)
