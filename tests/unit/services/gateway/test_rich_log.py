"""What was released of rich output is replayed as it was sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from maas.inference.v1 import generation_pb2, scores_pb2

from services.gateway import rich_encoding as encoding
from services.gateway.generation import FRAME_BYTES_MAX
from services.gateway.replay import UNBOUNDED, Budget
from services.gateway.rich_log import RichLog


def text(word: str) -> bytes:
    return encoding.deltas(0, encoding.contents(word, None, with_reasoning=True), (), None)[0]


def filled(words: list[str], bytes_max: int = UNBOUNDED) -> RichLog:
    log = RichLog(Budget(UNBOUNDED), bytes_max)
    for number, word in enumerate(words, 1):
        log.append(text(word), number, is_prompt=False)
    return log


def read(log: RichLog, first: int) -> str:
    merged = log.read(first)
    assert merged is not None
    outputs = generation_pb2.Delta.FromString(merged.data).outputs
    return "".join(output.text for output in outputs)


@given(words=st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=20), data=st.data())
def test_a_replay_from_any_number_is_the_rest(words: list[str], data: st.DataObject) -> None:
    log = filled(words)
    first = data.draw(st.integers(0, len(words) - 1))

    merged = log.read(first)

    assert merged is not None
    assert read(log, first) == "".join(words[first:])
    assert (merged.first, merged.last) == (first, len(words) - 1)
    assert merged.tokens_after == len(words)


def test_scores_of_the_prompt_are_never_merged() -> None:
    log = RichLog(Budget(UNBOUNDED), UNBOUNDED)
    scores = scores_pb2.PromptScores(offset=0).SerializeToString()
    log.append(scores, 0, is_prompt=True)
    log.append(scores, 0, is_prompt=True)
    log.append(text("a"), 1, is_prompt=False)

    kinds = []
    number = 0
    while number < log.count:
        merged = log.read(number)
        assert merged is not None
        kinds.append((merged.first, merged.last, merged.is_prompt))
        number = merged.last + 1

    assert kinds == [(0, 0, True), (1, 1, True), (2, 2, False)]
    assert len(list(log.prompt_scores())) == 2
    assert [delta.text for delta in log.deltas()] == ["a"]


def test_a_replayed_frame_fits() -> None:
    log = filled(["x" * 20_000] * 40)

    merged = log.read(0)

    assert merged is not None
    assert 100_000 < len(merged.data) <= FRAME_BYTES_MAX
    assert read(log, merged.last + 1)


def test_above_its_bound_the_older_half_goes() -> None:
    budget = Budget(UNBOUNDED)
    log = RichLog(budget, 4000)
    for number in range(100):
        log.append(text("x" * 30), number + 1, is_prompt=False)

    assert budget.used <= 4000
    assert log.read(0) is None
    assert read(log, 99) == "x" * 30
    assert log.count == 100
    with pytest.raises(ValueError, match="outgrown"):
        list(log.deltas())


def test_what_is_cleared_is_given_back() -> None:
    budget = Budget(UNBOUNDED)
    log = RichLog(budget, UNBOUNDED)
    log.append(text("a"), 1, is_prompt=False)
    assert (budget.used > 0, log.payload) == (True, len(text("a")))

    log.clear()

    assert (budget.used, log.payload, log.count) == (0, 0, 1)
