"""Pitfalls of the engine as a whole: loading, adapters, grammars, measurements, its end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import threading
import time

import pytest

from services.worker.engine import trtllm_start
from services.worker.engine.base import (
    AdapterUnusable,
    Constraint,
    ConstraintKind,
    EndReason,
)
from tests.integration.services.worker.engine.trtllm_habits import Habit
from tests.integration.services.worker.engine.trtllm_pitfall import HANGS, Pitfalls
from tests.integration.services.worker.engine.trtllm_subjects import (
    BLOCKS_S,
    NEWEST,
    PROMPT,
    TICK_S,
    TICKS_LEAST,
    Bench,
    Subject,
    ask,
    ticks_during,
)

ENGINE = Pitfalls()

_LORA = {"lora": {"enabled": True, "target_modules": ["q_proj", "v_proj"]}}
_LONG = PROMPT * 10
_YES_OR_NO = Constraint(kind=ConstraintKind.REGEX, source="(yes|no)", grammar="start: /(yes|no)/")

# Loading.


@ENGINE.add("The constructor blocks its thread for minutes.", habit=Habit.LOADS_IN_LOOP)
async def loading_leaves_the_event_loop_alone(bench: Bench) -> None:
    assert await ticks_during(bench.start(load_s=BLOCKS_S)) >= TICKS_LEAST


@ENGINE.add(
    "With one adapter in its configuration, the engine takes its tokenizer, and so its end, from "
    "there.",
    habit=Habit.LORA_DIR,
)
async def adapters_bring_no_tokenizer(bench: Bench) -> None:
    adapter = bench.adapter("with-tokenizer", seed=5)
    assert adapter.path is not None
    shutil.copy(bench.model.folder / "tokenizer.json", adapter.path)
    other = {"eos_token": "<|end_of_text|>"}
    (adapter.path / "tokenizer_config.json").write_text(json.dumps(other), encoding="utf-8")
    prompt, whole, at = await bench.reference.pair()
    text = bench.reference.decode(whole[at : at + 2])
    subject = await bench.start(section=_LORA)

    assert subject.llm.tokenizer.eos_token_id == bench.model.eos_id
    said = await bench.says(subject, ask(prompt, most=12, ignore_eos=False, stop_texts=(text,)))
    assert said[:at] == whole[:at]


@ENGINE.add(
    "A bare request of one token looks like those by which idle ranks keep in step, and has "
    "crashed them.",
    habit=Habit.UNSALTED_CANARY,
    fails=HANGS,
)
async def the_first_token_is_drawn_with_a_salt(bench: Bench) -> None:
    section = {"parallelism": {"tensor": 2, "attention_data_parallel": True}}

    await bench.serves(await bench.start(section=section))


# Adapters.


@ENGINE.add(
    "The engine knows an adapter by its number only, whatever path comes with it.",
    habit=Habit.ONE_ADAPTER,
    fails="AssertionError: .*lora_int_id",
)
async def every_adapter_has_a_number_of_its_own(bench: Bench) -> None:
    adapters = [bench.adapter(f"numbered-{seed}", seed=seed) for seed in (1, 2)]
    subject = await bench.start(section=_LORA)

    outputs = []
    for adapter in adapters:
        await subject.load_adapter(adapter)
        outputs.append(await bench.says(subject, ask(adapter=adapter)))

    assert outputs[0] != outputs[1]


@ENGINE.add(
    "A request without the adapter's path is refused, also when the engine has the adapter.",
    habit=Habit.PATH_ONCE,
    fails="ValueError: .*lora_path",
)
async def every_request_brings_the_path_of_its_adapter(bench: Bench) -> None:
    adapter = bench.adapter("twice", seed=1)
    subject = await bench.start(section=_LORA)
    await subject.load_adapter(adapter)

    first = await bench.says(subject, ask(adapter=adapter))

    assert await bench.says(subject, ask(adapter=adapter)) == first


@ENGINE.add("An adapter that does not fit ends older engines.", fails=HANGS)
async def an_adapter_is_looked_at_before_the_engine_sees_it(bench: Bench) -> None:
    adapter = bench.adapter("too-high", seed=1, rank=65)
    subject = await bench.start(section=_LORA)

    try:
        await subject.load_adapter(adapter)
    except AdapterUnusable:
        pass
    else:
        subject.submit(ask(adapter=adapter))

    await bench.serves(subject)


# Grammars.


@ENGINE.add(
    "Without a backend, set when the engine is loaded, there is no guided decoding.",
    habit=Habit.NO_BACKEND,
    fails="ValueError: guided_decoding_backend",
)
async def a_constraint_is_enforced(bench: Bench) -> None:
    subject = await bench.plain()

    output = await bench.says(subject, ask(constraint=_YES_OR_NO, ignore_eos=False))

    assert bench.reference.decode(output) in {"yes", "no"}


@ENGINE.add("A schema that does not compile ends older engines.", fails=HANGS)
async def a_schema_is_compiled_before_the_engine_sees_it(bench: Bench) -> None:
    schema = {"type": 5}
    constraint = Constraint(
        kind=ConstraintKind.JSON_SCHEMA,
        source=json.dumps(schema),
        grammar=json.dumps({"grammars": [{"json_schema": schema}]}),
    )
    subject = await bench.plain()

    lane = subject.submit(ask(constraint=constraint))
    await bench.serves(subject)

    told = await bench.ended(subject, lane)
    assert told.ended is not None
    assert told.ended.reason is EndReason.FAILED


@ENGINE.add(
    "A grammar means another language to each backend, and the wrong one ends older engines.",
    fails=HANGS,
)
async def a_grammar_is_given_in_the_backends_language(bench: Bench) -> None:
    constraint = Constraint(
        kind=ConstraintKind.GRAMMAR, source='root ::= "yes" | "no"', grammar='start: "yes" | "no"'
    )
    subject = await bench.plain()

    output = await bench.says(subject, ask(constraint=constraint, ignore_eos=False))

    assert bench.reference.decode(output) in {"yes", "no"}


@ENGINE.add("There is no choice among the guides.", fails="TypeError: .*choice")
async def choices_become_a_grammar(bench: Bench) -> None:
    constraint = Constraint(
        kind=ConstraintKind.CHOICES,
        source='["yes", "no"]',
        grammar='start: "yes" | "no"',
    )
    subject = await bench.plain()

    output = await bench.says(subject, ask(constraint=constraint, ignore_eos=False))

    assert bench.reference.decode(output) in {"yes", "no"}


@ENGINE.add("Behind a grammar that is through anything comes, where the end is ignored.")
async def a_constraint_ends_where_nothing_may_follow(bench: Bench) -> None:
    subject = await bench.plain()

    told = await bench.run(subject, ask(constraint=_YES_OR_NO, most=30))

    assert bench.reference.decode(told.token_ids) in {"yes", "no"}
    assert told.ended is not None
    assert told.ended.reason is EndReason.END_OF_SEQUENCE


@ENGINE.add(
    "min_tokens forbids the only token that a finished grammar allows, which ends the engine.",
    fails=HANGS,
)
async def a_least_length_gives_way_to_a_constraint(bench: Bench) -> None:
    subject = await bench.start(version=NEWEST)
    request = ask(constraint=_YES_OR_NO, most=30, ignore_eos=False, min_output_tokens=20)

    output = await bench.says(subject, request)

    assert bench.reference.decode(output) in {"yes", "no"}
    await bench.serves(subject)


@ENGINE.add("A grammar begins with the first token that is drawn, also behind a part of an output.")
async def a_constraint_is_not_begun_anew(bench: Bench) -> None:
    subject = await bench.plain()
    begun = tuple(bench.reference.encode("y"))

    told = await bench.run(
        subject, ask(constraint=_YES_OR_NO, ignore_eos=False, continue_ids=begun, most=20)
    )

    # Whoever cannot go on says so.
    assert told.ended is not None
    has_failed = told.ended.reason is EndReason.FAILED and not told.token_ids
    assert has_failed or bench.reference.decode([*begun, *told.token_ids]) == "yes"


# How it ends.


@ENGINE.add(
    "A fatal error comes out of any request, or of the next call; the others hear nothing.",
    habit=Habit.CATCHES_ALL,
    fails=HANGS,
)
async def a_fatal_error_is_the_end_of_the_engine(bench: Bench) -> None:
    fault = {"name": "fatal", "request": 2, "tokens": 2, "blocks_s": 0.0}
    subject = await bench.start(fault)

    for _ in range(2):
        subject.submit(ask(most=60))

    await bench.until(subject, lambda: subject.deaths)


@ENGINE.add(
    "Newer versions tell every request that the engine is dead, by an error that is none of the "
    "request's.",
    habit=Habit.CATCHES_ALL,
    fails=HANGS,
)
async def a_dead_engine_fails_nobody_alone(bench: Bench) -> None:
    fault = {"name": "rank_killed", "request": 2, "tokens": 2}
    subject = await bench.start(fault, version=NEWEST, dead_after_s=0.01)

    subject.submit(ask(most=60))

    await bench.until(subject, lambda: subject.deaths)


@ENGINE.add(
    "A process of the engine that is killed is noticed by nobody: requests hang, and it calls "
    "itself healthy."
)
async def a_killed_process_is_noticed(bench: Bench) -> None:
    subject = await bench.start()
    lane = subject.submit(ask(most=400))
    await bench.until(subject, lambda: subject.told[lane].token_ids)

    os.kill(subject.llm._executor.engine.process.pid, signal.SIGKILL)
    await bench.until(subject, lambda: subject.llm._executor.engine.is_stuck)

    assert "process" in await subject.noticed()


@ENGINE.add("An engine that hangs calls itself healthy.")
async def a_hung_engine_is_noticed(bench: Bench) -> None:
    fault = {"name": "wedge", "request": 2, "tokens": 2}
    subject = await bench.start(fault)

    subject.submit(ask(most=60))
    await bench.until(subject, lambda: subject.llm._executor.engine.is_stuck)

    assert "canary" in await subject.noticed()


@ENGINE.add(
    "After a fatal error the engine shuts down inside of whoever reads, which blocks the event "
    "loop."
)
async def a_blocked_event_loop_is_noticed(bench: Bench) -> None:
    fault = {"name": "fatal", "request": 2, "tokens": 2, "blocks_s": 0.3}
    with pytest.MonkeyPatch.context() as patch:
        # So that a beat is never old.
        patch.setattr(trtllm_start, "BEAT_S", TICK_S)
        subject = await bench.start(fault)
        looking = asyncio.create_task(asyncio.to_thread(_look, subject))
        subject.submit(ask(most=60))

        async with asyncio.timeout(bench.patience_s):
            assert await looking


def _look(subject: Subject) -> str:
    """Looks from another thread while the event loop is blocked; returns what it sees first."""
    executor, pause = subject.llm._executor, threading.Event()
    while not executor.doing_shutdown:
        pause.wait(TICK_S)
    until_s = time.perf_counter() + 0.25
    while time.perf_counter() < until_s:
        why = subject.noticed_meanwhile()
        if why:
            return why
        pause.wait(TICK_S)
    return ""


@ENGINE.add("shutdown() of a dead or hung engine may never return.")
async def an_engine_is_ended_in_bounded_time(bench: Bench) -> None:
    subject = await bench.start({"name": "shutdown_hang"}, hang_s=0.3)

    started_s = time.perf_counter()
    await subject.shut_down()

    assert time.perf_counter() - started_s < 0.25


@ENGINE.add("shutdown() also waits at the end of the interpreter.")
async def a_process_ends_although_its_engine_is_dead(bench: Bench) -> None:
    assert await bench.process(bench)
