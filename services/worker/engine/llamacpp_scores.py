"""Log-probabilities of the model itself, from rows of logits.

They are taken from the logits as the model gave them.

Pure: no sockets, no ctypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.worker.engine.llamacpp_sampling import heaviest
from services.worker.engine.score_blocks import NO_ALTERNATIVE, Floats, ScoreBlock

Ids = npt.NDArray[np.int64]


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
            ids = np.where(is_surplus, NO_ALTERNATIVE, np.take_along_axis(ids, order, axis=1))
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
