"""The one contract that every engine fulfils: the life of an execution."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from services.worker.engine.base import Ended, EndReason, EngineDied, Sampling, StepBatch
from tests.integration.services.worker.engine.contract import (
    CAPACITY,
    CONTEXT_LENGTH,
    GREEDY,
    PATIENCE_S,
    PROMPT,
    Harness,
    Told,
    ask,
    eventually,
    seeded,
)


async def test_info_describes_what_was_asked_for(harness: Harness) -> None:
    assert harness.info.max_running == CAPACITY
    assert harness.info.context_length == CONTEXT_LENGTH
    assert harness.info.vocabulary_size > 0
    assert harness.info.is_deterministic


async def test_prompt_is_prefilled_then_tokens_come_then_one_end(harness: Harness) -> None:
    token_ids, ended = await harness.run(1, ask(7))

    assert len(token_ids) == 7
    assert ended == Ended(1, EndReason.MAX_TOKENS)
    assert harness.told[1].prefilled == 1


async def test_nothing_comes_behind_the_end(harness: Harness) -> None:
    await harness.run(1, ask(3))

    await harness.run(2, ask(20))

    assert len(harness.told[1].token_ids) == 3


async def test_a_lane_may_be_used_again_after_its_end(harness: Harness) -> None:
    first, _ = await harness.run(1, ask(4))

    second, _ = await harness.run(1, ask(4))

    assert second == first


async def test_stop_token_ids_end_the_output_and_are_not_in_it(harness: Harness) -> None:
    whole, _ = await harness.run(1, ask(24))
    stop = whole[5]

    token_ids, ended = await harness.run(2, ask(24, stops=frozenset({stop})))

    assert token_ids == whole[: whole.index(stop)]
    assert ended == Ended(2, EndReason.STOP_TOKEN, stop)


async def test_same_seed_gives_the_same_tokens(harness: Harness) -> None:
    first, _ = await harness.run(1, ask(24, sampling=seeded(7)))

    second, _ = await harness.run(2, ask(24, sampling=seeded(7)))

    assert second == first


async def test_other_seeds_give_other_tokens(harness: Harness) -> None:
    outputs = [(await harness.run(seed, ask(24, sampling=seeded(seed))))[0] for seed in range(1, 5)]

    assert len({tuple(output) for output in outputs}) > 1


async def test_other_prompts_give_other_tokens(harness: Harness) -> None:
    first, _ = await harness.run(1, ask(24))

    second, _ = await harness.run(2, ask(24, prompt=(*PROMPT, 33, 33)))

    assert second != first


async def test_temperature_0_knows_no_seed(harness: Harness) -> None:
    outputs = [
        (
            await harness.run(
                seed, ask(24, sampling=Sampling(temperature=0, top_p=1, top_k=0, seed=seed))
            )
        )[0]
        for seed in (1, 2)
    ]

    assert outputs[0] == outputs[1]


async def test_company_does_not_change_the_output(harness: Harness) -> None:
    alone, _ = await harness.run(1, ask(16, sampling=seeded(3)))

    for lane in (2, 3, 4):
        harness.submit(lane, ask(16, sampling=seeded(lane)))
    await harness.until_ended(2, 3, 4)

    assert harness.told[3].token_ids == alone


@pytest.mark.parametrize("lost_at", [1, 9, 23])
@pytest.mark.parametrize("sampling", [GREEDY, seeded(5)], ids=["greedy", "seeded"])
async def test_a_continuation_equals_the_uninterrupted_run(
    harness: Harness, lost_at: int, sampling: Sampling
) -> None:
    whole, _ = await harness.run(1, ask(24, sampling=sampling))

    rest, ended = await harness.run(2, ask(24, continues=tuple(whole[:lost_at]), sampling=sampling))

    assert rest == whole[lost_at:]
    assert ended.reason is EndReason.MAX_TOKENS


async def test_a_continuation_from_every_place_equals_the_uninterrupted_run(
    harness: Harness,
) -> None:
    """From 0 to the last token and the stop token behind it, in the company of other places."""
    drawn, _ = await harness.run(1, ask(24, sampling=seeded(11)))
    stop = next(token for token in reversed(drawn) if drawn.index(token) > 8)
    request = ask(24, sampling=seeded(11), stops=frozenset({stop}))
    whole, end = await harness.run(2, request)
    assert end.reason is EndReason.STOP_TOKEN
    lanes = {100 + cut: cut for cut in range(len(whole) + 1)}

    for lane, cut in lanes.items():
        harness.submit(lane, replace(request, continue_ids=tuple(whole[:cut])))
    await harness.until_ended(*lanes)

    for lane, cut in lanes.items():
        told = harness.told[lane]
        assert whole[:cut] + told.token_ids == whole, cut
        assert told.ended == Ended(lane, EndReason.STOP_TOKEN, stop)


async def test_full_context_ends_the_output(harness: Harness) -> None:
    prompt = PROMPT * 24

    token_ids, ended = await harness.run(1, ask(1000, prompt=prompt))

    assert len(prompt) + len(token_ids) == CONTEXT_LENGTH
    assert ended.reason is EndReason.CONTEXT_FULL


async def test_ignore_eos_goes_on_to_the_last_token(harness: Harness) -> None:
    for lane in range(1, 4):
        harness.submit(lane, ask(100, sampling=seeded(lane)))
    await harness.until_ended(1, 2, 3)

    assert [len(harness.told[lane].token_ids) for lane in (1, 2, 3)] == [100] * 3


@pytest.mark.parametrize("steps", range(5))
async def test_abort_after_any_step_ends_once_and_frees_the_place(
    harness: Harness, steps: int
) -> None:
    harness.submit(1, ask(100))
    for _ in range(steps):
        await harness.step()

    harness.engine.abort(1)
    harness.engine.abort(1)
    await harness.until_ended(1)

    assert harness.told[1].ended == Ended(1, EndReason.ABORTED)
    await eventually(lambda: harness.engine.load().running == 0)
    token_ids, _ = await harness.run(2, ask(5))
    assert len(token_ids) == 5


async def test_abort_of_an_unknown_lane_changes_nothing(harness: Harness) -> None:
    harness.engine.abort(99)

    token_ids, _ = await harness.run(1, ask(5))
    harness.engine.abort(1)
    more, _ = await harness.run(2, ask(5))

    assert token_ids == more


async def test_abort_leaves_the_others_alone(harness: Harness) -> None:
    alone, _ = await harness.run(1, ask(30))
    for lane in (2, 3):
        harness.submit(lane, ask(30))
    await harness.step()

    harness.engine.abort(2)
    await harness.until_ended(2, 3)

    assert harness.told[3].token_ids == alone


async def test_a_waiting_execution_can_be_aborted(harness: Harness) -> None:
    for lane in range(1, CAPACITY + 2):
        harness.submit(lane, ask(60))
    await harness.step()

    harness.engine.abort(CAPACITY + 1)
    await harness.until_ended(*range(1, CAPACITY + 2))

    assert harness.told[CAPACITY + 1] == Told(ended=Ended(CAPACITY + 1, EndReason.ABORTED))


async def test_no_more_run_than_there_is_room_for(harness: Harness) -> None:
    lanes = range(1, 3 * CAPACITY)
    for lane in lanes:
        harness.submit(lane, ask(8 + lane))

    while any(harness.told[lane].ended is None for lane in lanes):
        await harness.step()
        running = harness.engine.load().running
        assert running is not None
        assert running <= CAPACITY
        begun = [told for told in harness.told.values() if told.prefilled]
        assert len([told for told in begun if told.ended is None]) <= CAPACITY

    assert [len(harness.told[lane].token_ids) for lane in lanes] == [8 + lane for lane in lanes]


async def test_who_comes_first_starts_first(harness: Harness) -> None:
    lanes = list(range(1, 3 * CAPACITY))
    for lane in lanes:
        harness.submit(lane, ask(6))

    await harness.until_ended(*lanes)

    firsts = [harness.told[lane].first_batch for lane in lanes]
    assert all(first is not None for first in firsts)
    assert firsts == sorted(first or 0 for first in firsts)


async def test_a_cancelled_wait_loses_no_batch(harness: Harness) -> None:
    whole, _ = await harness.run(1, ask(24))
    harness.submit(2, ask(24))

    turns = 0
    while harness.told[2].ended is None:
        turns += 1
        waiting = asyncio.ensure_future(harness.engine.next_step())
        for _ in range(turns % 5):
            await asyncio.sleep(0)
        if turns % 7 == 0:
            await asyncio.wait([waiting], timeout=0.01)
        waiting.cancel()
        try:
            harness.take(await waiting)
        except asyncio.CancelledError:
            continue

    assert harness.told[2].token_ids == whole


async def test_load_counts_what_waits_and_runs(harness: Harness) -> None:
    for lane in range(1, CAPACITY + 3):
        harness.submit(lane, ask(90))
    while len([told for told in harness.told.values() if told.token_ids]) < CAPACITY:
        await harness.step()

    await eventually(lambda: harness.engine.load().running == CAPACITY)
    load = harness.engine.load()
    assert load.waiting == 2
    assert load.waiting_tokens == 2 * len(PROMPT)
    assert load.kv_used_tokens is not None
    assert load.kv_total_tokens is not None
    assert 0 < load.kv_used_tokens <= load.kv_total_tokens

    await harness.until_ended(*harness.told)
    await eventually(lambda: harness.engine.load().running == 0)
    assert harness.engine.load().waiting == 0
    assert harness.engine.load().waiting_tokens == 0


async def test_stop_may_be_repeated_and_is_final(harness: Harness) -> None:
    harness.submit(1, ask(100))
    await harness.step()

    async with asyncio.timeout(PATIENCE_S):
        await harness.engine.stop()
        await harness.engine.stop()

    with pytest.raises(EngineDied):
        harness.engine.submit(2, ask(1))
    await expect_death(harness.engine.next_step)
    harness.engine.abort(1)


async def test_stop_wakes_who_waits_for_a_step(harness: Harness) -> None:
    waiting = asyncio.ensure_future(harness.engine.next_step())
    await asyncio.sleep(0)

    await harness.engine.stop()

    with pytest.raises(EngineDied):
        await asyncio.wait_for(waiting, PATIENCE_S)


async def expect_death(next_step: Callable[[], Awaitable[StepBatch]]) -> None:
    """The last batches may still come."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await next_step()
            except EngineDied:
                return
