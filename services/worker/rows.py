"""Pending rows that are more than text: segments, log-probabilities, and those of prompts.

A lane is in here or in the plain columns of its outbox. What only few executions ask for so costs
the others nothing. Each addition is kept as the messages that it will be sent as: they are many
times smaller than lists, and two rows of a lane are merged by joining their columns.

A message takes whole additions, oldest lane first, until `WEIGHT_MAX` is reached; the rest waits
for the next message. So a message is bounded, however much has piled up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import scores_pb2

# Numbers in the columns of one message: tokens, and alternatives of tokens. An addition may be the
# last that fits, and has at most 4096 tokens with 20 alternatives each: some 3 MiB in all.
WEIGHT_MAX = 65_536
# Tokens of one row, where it is made of several additions: what a gateway hands on at once of what
# has piled up while something stood still.
ROW_TOKENS_MAX = 32


@dataclass(slots=True)
class Row:
    """What one execution shows at once. Also several of them, joined.

    Attributes:
        token_ids: at least one.
        text: that they complete; empty where there are segments.
        segments: what they show, where it is not only text of the answer.
        reasoning_tokens: of the tokens.
        scores: of all the tokens; None when nobody asked.
    """

    token_ids: list[int]
    text: str = ""
    segments: Sequence[engine_pb2.Segment] = ()
    reasoning_tokens: int = 0
    scores: scores_pb2.TokenScores | None = None

    @property
    def weight(self) -> int:
        """Numbers in its columns."""
        if self.scores is None:
            return len(self.token_ids)
        return len(self.token_ids) * (1 + self.scores.top_count)

    @property
    def is_plain_text(self) -> bool:
        """Whether it shows text of the answer, and nothing else."""
        return not self.segments and not self.reasoning_tokens


class RichRows:
    """The rows of one stream. Belongs to its outbox."""

    __slots__ = ("_prompts", "_rows", "tokens")

    def __init__(self) -> None:
        self._rows: dict[int, list[Row]] = {}
        self._prompts: deque[engine_pb2.LanePromptScores] = deque()
        self.tokens = 0
        """Tokens that wait."""

    def __bool__(self) -> bool:
        return bool(self._rows or self._prompts)

    def add(self, lane: int, row: Row) -> None:
        """Adds what a lane shows next."""
        waiting = self._rows.get(lane)
        if waiting is None:
            self._rows[lane] = [row]
        else:
            waiting.append(row)
        self.tokens += len(row.token_ids)

    def add_prompt(self, part: engine_pb2.LanePromptScores) -> None:
        """Adds a part of a prompt's log-probabilities, before the lane's first row."""
        self._prompts.append(part)

    def holds(self, lanes: Iterable[int]) -> bool:
        """Tells whether one of these lanes has rows here."""
        return not self._rows.keys().isdisjoint(lanes)

    def follow(self, lanes: list[int], token_ids: list[int], texts: list[str]) -> None:
        """Takes over the plain tokens of the lanes that have rows here: a lane has one row.

        Args:
            lanes: columns of the outbox; what is taken over is removed.
            token_ids: likewise.
            texts: likewise.
        """
        kept = [
            (lane, token_id, text)
            for lane, token_id, text in zip(lanes, token_ids, texts, strict=True)
            if not self._follows(lane, token_id, text)
        ]
        lanes[:] = [lane for lane, _, _ in kept]
        token_ids[:] = [token_id for _, token_id, _ in kept]
        texts[:] = [text for _, _, text in kept]

    def take(self, events: engine_pb2.StepEvents) -> None:
        """Moves what fits into a message, behind its plain rows."""
        weight = 0
        while self._prompts and weight < WEIGHT_MAX:
            part = self._prompts.popleft()
            scores = part.scores.scores
            weight += len(scores.token_ids) * (1 + scores.top_count)
            events.prompt_scores.append(part)
        if self._prompts:
            return
        taken: list[tuple[int, Row]] = []
        for lane, waiting in self._rows.items():
            fitting = tokens = 0
            while weight < WEIGHT_MAX and fitting < len(waiting):
                count = len(waiting[fitting].token_ids)
                if fitting and tokens + count > ROW_TOKENS_MAX:
                    break
                weight += waiting[fitting].weight
                tokens += count
                fitting += 1
            if not fitting:
                break
            taken.append((lane, _joined(waiting[:fitting])))
            del waiting[:fitting]
            self.tokens -= tokens
        self._rows = {lane: waiting for lane, waiting in self._rows.items() if waiting}
        _write(events, taken)

    def _follows(self, lane: int, token_id: int, text: str) -> bool:
        waiting = self._rows.get(lane)
        if waiting is None:
            return False
        waiting.append(Row([token_id], text))
        self.tokens += 1
        return True


def _joined(rows: list[Row]) -> Row:
    """Makes one row of consecutive rows of one lane."""
    if len(rows) == 1:
        return rows[0]
    whole = Row([], reasoning_tokens=sum(row.reasoning_tokens for row in rows))
    for row in rows:
        whole.token_ids += row.token_ids
    if not all(row.is_plain_text for row in rows):
        whole.segments = [segment for row in rows for segment in _segments(row)]
    else:
        whole.text = "".join(row.text for row in rows)
    scores = [row.scores for row in rows if row.scores is not None]
    if scores:
        whole.scores = scores_pb2.TokenScores()
        for part in scores:
            whole.scores.MergeFrom(part)
    return whole


def _segments(row: Row) -> Sequence[engine_pb2.Segment]:
    """Returns what a row shows, as segments."""
    return [engine_pb2.Segment(text=row.text)] if row.text else row.segments


def _write(events: engine_pb2.StepEvents, rows: list[tuple[int, Row]]) -> None:
    """Puts rows behind those that a message has already."""
    if not rows:
        return
    if not events.token_counts and any(len(row.token_ids) != 1 for _, row in rows):
        events.token_counts.extend([1] * len(events.lanes))
        has_counts = True
    else:
        has_counts = bool(events.token_counts)
    for number, (lane, row) in enumerate(rows, start=len(events.lanes)):
        events.lanes.append(lane)
        events.token_ids.extend(row.token_ids)
        if has_counts:
            events.token_counts.append(len(row.token_ids))
        events.texts.append(row.text)
        if not row.is_plain_text:
            events.segments.add(
                row=number, segments=row.segments, reasoning_tokens=row.reasoning_tokens
            )
        if row.scores is not None:
            # Half of what add() costs with keywords.
            found = events.scores.add()
            found.row = number
            found.scores.MergeFrom(row.scores)
