"""Log-probabilities as TensorRT-LLM tells them, as a block of rows. Pure.

It tells one entry for each token: a dict from token ids to objects with `logprob`, or a plain
number, by version; the list may be empty, or longer than the tokens for a moment. The dict has the
likeliest tokens and, in most versions, the token itself besides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from services.worker.engine.score_blocks import NO_ALTERNATIVE, ScoreBlock

Alternatives = list[tuple[int, float]]

_UNKNOWN: Final = math.nan


def read_entry(entry: object, token_id: int, count: int) -> tuple[float, Alternatives]:
    """Reads one entry.

    Args:
        entry: of the token.
        token_id: that was drawn.
        count: of alternatives that are wanted.

    Returns:
        log-probability of the token, NaN when it is not told; alternatives, likeliest first.
    """
    if not isinstance(entry, Mapping):
        return _number(entry), []
    values = {int(other): _number(value) for other, value in entry.items()}
    if not count:
        return values.get(token_id, _UNKNOWN), []
    known = [(other, value) for other, value in values.items() if not math.isnan(value)]
    known.sort(key=lambda pair: (-pair[1], pair[0]))
    return values.get(token_id, _UNKNOWN), known[:count]


def _number(value: object) -> float:
    found = getattr(value, "logprob", value)
    return float(found) if isinstance(found, int | float) else _UNKNOWN


@dataclass(slots=True)
class ScoreColumns:
    """Scores of some rows of a step, until they become a block.

    Attributes:
        rows: which.
        logprobs: of their tokens.
        tops: alternatives of each, likeliest first.
    """

    rows: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[Alternatives] = field(default_factory=list)

    def add(
        self, first_row: int, token_ids: Sequence[int], entries: Sequence[object], count: int
    ) -> None:
        """Adds tokens of one lane.

        Args:
            first_row: of the step, where the first of them stands.
            token_ids: of them.
            entries: as the engine tells them, the first of the first token; there may be too few.
            count: of alternatives that the lane wants.
        """
        for place, token_id in enumerate(token_ids):
            entry = entries[place] if place < len(entries) else None
            logprob, top = read_entry(entry, token_id, count)
            self.rows.append(first_row + place)
            self.logprobs.append(logprob)
            self.tops.append(top)

    def block(self) -> ScoreBlock:
        """The block of all rows."""
        count = len(self.rows)
        width = max(map(len, self.tops), default=0)
        ids = np.full((count, width), NO_ALTERNATIVE, np.int32)
        values = np.full((count, width), -np.inf, np.float32)
        for row, top in enumerate(self.tops):
            for column, (token_id, logprob) in enumerate(top):
                ids[row, column] = token_id
                values[row, column] = logprob
        return ScoreBlock(
            np.array(self.rows, np.int32), np.array(self.logprobs, np.float32), ids, values
        )
