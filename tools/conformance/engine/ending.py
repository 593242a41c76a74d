"""How an engine ends: stopped, wedged, killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

from services.worker.engine.base import EngineDied, StepBatch
from tools.conformance.engine.check import Book
from tools.conformance.engine.harness import PATIENCE_S, PROMPT, Harness, ask
from tools.conformance.engine.processes import child_of, descendants_of, is_alive
from tools.conformance.engine.shared import STOP_S
from tools.conformance.verdict import CannotShow, Mismatch, expect, expect_equal

ENDING = Book("ending")
NOTICED_S = 10.0
"""Longest time until the death of what an engine consists of is noticed."""
_QUIET_S = 0.2


@ENDING.check(ends_engine=True)
async def what_was_submitted_ends_before_a_stop(harness: Harness) -> None:
    """An engine that gets nothing more runs empty, and then stops at once."""
    lanes = range(1, 8)
    for lane in lanes:
        harness.submit(lane, ask(10 + lane))

    await harness.until_ended(*lanes)
    await stopped(harness)

    lengths = [len(harness.told[lane].token_ids) for lane in lanes]
    expect_equal(lengths, [10 + lane for lane in lanes], "tokens")


@ENDING.check(ends_engine=True)
async def stop_may_be_repeated_and_is_final(harness: Harness) -> None:
    """A stopped engine takes nothing, tells nothing, and does not mind a second stop."""
    harness.submit(1, ask(100))
    await harness.step()

    await stopped(harness)
    await stopped(harness)

    expect_refused(lambda: harness.engine.submit(2, ask(1)))
    await expect_death(harness.engine.next_step)
    harness.engine.abort(1)


@ENDING.check(ends_engine=True)
async def stop_wakes_who_waits_for_a_step(harness: Harness) -> None:
    """A wait for the next step ends with the engine."""
    waiting = asyncio.ensure_future(harness.engine.next_step())
    await asyncio.sleep(0)

    await stopped(harness)

    await expect_death(lambda: waiting)


@ENDING.check(ends_engine=True)
async def a_stopped_engine_neither_embeds_nor_loads(harness: Harness) -> None:
    """Embeddings and adapters are refused by an engine that is gone, and its load is unknown."""
    abilities = harness.info.abilities
    adapter = harness.row.adapter(harness.folder, 1)
    await stopped(harness)

    if abilities.embedding_dimensions:
        await expect_death_of(harness.engine.embed([PROMPT]))
    if abilities.adapters:
        await expect_death_of(harness.engine.load_adapter(adapter))


@ENDING.check(ends_engine=True)
async def an_engine_that_is_killed_is_dead(harness: Harness) -> None:
    """SIGKILL of the child process: who waits hears of it, and nothing is taken any more."""
    process_id = _child_of(harness)
    harness.submit(1, ask(100))
    await harness.step()

    os.kill(process_id, signal.SIGKILL)
    await expect_death(harness.engine.next_step)

    expect_refused(lambda: harness.engine.submit(2, ask(1)))
    expect(harness.engine.load().running is None, "the load of a dead engine is known")
    await stopped(harness)


@ENDING.check(ends_engine=True)
async def an_engine_whose_helper_is_killed_is_dead(harness: Harness) -> None:
    """SIGKILL of the process that computes, behind the child process: noticed within 10 s."""
    if not harness.row.has_helper:
        raise CannotShow("this engine computes in its child process, or in none")
    helpers = descendants_of(_child_of(harness))
    expect(bool(helpers), "no process computes behind the child process")
    harness.submit(1, ask(100))
    await harness.step()

    for process_id in helpers:
        os.kill(process_id, signal.SIGKILL)
    try:
        async with asyncio.timeout(NOTICED_S):
            await expect_death(harness.engine.next_step)
    except TimeoutError:
        raise Mismatch(f"the death was not noticed within {NOTICED_S:g} s") from None

    expect_refused(lambda: harness.engine.submit(2, ask(1)))
    await stopped(harness)


@ENDING.check(ends_engine=True)
async def an_engine_that_is_wedged_shows_it_and_can_be_stopped(harness: Harness) -> None:
    """SIGSTOP of the child process: its steps stand still, and a stop ends all of it in time."""
    process_id = _child_of(harness)
    harness.submit(1, ask(100))
    await harness.step()
    os.kill(process_id, signal.SIGSTOP)
    # What it had said before arrives yet.
    await asyncio.sleep(_QUIET_S)
    before = harness.engine.load().steps

    harness.submit(2, ask(3))
    await asyncio.sleep(_QUIET_S)

    expect(harness.engine.load().steps == before, "a process that stands still makes steps")
    helpers = descendants_of(process_id)
    await stopped(harness)
    left = [number for number in (process_id, *helpers) if is_alive(number)]
    expect(not left, f"{len(left)} processes of the engine outlived its stop")


def _child_of(harness: Harness) -> int:
    """Its child process.

    Raises:
        CannotShow: it has none.
    """
    if harness.row.child_module is None:
        raise CannotShow("this engine has no process of its own")
    process_id = child_of(os.getpid(), harness.row.child_module)
    if process_id is None:
        raise CannotShow("the engine's process cannot be found on this system")
    return process_id


async def stopped(harness: Harness) -> None:
    """Stops the engine.

    Raises:
        Mismatch: not in time.
    """
    try:
        async with asyncio.timeout(STOP_S):
            await harness.engine.stop()
    except TimeoutError:
        raise Mismatch(f"the engine did not stop within {STOP_S:g} s") from None


def expect_refused(call: Callable[[], None]) -> None:
    """States that a dead engine takes nothing."""
    try:
        call()
    except EngineDied:
        return
    raise Mismatch("an engine that is gone took an execution")


async def expect_death_of(call: Awaitable[object]) -> None:
    """States that a call on a dead engine fails as such."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            await call
    except EngineDied:
        return
    except TimeoutError:
        raise Mismatch(f"no answer of an engine that is gone within {PATIENCE_S:g} s") from None
    raise Mismatch("an engine that is gone answered")


async def expect_death(next_step: Callable[[], Awaitable[StepBatch]]) -> None:
    """States that the end is told; the last batches may still come before."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await next_step()
    except EngineDied:
        return
    except TimeoutError:
        raise Mismatch(f"the end was not told within {PATIENCE_S:g} s") from None
