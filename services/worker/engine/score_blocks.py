"""Log-probabilities on their way from an engine's child to the columns of a StepBatch.

A block holds those rows of a step that asked; expanding it to all rows is done by the parent, off
the process that computes.

Pure: no sockets, no ctypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import TokenScores

Floats = npt.NDArray[np.float32]

NO_ALTERNATIVE: Final = -1
"""Pads the ids of alternatives."""


@dataclass(frozen=True, slots=True)
class ScoreBlock:
    """Scores of some rows.

    Attributes:
        rows: int32, shape (n,): which rows of the step these are.
        logprobs: float32, shape (n,): of each row's token.
        top_token_ids: int32, shape (n, K): likeliest first; -1 pads.
        top_logprobs: float32, shape (n, K); -inf pads.
    """

    rows: npt.NDArray[np.int32]
    logprobs: Floats
    top_token_ids: npt.NDArray[np.int32]
    top_logprobs: Floats

    @property
    def top_count(self) -> int:
        """Alternatives of each row, K."""
        return int(self.top_token_ids.shape[1])


def to_scores(block: ScoreBlock) -> TokenScores:
    """The same, when the block holds all rows there are."""
    return TokenScores(
        block.logprobs.tolist(),
        block.top_count,
        block.top_token_ids.ravel().tolist(),
        block.top_logprobs.ravel().tolist(),
    )


def extend_scores(
    scores: TokenScores | None, rows_before: int, rows: int, blocks: Sequence[ScoreBlock]
) -> TokenScores | None:
    """Adds the rows of one step to the scores of a batch.

    Args:
        scores: of the rows before; None when none of them asked.
        rows_before: how many these are.
        rows: of the step.
        blocks: scores of some of these.

    Returns:
        scores of all rows; None when still none asked.
    """
    if scores is None and not blocks:
        return None
    if scores is None:
        scores = TokenScores([float("nan")] * rows_before)
    _widen(scores, max([scores.top_count, *(block.top_count for block in blocks)]))
    width = scores.top_count
    logprobs = np.full(rows, np.nan, np.float32)
    ids = np.full((rows, width), NO_ALTERNATIVE, np.int32)
    tops = np.full((rows, width), -np.inf, np.float32)
    for block in blocks:
        logprobs[block.rows] = block.logprobs
        ids[block.rows, : block.top_count] = block.top_token_ids
        tops[block.rows, : block.top_count] = block.top_logprobs
    scores.logprobs += logprobs.tolist()
    scores.top_token_ids += ids.ravel().tolist()
    scores.top_logprobs += tops.ravel().tolist()
    return scores


def _widen(scores: TokenScores, width: int) -> None:
    """Gives every row more alternatives; the new ones are empty."""
    missing = width - scores.top_count
    if not missing:
        return
    rows = len(scores.logprobs)
    ids = np.array(scores.top_token_ids, np.int32).reshape(rows, scores.top_count)
    tops = np.array(scores.top_logprobs, np.float32).reshape(rows, scores.top_count)
    padding = ((0, 0), (0, missing))
    scores.top_token_ids = np.pad(ids, padding, constant_values=NO_ALTERNATIVE).ravel().tolist()
    scores.top_logprobs = np.pad(tops, padding, constant_values=-np.inf).ravel().tolist()
    scores.top_count = width
