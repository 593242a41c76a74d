"""Pitfalls of measurements: statistics, and events of the prefix cache."""

from __future__ import annotations

import asyncio

import pytest

from services.worker.engine import trtllm_child
from services.worker.engine.base import (
    Constraint,
    ConstraintKind,
)
from services.worker.engine.kv_events import KvCleared
from tests.integration.services.worker.engine.trtllm_habits import Habit
from tests.integration.services.worker.engine.trtllm_pitfall import HANGS, Pitfalls
from tests.integration.services.worker.engine.trtllm_subjects import (
    BLOCK_TOKENS,
    BLOCKS_S,
    NEWEST,
    PROMPT,
    TICK_S,
    TICKS_LEAST,
    Bench,
    Subject,
    ask,
    names_of,
    stored,
    ticks_during,
)

MEASURES = Pitfalls()

_LORA = {"lora": {"enabled": True, "target_modules": ["q_proj", "v_proj"]}}
_LONG = PROMPT * 10
_YES_OR_NO = Constraint(kind=ConstraintKind.REGEX, source="(yes|no)", grammar="start: /(yes|no)/")

# Measurements.


@MEASURES.add(
    "Statistics are off unless they are asked for when the engine is loaded.",
    habit=Habit.NO_STATISTICS,
    fails=HANGS,
)
async def iterations_are_counted(bench: Bench) -> None:
    subject = await bench.start(polls=True)
    await bench.serves(subject)

    await bench.until(subject, lambda: (subject.iteration or 0) >= 6)


@MEASURES.add(
    "Before the first request there are no events, and asking for them is an error.",
    habit=Habit.NO_WARM_UP,
    fails="AssertionError: KV Event",
)
async def nothing_is_measured_before_the_first_request(bench: Bench) -> None:
    subject = await bench.start(polls=True)
    await asyncio.sleep(TICK_S)

    await bench.serves(subject)
    await bench.until(subject, lambda: subject.iteration)


@MEASURES.add(
    "A queue of statistics that was found empty once says nothing until the next request.",
    habit=Habit.QUEUE_ENDS,
    fails=HANGS,
)
async def a_slow_request_is_measured_to_its_end(bench: Bench) -> None:
    subject = await bench.start(polls=True, step_s=0.03)

    await bench.run(subject, ask(most=6))

    await bench.until(subject, lambda: (subject.iteration or 0) >= 6)


@MEASURES.add("Newer versions fetch statistics in the caller's thread, which waits for them.")
async def measuring_leaves_the_event_loop_alone(bench: Bench) -> None:
    subject = await bench.start({"name": "stats_block", "s": BLOCKS_S}, version=NEWEST, polls=True)

    ticks = await ticks_during(asyncio.sleep(3 * TICK_S))
    ticks += await ticks_during(asyncio.sleep(3 * TICK_S))

    assert ticks >= TICKS_LEAST
    await bench.serves(subject)


@MEASURES.add("Asking for statistics may raise.", fails="RuntimeError: the statistics")
async def statistics_that_cannot_be_read_harm_nobody(bench: Bench) -> None:
    subject = await _start_unmeasured(bench, {"name": "stats_error"})

    for _ in range(2):
        await bench.serves(subject)
        await asyncio.sleep(TICK_S)

    assert subject.crash is None or await _raise(subject.crash)


@MEASURES.add("The statistics of the KV cache may be null.", fails="AttributeError: 'NoneType'")
async def a_cache_that_is_not_measured_is_unknown(bench: Bench) -> None:
    await _runs_with_unknown_use(bench, {"name": "stats_null_kv"})


@MEASURES.add("Fields may be missing, which is not the same as 0.")
async def a_number_that_is_missing_is_unknown(bench: Bench) -> None:
    await _runs_with_unknown_use(
        bench, {"name": "stats_missing", "keys": ["kvCacheStats.usedNumBlocks"]}
    )


