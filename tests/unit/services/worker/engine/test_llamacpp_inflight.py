"""Who has a slot and what a step computes, over a decoder that checks what it is asked."""

from __future__ import annotations

import random

import pytest

from services.worker.engine.base import Ended, EndReason, EngineRequest
from services.worker.engine.llamacpp_decoder import DecodeFailedError
from services.worker.engine.wire import Counters
from tests.unit.services.worker.engine.llamacpp_world import (
    CAPACITY,
    CONTEXT,
    END,
    SIZE,
    FakeDecoder,
    World,
    ask,
    continued,
)


@pytest.fixture
def world() -> World:
    return World()


def test_lanes_in_company_get_the_tokens_they_get_alone(world: World) -> None:
    prompts = {lane: tuple(range(1, 2 + lane * 3)) for lane in range(7)}
    for lane, prompt in prompts.items():
        world.batch.submit(lane, ask(prompt, 10))

    world.run()

    assert world.outputs == {lane: continued(prompt, 10) for lane, prompt in prompts.items()}
    assert {ended.reason for ended in world.ended.values()} == {EndReason.MAX_TOKENS}


def test_slots_next_to_those_in_use_are_taken_and_rows_go_by_slot(world: World) -> None:
    for lane in range(4):
        world.batch.submit(lane, ask((1, 2), 20))
    world.step()
    assert world.decoder.steps[-1] == [0, 0, 1, 1, 2, 2, 3, 3]

    world.batch.abort(2)
    world.batch.abort(0)
    world.batch.submit(10, ask((5, 6, 7), 20))
    world.step()
    assert world.decoder.steps[-1] == [1, 2, 2, 2, 3]

    world.step()
    assert world.decoder.steps[-1] == [1, 2, 3]


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


def test_a_step_that_cannot_be_taken_back_fails_its_lanes() -> None:
    """Models with a recurrent memory can only forget whole sequences."""
    world = World(FakeDecoder(is_partial=False))
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
    for lane in range(1000, 1000 + CAPACITY):
        world.batch.submit(lane, ask((1,), 2))
    world.step()
    assert world.decoder.steps[-1] == list(range(CAPACITY))
