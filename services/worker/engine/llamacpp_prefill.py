"""Which parts of which prompts the llamacpp engine computes next, and what they are scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import Lane
from services.worker.engine.llamacpp_company import Occupant
from services.worker.engine.llamacpp_decoder import SCORED_ROWS_MAX, Floats
from services.worker.engine.llamacpp_scores import RawRows, first_of_prompt
from services.worker.engine.llamacpp_slots import Slot
from services.worker.engine.score_blocks import ScoreBlock


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a prompt: ids[start:stop] of a slot's occupant.

    Attributes:
        slot: where it goes.
        occupant: whose it is.
        start: first token.
        stop: behind the last one.
        scored: how many of them, from the first on, have the logits of their successors wanted.
    """

    slot: Slot
    occupant: Occupant
    start: int
    stop: int
    scored: int


def plan_prefill(
    slots: Iterable[Slot],
    occupants: Mapping[Slot, Occupant],
    positions: npt.NDArray[np.int32],
    tokens: int,
) -> Iterator[Chunk]:
    """Cuts the chunks of one step.

    Args:
        slots: that are being prefilled, oldest first.
        occupants: of the slots.
        positions: tokens in the KV cache, by slot.
        tokens: most of them in the step.
    """
    left, scored_left = tokens, SCORED_ROWS_MAX
    for slot in slots:
        occupant = occupants[slot]
        start = int(positions[slot])
        stop = min(len(occupant.ids), start + left)
        scored = 0
        if occupant.request.prompt_logprobs:
            # The logits of a position are about the token behind it.
            last = len(occupant.request.prompt_ids) - 1
            if start < last:
                stop = min(stop, start + scored_left)
            scored = max(min(stop, last) - start, 0)
        if start == stop:
            # Only the scored ones can be out of room here; others may still have some.
            continue
        yield Chunk(slot, occupant, start, stop, scored)
        left -= stop - start
        scored_left -= scored
        if not left:
            return


def score_prompts(logits: Floats, chunks: Sequence[Chunk]) -> list[tuple[Lane, int, ScoreBlock]]:
    """Scores the tokens of prompts whose logits were wanted.

    Args:
        logits: of the scored positions, by slot and then by position. Not changed.
        chunks: of the step.

    Returns:
        lane, place in its prompt of the first row, and the rows, of each part; parts of a lane in
        order.
    """
    parts = []
    start = 0
    for chunk in sorted(chunks, key=lambda chunk: chunk.slot):
        occupant = chunk.occupant
        if occupant.request.prompt_logprobs and chunk.start == 0:
            parts.append((occupant.lane, 0, first_of_prompt()))
        if chunk.scored:
            first = chunk.start + 1
            tops = [occupant.request.top_logprobs or 0] * chunk.scored
            token_ids = occupant.ids[first : first + chunk.scored].astype(np.int64)
            raw = RawRows(logits[start : start + chunk.scored], tops)
            parts.append((occupant.lane, first, raw.score(np.arange(chunk.scored), token_ids)))
            start += chunk.scored
    return parts
