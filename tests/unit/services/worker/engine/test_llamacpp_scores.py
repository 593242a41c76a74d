"""Log-probabilities from logits to the columns of a batch, against a plain computation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.base import TokenScores
from services.worker.engine.llamacpp_scores import RawRows
from services.worker.engine.score_blocks import ScoreBlock, extend_scores, to_scores

SIZE = 50


def logits_of(rows: int, *, seed: int = 0) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(0, 3, (rows, SIZE)).astype(np.float32)


def block_of(tops: list[int], *, seed: int = 0, rows: list[int] | None = None) -> ScoreBlock:
    places = np.array(range(len(tops)) if rows is None else rows)
    return RawRows(logits_of(len(tops), seed=seed), tops).score(places, np.arange(len(tops)))


@given(tops=st.lists(st.integers(0, 20), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_scores_are_log_probabilities_of_the_chosen_and_of_the_likeliest(
    tops: list[int], seed: int
) -> None:
    logits = logits_of(len(tops), seed=seed).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    block = block_of(tops, seed=seed)

    assert block.top_count == max(tops)
    for row, top in enumerate(tops):
        assert block.logprobs[row] == pytest.approx(logprobs[row, row], abs=1e-5)
        likeliest = np.argsort(-logprobs[row])[:top]
        assert block.top_token_ids[row, :top].tolist() == likeliest.tolist()
        assert block.top_logprobs[row, :top] == pytest.approx(logprobs[row, likeliest], abs=1e-5)
        assert (block.top_token_ids[row, top:] == -1).all()
        assert np.isneginf(block.top_logprobs[row, top:]).all()


def test_among_equals_the_lower_id_comes_first() -> None:
    logits = np.zeros((1, SIZE), np.float32)
    logits[0, [7, 30]] = 2

    block = RawRows(logits, [4]).score(np.array([0]), np.array([7]))

    assert block.top_token_ids[0].tolist() == [7, 30, 0, 1]


def test_a_broken_row_does_not_disturb_its_neighbours() -> None:
    logits = logits_of(2)
    whole = RawRows(logits[1:].copy(), [3]).score(np.array([1]), np.array([4]))
    logits[0] = np.nan

    block = RawRows(logits, [3, 3]).score(np.array([0, 1]), np.array([4, 4]))

    assert block.logprobs[1] == whole.logprobs[0]
    assert block.top_token_ids[1].tolist() == whole.top_token_ids[0].tolist()


def test_no_scores_stay_none() -> None:
    assert extend_scores(None, 5, 3, []) is None


def test_rows_that_did_not_ask_are_padded_before_between_and_behind() -> None:
    block = block_of([1, 2], rows=[0, 2])

    scores = extend_scores(None, 2, 3, [block])
    scores = extend_scores(scores, 5, 1, [])

    assert scores is not None
    assert np.isnan(scores.logprobs).tolist() == [True, True, False, True, False, True]
    ids = np.array(scores.top_token_ids).reshape(6, 2)
    assert ids[[0, 1, 3, 5]].tolist() == [[-1, -1]] * 4
    assert ids[[2, 4]].tolist() == block.top_token_ids.tolist()
    tops = np.array(scores.top_logprobs, np.float32).reshape(6, 2)
    assert np.isneginf(tops[[0, 1, 3, 5]]).all()
    assert tops[[2, 4]].tolist() == block.top_logprobs.tolist()


def test_a_later_row_with_more_alternatives_widens_the_earlier_ones() -> None:
    narrow, wide = block_of([1]), block_of([3], seed=1)

    scores = extend_scores(extend_scores(None, 0, 1, [narrow]), 1, 1, [wide])

    assert scores == TokenScores(
        [*narrow.logprobs.tolist(), *wide.logprobs.tolist()],
        3,
        [*narrow.top_token_ids[0].tolist(), -1, -1, *wide.top_token_ids[0].tolist()],
        [
            *narrow.top_logprobs[0].tolist(),
            float("-inf"),
            float("-inf"),
            *wide.top_logprobs[0].tolist(),
        ],
    )


def test_a_block_of_all_rows_becomes_scores_as_it_is() -> None:
    block = block_of([2, 2])

    assert to_scores(block) == extend_scores(None, 0, 2, [block])
