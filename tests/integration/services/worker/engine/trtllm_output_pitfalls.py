"""Pitfalls of what comes back: where outputs end, what they say, how they fail."""

from __future__ import annotations

import asyncio
import math

from services.worker.engine.base import EndReason
from tests.integration.services.worker.engine.trtllm_habits import Habit
from tests.integration.services.worker.engine.trtllm_pitfall import HANGS, Pitfalls
from tests.integration.services.worker.engine.trtllm_subjects import (
    PROMPT,
    Bench,
    ask,
    warm,
)

OUTPUTS = Pitfalls()


# Where outputs end.


@OUTPUTS.add(
    "Stop texts are not taken together with an end_id of one's own.",
    habit=Habit.END_ID,
    fails="RuntimeError: .*setup",
)
async def the_engine_finds_its_own_end(bench: Bench) -> None:
    prompt, whole, at = await bench.reference.pair()
    text = bench.reference.decode(whole[at : at + 2])
    subject = await bench.plain()

    said = await bench.says(subject, ask(prompt, most=12, ignore_eos=False, stop_texts=(text,)))

    assert said[:at] == whole[:at]


@OUTPUTS.add(
    "Only the tokenizer's end ends an output; other ends of generation_config.json are drawn.",
    habit=Habit.ENGINE_KNOWS_ENDS,
)
async def every_end_of_the_model_ends_an_output(bench: Bench) -> None:
    subject = await bench.plain()
    for end_id in bench.model.eos_ids:
        prompt, said = await bench.reference.ending(end_id)

        told = await bench.run(subject, ask(prompt, most=40, ignore_eos=False))

        assert told.token_ids == said
        assert told.ended is not None
        assert told.ended.reason is EndReason.END_OF_SEQUENCE


@OUTPUTS.add("The end of a sequence stands among the token ids.", habit=Habit.TEXT_OF_IDS)
async def the_end_is_not_told(bench: Bench) -> None:
    prompt, said = await bench.reference.ending(bench.model.eos_id)
    subject = await bench.plain()

    assert await bench.says(subject, ask(prompt, most=40, ignore_eos=False)) == said


@OUTPUTS.add("Some samplers leave the end out of the token ids.", habit=Habit.LAST_IS_END)
async def an_end_that_is_missing_costs_no_token(bench: Bench) -> None:
    prompt, said = await bench.reference.ending(bench.model.eos_id)
    subject = await bench.start({"name": "eos_missing", "every": True})

    assert await bench.says(subject, ask(prompt, most=40, ignore_eos=False)) == said


@OUTPUTS.add(
    "A matched stop is cut from the ids in the last step: the list is shorter than what was "
    "streamed, and a stop in several tokens was told in part."
)
async def a_stop_text_is_told_whole(bench: Bench) -> None:
    prompt, whole, at = await bench.reference.pair()
    text = bench.reference.decode(whole[at : at + 2])
    subject = await bench.plain()

    said = await bench.says(subject, ask(prompt, most=12, ignore_eos=False, stop_texts=(text,)))

    assert said == whole[: len(said)]
    assert len(said) >= at + 2


@OUTPUTS.add("Stop texts are looked for in prompt and output as one.")
async def a_stop_that_begins_in_the_prompt_ends_nothing(bench: Bench) -> None:
    reference = bench.reference
    for first in range(97, 123):
        prompt = (*PROMPT, first)
        whole = await reference.says(prompt, 8)
        text = reference.decode([first, whole[0]])
        is_apart = text not in reference.decode(whole)
        if reference.encode(text) == [first, whole[0]] and is_apart:
            break
    else:
        raise AssertionError("no prompt gives such an output")
    subject = await bench.plain()

    said = await bench.says(subject, ask(prompt, ignore_eos=False, stop_texts=(text,)))

    assert said == [one for one in whole if one not in bench.model.eos_ids][: len(said)]
    assert len(said) > 1


@OUTPUTS.add("The last token that fits ends by length, also where it is a stop, and stays.")
async def a_stop_in_the_last_place_is_not_told(bench: Bench) -> None:
    whole = await bench.reference.says(PROMPT, 2)
    subject = await bench.plain()

    told = await bench.run(
        subject, ask(most=2, ignore_eos=False, stop_token_ids=frozenset({whole[1]}))
    )

    assert told.token_ids == whole[:1]
    assert told.ended is not None
    assert told.ended.reason is EndReason.STOP_TOKEN


@OUTPUTS.add("ignore_eos switches off all stops, not only the model's end.")
async def stops_hold_where_the_end_is_ignored(bench: Bench) -> None:
    whole = await bench.reference.says(PROMPT, 8)
    stop_id = whole[4]
    subject = await bench.plain()

    said = await bench.says(subject, ask(stop_token_ids=frozenset({stop_id})))

    assert said == whole[: whole.index(stop_id)]


@OUTPUTS.add(
    "Stopping by abort() costs one abort for each request, and many of them have wedged engines.",
    habit=Habit.ABORTS_STOPS,
    fails=HANGS,
)
async def an_output_that_stops_needs_no_abort(bench: Bench) -> None:
    whole = await bench.reference.says(PROMPT, 8)
    subject = await bench.start({"name": "wedge_after_aborts", "aborts": 2})

    for _ in range(3):
        await bench.run(subject, ask(ignore_eos=False, stop_token_ids=frozenset({whole[2]})))
    await bench.serves(subject)


@OUTPUTS.add("A request may have finished without a reason.", fails="KeyError: None")
async def an_end_without_a_reason_is_an_end(bench: Bench) -> None:
    subject = await bench.start({"name": "finish_reason", "request": 2})

    assert await bench.reason(subject, ask()) is EndReason.MAX_TOKENS


