"""Log-probabilities in the shapes that versions of TensorRT-LLM have given them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from services.worker.engine.score_blocks import to_scores
from services.worker.engine.trtllm_scores import ScoreColumns, read_entry


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int | None = None


ENTRY = {5: Logprob(-2.0, 3), 8: Logprob(-0.5, 1), 9: Logprob(-1.0, 2)}


def test_a_dict_has_the_token_and_the_likeliest_first() -> None:
    assert read_entry(ENTRY, 5, 2) == (-2.0, [(8, -0.5), (9, -1.0)])


def test_without_alternatives_there_is_the_token_only() -> None:
    assert read_entry(ENTRY, 9, 0) == (-1.0, [])


def test_a_plain_number_is_the_token_itself() -> None:
    assert read_entry(-0.25, 5, 3) == (-0.25, [])
    assert read_entry({5: -0.25}, 5, 1) == (-0.25, [(5, -0.25)])


@pytest.mark.parametrize("entry", [None, {}, {8: Logprob(-0.5)}, "text"])
def test_what_is_not_told_is_not_a_number(entry: object) -> None:
    logprob, _ = read_entry(entry, 5, 1)

    assert math.isnan(logprob)


def test_a_block_has_its_rows_and_pads_those_that_want_less() -> None:
    columns = ScoreColumns()

    columns.add(0, [5, 8], [ENTRY, ENTRY, ENTRY], 2)
    columns.add(2, [9], [ENTRY], 1)
    columns.add(3, [9], [], 1)

    block = columns.block()
    scores = to_scores(block)
    assert block.rows.tolist() == [0, 1, 2, 3]
    assert scores.logprobs[:3] == pytest.approx([-2.0, -0.5, -1.0])
    assert math.isnan(scores.logprobs[3])
    assert scores.top_count == 2
    assert scores.top_token_ids == [8, 9, 8, 9, 8, -1, -1, -1]
