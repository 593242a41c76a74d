"""Log-probabilities of the model itself, from rows of logits to the columns of a StepBatch.

They are taken from the logits as the model gave them. A block holds those rows of a step that
asked; expanding it to all rows is done by the parent, off the decoding process.

Pure: no sockets, no ctypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import TokenScores
from services.worker.engine.llamacpp_sampling import heaviest

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_NO_ALTERNATIVE: Final = -1


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


class RawRows:
    """Rows of logits whose tokens are not known yet, and the sum that they are measured by.

    Args:
        logits: float32, shape (n, vocabulary). Not changed and not kept by anyone else.
        tops: alternatives that each row asks for.
    """

    def __init__(self, logits: Floats, tops: Sequence[int]) -> None:
        self._logits = logits
        self._tops = np.array(tops, np.int64)
        largest = logits.max(axis=1, keepdims=True)
        is_sound = np.isfinite(largest)
        if not is_sound.all():
            # Such a lane fails; its row must not disturb the arithmetic of the others.
            self._logits = logits = np.where(is_sound, logits, np.float32(0))
            largest = np.where(is_sound, largest, np.float32(0))
        sums = np.exp(logits - largest).sum(axis=1, keepdims=True, dtype=np.float64)
        self._totals = largest + np.log(sums).astype(np.float32)

    def score(self, rows: npt.NDArray[np.intp], token_ids: Ids) -> ScoreBlock:
        """Makes the block.

        Args:
            rows: intp, shape (n,): rows of the step.
            token_ids: int64, shape (n,): the token of each row.
        """
        logprobs = np.take_along_axis(self._logits, token_ids[:, None], axis=1) - self._totals
        count = min(int(self._tops.max(initial=0)), self._logits.shape[1])
        ids = np.zeros((len(rows), 0), np.int64)
        tops = np.zeros((len(rows), 0), np.float32)
        if count:
            ids = heaviest(self._logits, count)
            values = np.take_along_axis(self._logits, ids, axis=1)
            # Stable, so that among equals the lower id comes first.
            order = np.argsort(-values, axis=1, kind="stable")
            is_surplus = np.arange(count) >= self._tops[:, None]
            ids = np.where(is_surplus, _NO_ALTERNATIVE, np.take_along_axis(ids, order, axis=1))
            ranked = np.take_along_axis(values, order, axis=1) - self._totals
            tops = np.where(is_surplus, np.float32(-np.inf), ranked)
        return ScoreBlock(
            rows.astype(np.int32), logprobs[:, 0], ids.astype(np.int32), tops.astype(np.float32)
        )


def first_of_prompt() -> ScoreBlock:
    """The first token of a prompt: nothing comes before it, so it has no probability."""
    return ScoreBlock(
        np.zeros(1, np.int32),
        np.full(1, np.nan, np.float32),
        np.zeros((1, 0), np.int32),
        np.zeros((1, 0), np.float32),
    )


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
    ids = np.full((rows, width), _NO_ALTERNATIVE, np.int32)
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
    scores.top_token_ids = np.pad(ids, padding, constant_values=_NO_ALTERNATIVE).ravel().tolist()
    scores.top_logprobs = np.pad(tops, padding, constant_values=-np.inf).ravel().tolist()
    scores.top_count = width
