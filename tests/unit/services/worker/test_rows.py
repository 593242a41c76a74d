"""services/worker/rows.py: rows that are more than text, joined and numbered right."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import scores_pb2

from services.worker import rows as module
from services.worker.rows import RichRows, Row

LANES = 3


@dataclass
class Seen:
    """What one lane was told."""

    token_ids: list[int] = field(default_factory=list)
    shown: str = ""
    reasoning_tokens: int = 0
    logprobs: list[float] = field(default_factory=list)


def make_row(kind: str, number: int, tokens: int, *, has_scores: bool) -> Row:
    token_ids = [number * 10 + place for place in range(tokens)]
    scores = None
    if has_scores:
        logprobs = [float(token_id) for token_id in token_ids]
        scores = scores_pb2.TokenScores(token_ids=token_ids, logprobs=logprobs)
    match kind:
        case "text":
            return Row(token_ids, f"t{number};", scores=scores)
        case "nothing":
            return Row(token_ids, scores=scores)
        case _:
            segment = engine_pb2.Segment(reasoning=f"r{number};")
            return Row(token_ids, segments=[segment], reasoning_tokens=tokens, scores=scores)


def read(events: engine_pb2.StepEvents, seen: dict[int, Seen]) -> None:
    counts = list(events.token_counts) or [1] * len(events.lanes)
    assert len(set(events.lanes)) == len(events.lanes)
    segments = {found.row: found for found in events.segments}
    scores = {found.row: found.scores for found in events.scores}
    place = 0
    for row, lane in enumerate(events.lanes):
        lane_seen = seen.setdefault(lane, Seen())
        token_ids = list(events.token_ids[place : place + counts[row]])
        place += counts[row]
        lane_seen.token_ids += token_ids
        if row in segments:
            assert events.texts[row] == ""
            parts = segments[row].segments
            lane_seen.shown += "".join(part.text + part.reasoning for part in parts)
            lane_seen.reasoning_tokens += segments[row].reasoning_tokens
        else:
            lane_seen.shown += events.texts[row]
        if row in scores:
            assert list(scores[row].token_ids) == token_ids
            lane_seen.logprobs += scores[row].logprobs
    assert place == len(events.token_ids)


added = st.lists(
    st.tuples(
        st.integers(1, LANES),
        st.sampled_from(["text", "nothing", "reasoning"]),
        st.integers(1, 3),
    ),
    max_size=12,
)


@given(added=added, plain=st.integers(0, 2), weight=st.sampled_from([1, 4, 65_536]))
def test_every_lane_is_told_all_of_its_rows_in_order(
    added: list[tuple[int, str, int]], plain: int, weight: int
) -> None:
    """With scores for one lane, plain rows before them, and messages of any size."""
    before = module.WEIGHT_MAX
    module.WEIGHT_MAX = weight
    try:
        rich = RichRows()
        want: dict[int, Seen] = {}
        for number, (lane, kind, tokens) in enumerate(added):
            row = make_row(kind, number, tokens, has_scores=lane == 1)
            told = want.setdefault(lane, Seen())
            told.token_ids += row.token_ids
            told.shown += row.text + "".join(part.reasoning for part in row.segments)
            told.reasoning_tokens += row.reasoning_tokens
            told.logprobs += row.scores.logprobs if row.scores is not None else []
            rich.add(lane, row)
        seen: dict[int, Seen] = {}
        for number in range(plain):
            want[100 + number] = Seen([number], "p")
        first = True
        while rich or first:
            events = engine_pb2.StepEvents()
            if first:
                events.lanes.extend(100 + number for number in range(plain))
                events.token_ids.extend(range(plain))
                events.texts.extend(["p"] * plain)
                first = False
            rich.take(events)
            read(events, seen)

        assert seen == want
        assert rich.tokens == 0
    finally:
        module.WEIGHT_MAX = before


def test_additions_of_a_lane_are_joined_up_to_a_bound() -> None:
    rich = RichRows()
    for number in range(module.ROW_TOKENS_MAX + 5):
        rich.add(1, Row([number], segments=[engine_pb2.Segment(reasoning="r")]))
    rich.add(2, Row(list(range(module.ROW_TOKENS_MAX + 1)), "whole"))
    first, second = engine_pb2.StepEvents(), engine_pb2.StepEvents()

    rich.take(first)
    assert rich.tokens == 5
    rich.take(second)

    assert list(first.lanes) == [1, 2]
    # One addition is never split.
    assert list(first.token_counts) == [module.ROW_TOKENS_MAX, module.ROW_TOKENS_MAX + 1]
    assert list(second.token_counts) == [5]
    assert not rich


def test_counts_are_left_out_while_every_row_has_one_token() -> None:
    rich = RichRows()
    rich.add(1, Row([5], "a"))
    rich.add(2, Row([6], "b"))
    events = engine_pb2.StepEvents()
    rich.take(events)
    assert not events.token_counts

    rich.add(1, Row([5], "a"))
    rich.add(1, Row([7], "c"))
    events = engine_pb2.StepEvents(lanes=[9], token_ids=[1], texts=["x"])
    rich.take(events)
    assert list(events.token_counts) == [1, 2]
    assert list(events.texts) == ["x", "ac"]


def test_prompts_come_before_rows_and_keep_them_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WEIGHT_MAX", 4)
    rich = RichRows()
    for offset in range(0, 9, 3):
        scores = scores_pb2.TokenScores(token_ids=[1, 2, 3])
        part = scores_pb2.PromptScores(offset=offset, scores=scores)
        rich.add_prompt(engine_pb2.LanePromptScores(lane=1, scores=part))
    rich.add(1, Row([5], "a"))

    first, second = engine_pb2.StepEvents(), engine_pb2.StepEvents()
    rich.take(first)
    assert [part.scores.offset for part in first.prompt_scores] == [0, 3]
    assert not first.lanes
    rich.take(second)

    assert [part.scores.offset for part in second.prompt_scores] == [6]
    assert list(second.lanes) == [1]
    assert not rich


def test_plain_tokens_of_a_lane_with_rows_follow_them() -> None:
    rich = RichRows()
    rich.add(2, Row([5], segments=[engine_pb2.Segment(reasoning="r")], reasoning_tokens=1))
    lanes, token_ids, texts = [1, 2, 1, 2], [10, 20, 11, 21], ["a", "b", "c", "d"]
    assert rich.holds(lanes)

    rich.follow(lanes, token_ids, texts)

    assert (lanes, token_ids, texts) == ([1, 1], [10, 11], ["a", "c"])
    events = engine_pb2.StepEvents()
    rich.take(events)
    assert list(events.token_ids) == [5, 20, 21]
    parts = events.segments[0].segments
    assert [part.WhichOneof("kind") for part in parts] == ["reasoning", "text", "text"]