async def _runs_with_unknown_use(bench: Bench, fault: dict[str, object]) -> None:
    subject = await _start_unmeasured(bench, fault)
    await bench.run(subject, ask(_LONG, most=30))
    await bench.until(subject, lambda: (subject.iteration or 0) >= 30)

    assert subject.kv_used is None


async def _start_unmeasured(bench: Bench, fault: dict[str, object]) -> Subject:
    """Starts an engine of which nothing is to be measured first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trtllm_child, "_MEASURE_WITHIN_S", TICK_S)
        return await bench.start(fault, polls=True)


async def _raise(error: BaseException) -> bool:
    raise error


@MEASURES.add(
    "Who has ended is still active in the last statistics, and an idle engine tells no others.",
    habit=Habit.ACTIVE_IS_RUNNING,
)
async def an_idle_engine_runs_nothing(bench: Bench) -> None:
    subject = await bench.start(polls=True)

    await bench.serves(subject)
    await bench.until(subject, lambda: (subject.iteration or 0) >= 6)

    assert subject.running == 0


@MEASURES.add(
    "An idle engine tells no statistics: that is no sign of anything.", habit=Habit.SILENCE_IS_DEATH
)
async def an_idle_engine_is_well(bench: Bench) -> None:
    subject = await bench.start(polls=True)
    await bench.serves(subject)

    assert await subject.noticed() == ""


# The prefix cache.


@MEASURES.add(
    "There are no events of the cache without a buffer for them.",
    habit=Habit.NO_EVENT_BUFFER,
    fails=HANGS,
)
async def changes_of_the_cache_are_told(bench: Bench) -> None:
    await _tells_full_blocks(bench)


@MEASURES.add("The engine names blocks by a hash of its own.", habit=Habit.ENGINE_HASHES)
async def blocks_are_named_by_their_tokens(bench: Bench) -> None:
    await _tells_full_blocks(bench)


@MEASURES.add("Its hashes take all 64 bits.", habit=Habit.SIGNED, fails="error: ")
async def hashes_have_no_sign(bench: Bench) -> None:
    await _tells_full_blocks(bench)


@MEASURES.add(
    "Tokens of a block are objects, not ids.", habit=Habit.PLAIN_TOKENS, fails="TypeError: .*dict"
)
async def tokens_of_a_block_are_read(bench: Bench) -> None:
    await _tells_full_blocks(bench)


@MEASURES.add("Blocks that are not full are told, too.", habit=Habit.PART_BLOCKS)
async def only_full_blocks_are_told(bench: Bench) -> None:
    await _tells_full_blocks(bench)


@MEASURES.add("Each attention window tells blocks of its own.", habit=Habit.ALL_WINDOWS)
async def the_largest_window_counts(bench: Bench) -> None:
    await _tells_full_blocks(bench, {"name": "events_windows", "window": 64})


async def _tells_full_blocks(bench: Bench, *faults: dict[str, object]) -> None:
    """States that exactly the full blocks of an execution are told, each once."""
    subject = await bench.start(*faults, polls=True)

    output = await bench.says(subject, ask(_LONG, most=20))
    # The last token is not computed.
    names = names_of([*_LONG, *output][:-1])
    await bench.until(subject, lambda: len(stored(subject.events)) >= len(names))
    iteration = subject.iteration or 0
    await bench.serves(subject)
    await bench.until(subject, lambda: (subject.iteration or 0) >= iteration + 6)

    assert len(names) > len(_LONG) // BLOCK_TOKENS
    assert stored(subject.events) == names


@MEASURES.add("Events are lost when nobody fetches them in time.", habit=Habit.NO_GAPS, fails=HANGS)
async def a_lost_event_is_told(bench: Bench) -> None:
    subject = await bench.start({"name": "events_gap", "event": 2}, polls=True)

    for number in range(3):
        await bench.run(subject, ask((40 + number, *_LONG)))

    await bench.until(subject, lambda: KvCleared() in subject.events)
