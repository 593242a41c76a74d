"""Executions that leave early or wait: aborts, places, their order, and the load of all."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from services.worker.engine.base import Ended, EndReason, EngineRequest
from tools.conformance.engine.check import Book
from tools.conformance.engine.harness import PROMPT, Harness, Told, ask, eventually
from tools.conformance.engine.rows import CAPACITY
from tools.conformance.verdict import CannotShow, expect, expect_equal

LEAVING = Book("leaving")


@LEAVING.cases({str(steps): steps for steps in range(5)})
async def abort_after_any_step_ends_once_and_frees_the_place(harness: Harness, steps: int) -> None:
    """An abort ends an execution once, twice told or not, and another one gets the place."""
    harness.submit(1, ask(100))
    for _ in range(steps):
        await harness.step()

    harness.engine.abort(1)
    harness.engine.abort(1)
    await harness.until_ended(1)

    expect_equal(harness.end_of(1), Ended(1, EndReason.ABORTED), "end")
    await eventually(lambda: harness.engine.load().running == 0, "nothing runs")
    token_ids, _ = await harness.run(2, ask(5))
    expect_equal(len(token_ids), 5, "tokens of the next")


@LEAVING.check()
async def abort_at_every_step_leaves_a_beginning(harness: Harness) -> None:
    """Behind any number of tokens, what an aborted execution has said is a beginning."""
    whole, _ = await harness.run(100, ask(30))

    for tokens in range(1, 25):
        harness.submit(tokens, ask(30))
        while len(harness.told[tokens].token_ids) < tokens and not harness.told[tokens].ended:
            await harness.step()
        harness.engine.abort(tokens)
        await harness.until_ended(tokens)
        found = harness.told[tokens].token_ids
        harness.expect_same(found, whole[: len(found)], f"aborted behind {tokens} tokens")
        expect(
            harness.end_of(tokens).reason in {EndReason.ABORTED, EndReason.MAX_TOKENS},
            "an aborted execution ended in another way",
        )


@LEAVING.check()
async def an_abort_that_comes_with_the_end_changes_nothing(harness: Harness) -> None:
    """Aborts beside the last token: one end each, and the engine goes on."""
    for lane in range(1, 13):
        harness.submit(lane, ask(1 + lane % 3))
        await asyncio.sleep(0)
        if lane % 2:
            await harness.step()
        harness.engine.abort(lane)
    await harness.until_ended(*range(1, 13))

    reasons = {harness.end_of(lane).reason for lane in range(1, 13)}
    expect(reasons <= {EndReason.ABORTED, EndReason.MAX_TOKENS}, "an end of another kind")
    expect_equal(len((await harness.run(20, ask(5)))[0]), 5, "tokens of the next")


@LEAVING.check()
async def abort_of_an_unknown_lane_changes_nothing(harness: Harness) -> None:
    """Lanes that never were, and those that have ended, may be aborted."""
    harness.engine.abort(99)

    token_ids, _ = await harness.run(1, ask(5))
    harness.engine.abort(1)
    more, _ = await harness.run(2, ask(5))

    harness.expect_same(more, token_ids, "the next output")


@LEAVING.check()
async def abort_leaves_the_others_alone(harness: Harness) -> None:
    """Who shares the batch with an aborted execution says what it would have said."""
    alone, _ = await harness.run(1, ask(30))
    for lane in (2, 3):
        harness.submit(lane, ask(30))
    await harness.step()

    harness.engine.abort(2)
    await harness.until_ended(2, 3)

    harness.expect_same(harness.told[3].token_ids, alone, "the other output")


@LEAVING.check()
async def a_waiting_execution_can_be_aborted(harness: Harness) -> None:
    """One that has no place yet ends without a prefill."""
    for lane in range(1, CAPACITY + 2):
        harness.submit(lane, ask(60))
    await harness.step()

    harness.engine.abort(CAPACITY + 1)
    await harness.until_ended(*range(1, CAPACITY + 2))

    wanted = Told(ended=Ended(CAPACITY + 1, EndReason.ABORTED))
    expect(harness.told[CAPACITY + 1] == wanted, "a waiting execution was more than aborted")


@LEAVING.check()
async def all_may_be_aborted_at_once(harness: Harness) -> None:
    """Twenty executions, running and waiting, end by abort, and the engine serves the next."""
    lanes = range(1, 21)
    for lane in lanes:
        harness.submit(lane, ask(100))
    await harness.step()

    for lane in lanes:
        harness.engine.abort(lane)
    await harness.until_ended(*lanes)

    reasons = {harness.end_of(lane).reason for lane in lanes}
    expect_equal(reasons, {EndReason.ABORTED}, "ends")
    await eventually(lambda: harness.engine.load().running == 0, "nothing runs")
    expect_equal(len((await harness.run(21, ask(5)))[0]), 5, "tokens of the next")


@LEAVING.check()
async def no_more_run_than_there_is_room_for(harness: Harness) -> None:
    """More executions than places: never more run than places, and all get their tokens."""
    lanes = range(1, 3 * CAPACITY)
    for lane in lanes:
        harness.submit(lane, ask(8 + lane))

    while any(harness.told[lane].ended is None for lane in lanes):
        await harness.step()
        running = harness.engine.load().running
        expect(running is not None, "nobody knows how many run")
        expect((running or 0) <= CAPACITY, "more run than there are places")
        begun = [told for told in harness.told.values() if told.prefilled]
        unfinished = [told for told in begun if told.ended is None]
        expect(len(unfinished) <= CAPACITY, "more have begun than there are places")

    lengths = [len(harness.told[lane].token_ids) for lane in lanes]
    expect_equal(lengths, [8 + lane for lane in lanes], "tokens")


@LEAVING.check()
async def who_comes_first_starts_first(harness: Harness) -> None:
    """Executions start in the order in which they were submitted."""
    lanes = list(range(1, 3 * CAPACITY))
    for lane in lanes:
        harness.submit(lane, ask(6))

    await harness.until_ended(*lanes)

    firsts = [harness.told[lane].first_batch for lane in lanes]
    expect(all(first is not None for first in firsts), "one was never prefilled")
    expect(firsts == sorted(first or 0 for first in firsts), "a later one started first")


@LEAVING.check()
async def background_starts_when_nobody_else_waits(harness: Harness) -> None:
    """Executions in the background start behind all others, and get their tokens, too."""

    def background(tokens: int) -> EngineRequest:
        return replace(ask(tokens), is_background=True)

    running = range(1, CAPACITY + 1)
    for lane in running:
        harness.submit(lane, ask(20))
    await harness.step()
    for lane in (11, 12):
        harness.submit(lane, background(4))
    for lane in (21, 22, 23, 24):
        harness.submit(lane, ask(4))

    await harness.until_ended(*running, 11, 12, 21, 22, 23, 24)

    firsts = {lane: harness.told[lane].first_batch or 0 for lane in (11, 12, 21, 22, 23, 24)}
    last = max(firsts[lane] for lane in (21, 22, 23, 24))
    expect(last <= min(firsts[11], firsts[12]), "the background started before others")
    lengths = {lane: len(harness.told[lane].token_ids) for lane in firsts}
    expect_equal(lengths, dict.fromkeys(firsts, 4), "tokens")


@LEAVING.check()
async def a_cancelled_wait_loses_no_batch(harness: Harness) -> None:
    """Waits for the next step are cancelled at any moment, and every token still arrives."""
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

    harness.expect_same(harness.told[2].token_ids, whole, "the output of cancelled waits")


@LEAVING.check()
async def load_counts_what_waits_and_runs(harness: Harness) -> None:
    """With more executions than places, the load is exact; with none it is 0."""
    for lane in range(1, CAPACITY + 3):
        harness.submit(lane, ask(90))
    while len([told for told in harness.told.values() if told.token_ids]) < CAPACITY:
        await harness.step()

    await eventually(lambda: harness.engine.load().running == CAPACITY, "all places run")
    load = harness.engine.load()
    expect_equal(load.waiting, 2, "waiting executions")
    expect_equal(load.waiting_tokens, 2 * len(PROMPT), "waiting tokens")
    await harness.until_ended(*harness.told)
    await eventually(lambda: harness.engine.load().running == 0, "nothing runs")
    expect_equal(harness.engine.load().waiting, 0, "waiting executions at rest")
    expect_equal(harness.engine.load().waiting_tokens, 0, "waiting tokens at rest")


@LEAVING.check()
async def load_says_how_full_the_cache_is(harness: Harness) -> None:
    """While executions run, some of the KV cache is used, and never more than there is."""
    for lane in range(1, CAPACITY + 1):
        harness.submit(lane, ask(100))
    while len([told for told in harness.told.values() if told.token_ids]) < CAPACITY:
        await harness.step()

    # It may be measured now and then only.
    while not harness.engine.load().kv_used_tokens and not harness.told[1].ended:
        await harness.step()

    load = harness.engine.load()
    if load.kv_used_tokens is None or load.kv_total_tokens is None:
        raise CannotShow("this engine does not say how full its cache is")
    expect(0 < load.kv_used_tokens <= load.kv_total_tokens, "more is used than there is, or none")


@LEAVING.check()
async def an_engine_that_works_never_looks_idle(harness: Harness) -> None:
    """From its first token to its end an execution is counted as running, or nobody knows."""
    for lane in (1, 2):
        harness.submit(lane, ask(60))

    while not (harness.told[1].ended and harness.told[2].ended):
        await harness.step()
        live = sum(bool(told.token_ids) and not told.ended for told in harness.told.values())
        running = harness.engine.load().running
        expect(running is None or running >= live, f"{running} run, while {live} say tokens")


@LEAVING.check()
async def steps_grow_while_the_engine_works(harness: Harness) -> None:
    """The count of steps is a sign of life: it grows with what is done."""
    await harness.run(1, ask(1))
    before = harness.engine.load().steps
    if before is None:
        raise CannotShow("this engine does not count its steps")

    for lane in range(2, 12):
        await harness.run(lane, ask(2))

    after = harness.engine.load().steps
    expect(after is not None and after > before, "ten executions were no step")
