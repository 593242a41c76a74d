"""A batch of the llamacpp engine over a decoder that checks what it is asked."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import (
    Ended,
    EngineRequest,
    PromptScores,
    Sampling,
    StepBatch,
    TokenScores,
)
from services.worker.engine.llamacpp_adapters import AdapterShelf
from services.worker.engine.llamacpp_decoder import SCORED_ROWS_MAX, DecodeFailedError
from services.worker.engine.llamacpp_inflight import InflightBatch
from services.worker.engine.llamacpp_queue import Compile
from services.worker.engine.wire import Counters, FrameReader, pack_step, unpack_step

SIZE = 61
END = 60
CAPACITY = 4
CONTEXT = 40
PREFILL = 8
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, seed=0)


def next_id(history: list[int]) -> int:
    """What the fake model says after some tokens; seldom its end token."""
    return (sum((place + 1) * token for place, token in enumerate(history)) * 7 + 3) % SIZE


def continued(prompt: tuple[int, ...], count: int, *, adapter: int = 0) -> list[int]:
    """The output of one lane that nothing ends; all of it computed with one adapter."""
    history = list(prompt)
    for _ in range(count):
        history.append((next_id(history) + adapter * len(history)) % SIZE)
    return history[len(prompt) :]


class FakeDecoder:
    """Remembers what is in its KV cache and gives all weight to next_id of it.

    Attributes:
        histories: tokens of each slot.
        steps: slots of each call's rows.
        fails_on: slots whose rows make a call fail, halfway.
        is_partial: whether part of a slot can be forgotten.
        is_broken_for: slots that get no finite logits.
        adapter: applied at the moment.
        adapters: that were applied when each token of a slot was computed.
        copies: (source, target) of each copy.
    """

    def __init__(self, *, is_partial: bool = True) -> None:
        rows = CAPACITY + PREFILL
        self.tokens = np.full(rows, -7, np.int32)
        self.positions = np.full(rows, -7, np.int32)
        self.slots = np.full(rows, -7, np.int32)
        self.wanted = np.full(rows, -7, np.int8)
        self.is_end = np.arange(SIZE) == END
        self.histories: dict[int, list[int]] = defaultdict(list)
        self.steps: list[list[int]] = []
        self.fails_on: set[int] = set()
        self.is_broken_for: set[int] = set()
        self.is_partial = self.keeps_prefixes = is_partial
        self.adapter: int | None = None
        self.adapters: dict[int, list[int | None]] = defaultdict(list)
        self.copies: list[tuple[int, int]] = []

    def decode(self, rows: int) -> npt.NDArray[np.float32]:
        slots = self.slots[:rows].tolist()
        assert 1 <= rows <= CAPACITY + PREFILL
        assert slots == sorted(slots)
        assert set(slots) <= set(range(CAPACITY))
        self.steps.append(slots)
        logits = []
        for row, slot in enumerate(slots):
            if slot in self.fails_on:
                raise DecodeFailedError("no room")
            assert self.positions[row] == len(self.histories[slot])
            self.histories[slot].append(int(self.tokens[row]))
            self.adapters[slot].append(self.adapter)
            if self.wanted[row]:
                logits.append(self.logits_of(slot))
        assert len(logits) <= CAPACITY + SCORED_ROWS_MAX
        return np.array(logits, np.float32).reshape(-1, SIZE)

    def logits_of(self, slot: int) -> npt.NDArray[np.float32]:
        if slot in self.is_broken_for:
            return np.full(SIZE, np.nan, np.float32)
        logits = np.full(SIZE, -50, np.float32)
        # A token computed with another adapter changes all that follows.
        shift = sum(adapter or 0 for adapter in self.adapters[slot])
        logits[(next_id(self.histories[slot]) + shift) % SIZE] = 50
        return logits

    def forget(self, slot: int, start: int) -> bool:
        if start and not self.is_partial:
            return False
        del self.histories[slot][start:]
        del self.adapters[slot][start:]
        return True

    def copy(self, source: int, target: int) -> None:
        assert not self.histories[target]
        self.copies.append((source, target))
        self.histories[target] = list(self.histories[source])
        self.adapters[target] = list(self.adapters[source])

    def use_adapter(self, handle: int | None) -> None:
        self.adapter = handle


def row_of(scores: TokenScores | None, row: int) -> TokenScores:
    """One row of some scores."""
    assert scores is not None
    part = slice(row * scores.top_count, (row + 1) * scores.top_count)
    return TokenScores(
        [scores.logprobs[row]],
        scores.top_count,
        scores.top_token_ids[part],
        scores.top_logprobs[part],
    )


@dataclass
class World:
    """A batch over the fake decoder, and all it reported."""

    decoder: FakeDecoder = field(default_factory=FakeDecoder)
    outputs: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    ended: dict[int, Ended] = field(default_factory=dict)
    prefilled: list[int] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    cached: dict[int, int] = field(default_factory=dict)
    scores: dict[int, list[TokenScores]] = field(default_factory=lambda: defaultdict(list))
    prompt_scores: list[PromptScores] = field(default_factory=list)
    shelf: AdapterShelf | None = None
    compile_grammar: Compile | None = None

    def __post_init__(self) -> None:
        self.batch = InflightBatch(
            self.decoder,
            capacity=CAPACITY,
            context_length=CONTEXT,
            prefill_tokens=PREFILL,
            shelf=self.shelf,
            compile_grammar=self.compile_grammar,
        )

    def step(self) -> None:
        self.batch.step()
        self.report()

    def report(self) -> None:
        ((_, body),) = FrameReader().feed(pack_step(*self.batch.take_report()))
        told = StepBatch()
        self.counters = unpack_step(body, told)
        self.prefilled += [event.lane for event in told.prefilled]
        self.cached |= {event.lane: event.cached_tokens for event in told.prefilled}
        self.prompt_scores += told.prompt_scores
        for row, lane in enumerate(told.lanes if told.scores else ()):
            self.scores[lane].append(row_of(told.scores, row))
        for lane, token_id in zip(told.lanes, told.token_ids, strict=True):
            assert lane in self.prefilled
            assert lane not in self.ended
            self.outputs[lane].append(token_id)
        for ended in told.ended:
            assert ended.lane not in self.ended
            self.ended[ended.lane] = ended

    def run(self) -> None:
        while not self.batch.is_idle:
            self.step()
        self.report()


def ask(
    prompt: tuple[int, ...],
    tokens: int,
    *,
    continues: tuple[int, ...] = (),
    stops: frozenset[int] = frozenset(),
    ignore_eos: bool = True,
    sampling: Sampling = GREEDY,
) -> EngineRequest:
    return EngineRequest(
        prompt_ids=prompt,
        continue_ids=continues,
        max_output_tokens=tokens,
        stop_token_ids=stops,
        ignore_eos=ignore_eos,
        sampling=sampling,
    )