@OUTPUTS.add("There are more reasons than stop and length.", fails="KeyError: 'timeout'")
async def an_end_by_the_engines_patience_is_a_failure(bench: Bench) -> None:
    subject = await bench.start({"name": "finish_reason", "request": 2, "reason": "timeout"})

    assert await bench.reason(subject, ask()) is EndReason.FAILED


# What comes back.


@OUTPUTS.add(
    "Every step yields the same object: what is kept for later has changed by then.",
    habit=Habit.QUEUES_RESULTS,
)
async def a_step_is_read_before_the_next(bench: Bench) -> None:
    await bench.serves(await bench.plain())


@OUTPUTS.add(
    "With n > 1 the differences of a step are stale for all outputs but one.",
    habit=Habit.N_OUTPUTS,
)
async def several_outputs_say_nothing_twice(bench: Bench) -> None:
    subject = await bench.plain()

    lanes = subject.submit_outputs(ask(most=5, sampling=warm(1)), 3)
    outputs = [(await bench.ended(subject, lane)).token_ids for lane in lanes]

    assert [len(output) for output in outputs] == [5, 5, 5]


@OUTPUTS.add(
    "Several outputs of the likeliest tokens are refused in one request.",
    habit=Habit.N_OUTPUTS,
    fails="ValueError: .*best_of",
)
async def several_outputs_may_be_greedy(bench: Bench) -> None:
    subject = await bench.plain()

    lanes = subject.submit_outputs(ask(), 2)
    outputs = [(await bench.ended(subject, lane)).token_ids for lane in lanes]

    assert outputs == [await bench.reference.says(PROMPT, 8)] * 2


@OUTPUTS.add("logprobs = 0 asks for none in older versions.", fails="ValueError: .*zip")
async def the_token_alone_can_be_scored(bench: Bench) -> None:
    told = await bench.run(await bench.plain(), ask(top_logprobs=0))

    assert told.logprobs == await _scores(bench)


@OUTPUTS.add("Log-probabilities may be plain numbers.", fails="TypeError: 'float'")
async def plain_scores_are_read(bench: Bench) -> None:
    subject = await bench.start({"name": "logprobs_flat", "request": 2})

    told = await bench.run(subject, ask(top_logprobs=1))

    assert told.logprobs == await _scores(bench)


@OUTPUTS.add(
    "For a moment there may be more log-probabilities than tokens.", fails="ValueError: .*zip"
)
async def a_score_too_many_belongs_to_nothing(bench: Bench) -> None:
    subject = await bench.start({"name": "logprobs_longer", "request": 2})

    told = await bench.run(subject, ask(top_logprobs=1))

    assert told.logprobs == await _scores(bench)


@OUTPUTS.add(
    "Log-probabilities that are missing are an empty list, whatever was asked for.",
    fails="ValueError: .*zip",
)
async def missing_scores_are_unknown(bench: Bench) -> None:
    subject = await bench.start({"name": "logprobs_missing", "request": 2})

    told = await bench.run(subject, ask(top_logprobs=1))

    assert len(told.token_ids) == 8
    assert all(map(math.isnan, told.logprobs))


async def _scores(bench: Bench) -> list[float]:
    """Log-probabilities of the likeliest output, as numbers of 32 bits."""
    output = await bench.reference.output(PROMPT, 8, ignore_eos=True, logprobs=1)
    pairs = zip(output.token_ids, output.logprobs, strict=True)
    return [scored[token_id].logprob for token_id, scored in pairs]


# Errors and aborts.


@OUTPUTS.add(
    "What has raised a RequestError is not finished: reading on waits for ever.",
    habit=Habit.READS_ON,
    fails=HANGS,
)
async def what_has_failed_is_not_read_again(bench: Bench) -> None:
    subject = await bench.start({"name": "request_error", "request": 2, "tokens": 3})

    assert await bench.reason(subject, ask()) is EndReason.FAILED
    await bench.serves(subject)


@OUTPUTS.add(
    "abort() returns at once, and the request goes on for a while.", habit=Habit.ENDS_AT_ABORT
)
async def a_place_is_free_when_the_engine_says_so(bench: Bench) -> None:
    subject = await bench.start({"name": "abort_ignored", "request": 2}, step_s=0.003)
    lane = subject.submit(ask(most=12))
    told = subject.told[lane]
    await bench.until(subject, lambda: told.token_ids)

    subject.abort(lane)
    await bench.ended(subject, lane)

    assert not subject.llm._executor.engine._batch.has_work()


@OUTPUTS.add("abort() raises when the engine has been shut down.", fails="AttributeError")
async def an_abort_may_come_too_late(bench: Bench) -> None:
    subject = await bench.start(step_s=0.003)
    lane = subject.submit(ask(most=100))
    await bench.until(subject, lambda: subject.told[lane].token_ids)

    await asyncio.to_thread(subject.llm.shutdown)
    subject.abort(lane)

    assert not subject.deaths


@OUTPUTS.add(
    "Salts split the prefix cache; without one, what a tenant has asked can be measured by others.",
    habit=Habit.NO_SALT,
)
async def tenants_do_not_share_the_cache(bench: Bench) -> None:
    subject = await bench.plain()
    prompt = PROMPT * 10

    async def cached(salt: bytes, *, reads: bool = True) -> int | None:
        request = ask(prompt, cache_salt=salt, reads_cache=reads)
        return (await bench.run(subject, request)).cached

    assert await cached(b"one") == 0
    assert await cached(b"two") == 0
    assert await cached(b"one") not in {0, None}
    assert await cached(b"one", reads=False) == 0
