"""Who has a slot and what a step computes, over a decoder that checks what it is asked."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from services.worker.engine.base import Ended, EndReason, EngineRequest, Sampling, StepBatch
from services.worker.engine.llamacpp_inflight import DecodeFailedError, InflightBatch
from services.worker.engine.llamacpp_wire import Counters, FrameReader, pack_step, unpack_step

SIZE = 61
END = 60
CAPACITY = 4
CONTEXT = 40
PREFILL = 8
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, seed=0)


def next_id(history: list[int]) -> int:
    """What the fake model says after some tokens; seldom its end token."""
    return (sum((place + 1) * token for place, token in enumerate(history)) * 7 + 3) % SIZE


def continued(prompt: tuple[int, ...], count: int) -> list[int]:
    """The output of one lane that nothing ends."""
    history = list(prompt)
    for _ in range(count):
        history.append(next_id(history))
    return history[len(prompt) :]


class FakeDecoder:
    """Remembers what is in its KV cache and gives all weight to next_id of it.

    Attributes:
        histories: tokens of each slot.
        steps: slots of each call's rows.
        fails_on: slots whose rows make a call fail, halfway.
        is_partial: whether part of a slot can be forgotten.
        is_broken_for: slots that get no finite logits.
    """

    def __init__(self) -> None:
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
        self.is_partial = True

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
            if self.wanted[row]:
                logits.append(self.logits_of(slot))
        return np.array(logits, np.float32).reshape(-1, SIZE)

    def logits_of(self, slot: int) -> npt.NDArray[np.float32]:
        if slot in self.is_broken_for:
            return np.full(SIZE, np.nan, np.float32)
        logits = np.full(SIZE, -50, np.float32)
        logits[next_id(self.histories[slot])] = 50
        return logits

    def forget(self, slot: int, start: int) -> bool:
        if start and not self.is_partial:
            return False
        del self.histories[slot][start:]
        return True


@dataclass
class World:
    """A batch over the fake decoder, and all it reported."""

    decoder: FakeDecoder = field(default_factory=FakeDecoder)
    outputs: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    ended: dict[int, Ended] = field(default_factory=dict)
    prefilled: list[int] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self.batch = InflightBatch(
            self.decoder, capacity=CAPACITY, context_length=CONTEXT, prefill_tokens=PREFILL
        )

    def step(self) -> None:
        self.batch.step()
        self.report()

    def report(self) -> None:
        ((_, body),) = FrameReader().feed(pack_step(*self.batch.take_report()))
        told = StepBatch()
        self.counters = unpack_step(body, told)
        self.prefilled += [event.lane for event in told.prefilled]
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


@pytest.fixture
def world() -> World:
    return World()


def ask(
    prompt: tuple[int, ...],
    tokens: int,
    *,
    continues: tuple[int, ...] = (),
    stops: frozenset[int] = frozenset(),
    ignore_eos: bool = True,
) -> EngineRequest:
    return EngineRequest(
        prompt_ids=prompt,
        continue_ids=continues,
        max_output_tokens=tokens,
        stop_token_ids=stops,
        ignore_eos=ignore_eos,
        sampling=GREEDY,
    )


def test_lanes_in_company_get_the_tokens_they_get_alone(world: World) -> None:
    prompts = {lane: tuple(range(1, 2 + lane * 3)) for lane in range(7)}
    for lane, prompt in prompts.items():
        world.batch.submit(lane, ask(prompt, 10))

    world.run()

    assert world.outputs == {lane: continued(prompt, 10) for lane, prompt in prompts.items()}
    assert {ended.reason for ended in world.ended.values()} == {EndReason.MAX_TOKENS}


def test_the_lowest_free_slot_is_taken_and_rows_go_by_slot(world: World) -> None:
    for lane in range(4):
        world.batch.submit(lane, ask((1, 2), 20))
    world.step()
    assert world.decoder.steps[-1] == [0, 0, 1, 1, 2, 2, 3, 3]

    world.batch.abort(2)
    world.batch.abort(0)
    world.batch.submit(10, ask((5, 6, 7), 20))
    world.step()
    assert world.decoder.steps[-1] == [0, 0, 0, 1, 3]

    world.step()
    assert world.decoder.steps[-1] == [0, 1, 3]


def test_long_prompts_are_prefilled_in_chunks_oldest_first(world: World) -> None:
    world.batch.submit(0, ask((1,), 30))
    world.step()
    world.batch.submit(1, ask(tuple(range(1, 21)), 3))
    world.batch.submit(2, ask((4, 5, 6), 3))

    for rows, waiting_tokens in (
        ([0] + [1] * 8, 15),
        ([0] + [1] * 8, 7),
        ([0] + [1] * 4 + [2] * 3, 0),
        ([0, 1, 2], 0),
    ):
        world.step()
        assert world.decoder.steps[-1] == rows
        assert world.counters.waiting_tokens == waiting_tokens
    assert world.prefilled == [0, 1, 2]
    assert world.outputs[1][:2] == continued(tuple(range(1, 21)), 2)


def test_more_lanes_than_slots_wait_first_come_first_served(world: World) -> None:
    for lane in range(7):
        world.batch.submit(lane, ask((1, lane), 2 if lane == 3 else 6))

    world.step()
    assert world.counters == Counters(
        running=4, waiting=3, waiting_tokens=6, kv_used_tokens=8, taken=7
    )
    world.step()
    assert list(world.ended) == [3]
    world.step()
    assert world.prefilled[-1] == 4
    world.batch.abort(5)
    world.report()
    assert world.ended[5] == Ended(5, EndReason.ABORTED)
    world.run()
    assert world.prefilled == [0, 1, 2, 3, 4, 6]
    assert world.counters == Counters()


def test_an_aborted_slot_is_free_for_the_very_next_step(world: World) -> None:
    for lane in range(5):
        world.batch.submit(lane, ask((1, lane), 30))
    world.step()
    tokens = len(world.outputs[2])

    world.batch.abort(2)
    assert world.batch.has_news
    world.step()

    assert world.ended[2].reason is EndReason.ABORTED
    assert len(world.outputs[2]) == tokens
    assert world.decoder.histories[2] == [1, 4]
    assert world.prefilled[-1] == 4


def test_unknown_and_ended_lanes_may_be_aborted(world: World) -> None:
    world.batch.submit(0, ask((1,), 1))
    world.run()

    world.batch.abort(0)
    world.batch.abort(77)
    world.report()

    assert list(world.ended) == [0]


def test_the_end_of_sequence_ends_a_lane_and_is_not_told(world: World) -> None:
    prompt = next((1, token) for token in range(SIZE) if END in continued((1, token), 12)[1:])
    tokens = continued(prompt, 12)
    world.batch.submit(0, ask(prompt, 12, ignore_eos=False))
    world.batch.submit(1, ask(prompt, 12))

    world.run()

    assert world.outputs[0] == tokens[: tokens.index(END)]
    assert world.ended[0].reason is EndReason.END_OF_SEQUENCE
    assert world.outputs[1] == tokens
    assert world.ended[1].reason is EndReason.MAX_TOKENS


def test_a_stop_token_ends_a_lane_and_is_named_but_not_told(world: World) -> None:
    tokens = continued((1, 2), 9)
    stop = tokens[4]
    world.batch.submit(0, ask((1, 2), 9, stops=frozenset({stop, 1000})))

    world.run()

    assert world.outputs[0] == tokens[: tokens.index(stop)]
    assert world.ended[0] == Ended(0, EndReason.STOP_TOKEN, stop)


def test_a_continued_lane_goes_on_where_it_was(world: World) -> None:
    tokens = continued((1, 2, 3), 12)
    world.batch.submit(0, ask((1, 2, 3), 12, continues=tuple(tokens[:5])))

    world.run()

    assert world.outputs[0] == tokens[5:]
    assert world.ended[0].reason is EndReason.MAX_TOKENS


@pytest.mark.parametrize(
    ("prompt", "continues", "tokens", "produced", "reason"),
    [
        (CONTEXT - 3, 0, 9, 3, EndReason.CONTEXT_FULL),
        (CONTEXT - 3, 0, 3, 3, EndReason.MAX_TOKENS),
        (CONTEXT - 3, 2, 9, 1, EndReason.CONTEXT_FULL),
        (CONTEXT - 3, 3, 9, 0, EndReason.CONTEXT_FULL),
        (CONTEXT, 0, 9, 0, EndReason.CONTEXT_FULL),
        (5, 4, 4, 0, EndReason.MAX_TOKENS),
        (5, 0, 0, 0, EndReason.MAX_TOKENS),
        (CONTEXT + 1, 0, 9, 0, EndReason.FAILED),
        (0, 0, 9, 0, EndReason.FAILED),
    ],
)
def test_prompt_and_output_together_fill_the_context_and_no_more(
    world: World,
    prompt: int,
    continues: int,
    tokens: int,
    produced: int,
    reason: EndReason,
) -> None:
    prompt_ids = tuple(token % 50 for token in range(prompt))
    continue_ids = tuple(continued(prompt_ids, continues))
    world.batch.submit(0, ask(prompt_ids, tokens, continues=continue_ids))

    world.run()

    assert len(world.outputs[0]) == produced
    assert world.ended[0].reason is reason


@pytest.mark.parametrize("token_id", [-1, SIZE, 2**31 - 1])
def test_a_token_outside_the_vocabulary_fails_its_lane_without_naming_it(
    world: World, token_id: int
) -> None:
    world.batch.submit(0, ask((1, token_id), 3))
    world.batch.submit(1, ask((1,), 3, continues=(token_id,)))
    world.batch.submit(2, ask((1,), 3))

    world.run()

    message = "a token id is not in the vocabulary"
    assert world.ended[0] == Ended(0, EndReason.FAILED, None, message)
    assert world.ended[1] == Ended(1, EndReason.FAILED, None, message)
    assert world.outputs[2] == continued((1,), 3)


def test_a_row_without_finite_logits_fails_its_lane_alone(world: World) -> None:
    for lane in range(3):
        world.batch.submit(lane, ask((1, lane), 6))
    world.step()
    world.decoder.is_broken_for = {1}

    world.run()

    assert world.ended[1].reason is EndReason.FAILED
    assert len(world.outputs[1]) == 1
    assert world.outputs[0] == continued((1, 0), 6)
    assert world.outputs[2] == continued((1, 2), 6)


def test_a_failed_step_fails_only_the_lanes_that_fail_alone(world: World) -> None:
    for lane in range(3):
        world.batch.submit(lane, ask((1, lane), 9))
    world.step()
    world.batch.submit(3, ask(tuple(range(1, 13)), 9))
    world.decoder.fails_on = {1}
    world.step()
    world.decoder.fails_on = set()

    world.run()

    assert world.ended[1] == Ended(1, EndReason.FAILED, None, "no room")
    assert world.outputs[0] == continued((1, 0), 9)
    assert world.outputs[2] == continued((1, 2), 9)
    assert world.outputs[3] == continued(tuple(range(1, 13)), 9)


def test_a_step_that_cannot_be_taken_back_fails_its_lanes(world: World) -> None:
    """Models with a recurrent memory can only forget whole sequences."""
    world.decoder.is_partial = False
    world.batch.submit(0, ask((1,), 9))
    world.batch.submit(1, ask((2,), 9))
    world.step()
    world.decoder.fails_on = {1}
    world.step()
    world.decoder.fails_on = set()
    world.batch.submit(2, ask((1,), 9))

    world.run()

    assert [world.ended[lane].reason for lane in (0, 1)] == [EndReason.FAILED] * 2
    assert world.outputs[2] == continued((1,), 9)


def test_a_decoder_that_fails_for_everyone_ends_the_engine(world: World) -> None:
    world.decoder.fails_on = set(range(CAPACITY))
    for lane in range(CAPACITY * 4):
        world.batch.submit(lane, ask((1,), 9))

    with pytest.raises(DecodeFailedError, match="no room"):
        world.run()


@pytest.mark.parametrize("seed", range(20))
def test_slots_are_all_free_after_submits_aborts_and_failures_at_random(seed: int) -> None:
    world, rng = World(), random.Random(seed)  # noqa: S311 - no secret
    lanes: dict[int, EngineRequest] = {}
    for _ in range(120):
        if rng.random() < 0.4:
            prompt = tuple(rng.choices(range(SIZE), k=rng.randint(1, 20)))
            lanes[len(lanes)] = ask(prompt, rng.randint(0, 15), ignore_eos=rng.random() < 0.5)
            world.batch.submit(len(lanes) - 1, lanes[len(lanes) - 1])
        if lanes and rng.random() < 0.2:
            world.batch.abort(rng.randrange(len(lanes)))
        world.decoder.fails_on = {rng.randrange(CAPACITY)} if rng.random() < 0.03 else set()
        world.step()
    world.decoder.fails_on = set()
    world.run()

    assert set(world.ended) == set(lanes)
    for lane, request in lanes.items():
        tokens = continued(request.prompt_ids, request.max_output_tokens)
        if not request.ignore_eos and END in tokens:
            tokens = tokens[: tokens.index(END)]
        whole = world.ended[lane].reason not in {EndReason.ABORTED, EndReason.FAILED}
        assert world.outputs[lane] == (tokens if whole else tokens[: len(world.outputs[lane])])
    assert world.counters == Counters()
    assert not any(world.decoder.histories.values())
    for lane in range(1000, 1000 + CAPACITY):
        world.batch.submit(lane, ask((1,), 2))
    world.step()
    assert world.decoder.steps[-1] == list(range(CAPACITY))
