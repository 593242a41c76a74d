"""The rows of a step that are decoded together, and how tokens come out of their logits.

A company is made anew when a lane joins or leaves it, and used for every step in between, so what
its lanes ask for is sorted out once: rows that ask for nothing special cost nothing special.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import EndReason, EngineRequest, Lane
from services.worker.engine.llamacpp_logits import LogitRules
from services.worker.engine.llamacpp_sampling import NO_ID, Sampler
from services.worker.engine.llamacpp_scores import RawRows
from services.worker.engine.matcher import MatcherError
from services.worker.engine.score_blocks import ScoreBlock

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Slots = npt.NDArray[np.intp]

NO_FINITE_LOGITS = "the model gave no finite logits"


@dataclass(slots=True)
class Occupant:
    """What the columns do not hold of a lane in a slot.

    Attributes:
        lane: its name.
        request: what it asks for.
        ids: int32: of the prompt and what continues it.
        end_at_limit: why it ends when it has all the output it may have.
        rules: what changes its logits; None for nothing.
        cached_tokens: of the prompt, that the prefix cache had.
    """

    lane: Lane
    request: EngineRequest
    ids: npt.NDArray[np.int32]
    end_at_limit: EndReason
    rules: LogitRules | None
    cached_tokens: int = 0

    @property
    def adapter(self) -> str:
        """Digest of its adapter; empty for none."""
        return self.request.adapter.digest if self.request.adapter else ""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens of one step of a company.

    Attributes:
        ids: int64, shape (rows,); NO_ID for a row that failed.
        scores: of the rows that asked, rows counted in the company; None for none.
        faults: why rows failed, by row.
    """

    ids: Ids
    scores: ScoreBlock | None
    faults: dict[int, str]


class Company:
    """Rows that decode with one adapter.

    Args:
        slots: of the rows, ascending.
        occupants: of the slots, in their order.
        vocabulary_size: length of a row of logits.

    Attributes:
        slots: intp, shape (rows,).
        stops: rows with stop tokens, and these.
        has_rules: whether something changes the logits of a row.
    """

    def __init__(self, slots: Slots, occupants: Sequence[Occupant], vocabulary_size: int) -> None:
        requests = [occupant.request for occupant in occupants]
        self.slots = slots
        self._sampler = Sampler([request.sampling for request in requests], vocabulary_size)
        self.stops = [
            (row, request.stop_token_ids)
            for row, request in enumerate(requests)
            if request.stop_token_ids
        ]
        self._rules = [
            (row, occupant.rules)
            for row, occupant in enumerate(occupants)
            if occupant.rules is not None
        ]
        self.has_rules = bool(self._rules)
        asking = [
            (row, request.top_logprobs)
            for row, request in enumerate(requests)
            if request.top_logprobs is not None
        ]
        self._scored_rows = np.array([row for row, _ in asking], np.intp)
        self._tops = [top for _, top in asking]

    def draw(self, logits: Floats, outputs: Ids) -> Drawn:
        """Draws one token for each row.

        Args:
            logits: float32, shape (rows, vocabulary). Changed where rows have rules.
            outputs: int64, shape (rows,): output tokens of each row so far.
        """
        raw = RawRows(logits[self._scored_rows], self._tops) if self._tops else None
        faults: dict[int, str] = {}
        for row, rules in self._rules:
            try:
                rules.apply(logits[row], int(outputs[row]))
            except MatcherError as error:
                faults[row] = str(error)
                logits[row] = np.nan
        ids = self._sampler.draw(logits, outputs)
        scores = raw.score(self._scored_rows, ids[self._scored_rows]) if raw is not None else None
        return Drawn(ids, scores, faults)

    def take(self, ids: Ids, is_shown: Flags, faults: dict[int, str]) -> list[int]:
        """Tells the rules what was drawn.

        Args:
            ids: int64, shape (rows,).
            is_shown: shape (rows,): which of them are output.
            faults: why rows failed, by row; what goes wrong here is added.

        Returns:
            rows whose constraint lets nothing more follow.
        """
        over = []
        for row, rules in self._rules:
            if not is_shown[row]:
                continue
            try:
                rules.take(int(ids[row]))
            except MatcherError as error:
                faults[row] = str(error)
            else:
                if rules.is_over:
                    over.append(row)
        return over


def place_scores(block: ScoreBlock, is_shown: Flags, rows_before: int) -> ScoreBlock:
    """Counts the rows of a block as a report does, which leaves out those that are not shown.

    Args:
        block: rows counted in the company.
        is_shown: shape (rows of the company,).
        rows_before: of the report.
    """
    kept = is_shown[block.rows]
    places = np.cumsum(is_shown) - 1 + rows_before
    return ScoreBlock(
        places[block.rows[kept]].astype(np.int32),
        block.logprobs[kept],
        block.top_token_ids[kept],
        block.top_logprobs[kept],
    )


__all__ = ["NO_FINITE_LOGITS", "NO_ID", "Company", "Drawn", "Occupant", "place_scores"]
