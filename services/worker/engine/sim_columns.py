"""The plain text of all executions that decode, step by step.

Tokens of the steps to come are drawn ahead while nobody comes or goes: a step then costs nothing
for each lane.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from services.worker.engine.base import Lane, TokenScores
from services.worker.engine.sim_model import PlainText, SimModel
from services.worker.engine.sim_output import SimOutput
from services.worker.engine.sim_run import Run

# Tokens drawn at once.
AHEAD_TOKENS_MAX = 4096


class Columns:
    """Who decodes, by column.

    Attributes:
        lanes: of the rows that were drawn last.
        scores: of the same rows; None when none of them asked for any.
    """

    def __init__(self, model: SimModel) -> None:
        self.lanes: list[Lane] = []
        self.scores: TokenScores | None = None
        self._model = model
        self._counts: list[int | None] = []
        self._model_bases: list[int] = []
        # As the rows below; empty when nobody asked.
        self._scores: list[TokenScores] = []
        self._bases: list[int] = []
        self._offsets: list[int] = []
        self._is_changed = False
        # Last step first.
        self._rows: list[list[int]] = []
        self._ahead = 1

    def change(self) -> None:
        """Somebody came or went."""
        self._is_changed = True

    def draw(self, output: SimOutput, runs: Collection[Run], step: int) -> list[int]:
        """Returns the token of each run in a step.

        Args:
            output: what they say.
            runs: the same as before, in the same order, unless `change` was called; at least one.
            step: one more than before.
        """
        if self._is_changed:
            # What was drawn ahead was for others.
            self._is_changed = False
            self.lanes = [run.lane for run in runs]
            self._bases = [run.base for run in runs]
            self._offsets = [run.position - run.first_step for run in runs]
            self._counts = [run.request.top_logprobs for run in runs]
            self._model_bases = [run.model_base for run in runs]
            self._rows = []
            self._ahead = 1
        if not self._rows:
            # More each time: the longer nobody came or went, the longer nobody will.
            positions = [offset + step for offset in self._offsets]
            self._rows = output.steps(self._bases, positions, self._ahead)
            self._score(positions)
            self._rows.reverse()
            self._ahead = min(2 * self._ahead, max(1, AHEAD_TOKENS_MAX // len(self.lanes)))
        self.scores = self._scores.pop() if self._scores else None
        return self._rows.pop()

    def _score(self, positions: list[int]) -> None:
        """Scores what was drawn ahead."""
        self._scores = []
        if any(count is not None for count in self._counts):
            steps = np.arange(len(self._rows), dtype=np.uint64)[:, np.newaxis]
            said = PlainText(
                bases=np.array(self._bases, np.uint64),
                model_bases=np.array(self._model_bases, np.uint64),
                positions=np.array(positions, np.uint64) + steps,
                tokens=np.array(self._rows, np.int64),
            )
            self._scores = self._model.columns(said, self._counts)
            self._scores.reverse()
