"""Pitfalls of requests: the call, and what is drawn."""

from __future__ import annotations

from dataclasses import replace

from services.worker.engine.base import EndReason
from tests.integration.services.worker.engine.trtllm_habits import Habit
from tests.integration.services.worker.engine.trtllm_pitfall import Pitfalls
from tests.integration.services.worker.engine.trtllm_subjects import (
    GREEDY,
    NEW,
    NEWEST,
    PROMPT,
    Bench,
    ask,
    warm,
)

CALLS = Pitfalls()
_SEEDS = (1, 2, 3)

# The call.


@CALLS.add(
    "The order of arguments differs between versions: only names are safe.",
    habit=Habit.BY_PLACE,
    fails="TypeError: .*by name",
)
async def arguments_are_given_by_name(bench: Bench) -> None:
    await bench.serves(await bench.plain())


@CALLS.add(
    "Arguments come and go between versions, and unknown ones are refused.",
    habit=Habit.NEWEST,
    fails="TypeError: .*priority",
)
async def only_arguments_that_are_there_are_given(bench: Bench) -> None:
    subject = await bench.plain()

    said = await bench.says(subject, ask(most=6, is_background=True))

    assert said == await bench.reference.says(PROMPT, 6)


@CALLS.add(
    "SamplingParams are filled in by the call, so one object cannot serve two requests.",
    habit=Habit.SHARED_PARAMS,
    fails="AssertionError: .*changed in use",
)
async def parameters_are_made_anew_for_each_request(bench: Bench) -> None:
    subject = await bench.plain()

    await bench.serves(subject)
    await bench.serves(subject)


@CALLS.add(
    "Token ids have to be a list of Python's own ints.",
    habit=Habit.NUMPY,
    fails="TypeError: .*list of int",
)
async def token_ids_are_plain_ints(bench: Bench) -> None:
    await bench.serves(await bench.plain())


@CALLS.add("A text as prompt is tokenised once more, with a begin token.", habit=Habit.TEXT)
async def prompts_are_token_ids(bench: Bench) -> None:
    subject = await bench.plain()
    prompt = (33, 72)

    assert await bench.says(subject, ask(prompt)) == await bench.reference.says(prompt, 8)


@CALLS.add(
    "All requests have to come from one event loop on one thread; wake-ups are lost otherwise.",
    habit=Habit.LOOP_EACH,
    fails="AssertionError: .*one event loop",
)
async def one_loop_on_one_thread_makes_all_requests(bench: Bench) -> None:
    subject = await bench.plain()

    await bench.serves(subject)
    await bench.serves(subject)


@CALLS.add(
    "What was called without a running event loop cannot be awaited.",
    habit=Habit.CALL_IN_THREAD,
    fails="AssertionError: .*not present during initialization",
)
async def requests_are_made_where_they_are_read(bench: Bench) -> None:
    await bench.serves(await bench.plain())


@CALLS.add(
    "The call itself raises what is wrong with one request, as one of several errors.",
    fails="ValueError: this request is refused",
)
async def an_error_of_the_call_fails_one_request(bench: Bench) -> None:
    kinds = ("ValueError", "TypeError", "NotImplementedError", "RequestError")
    faults = [
        {"name": "call_error", "request": number, "type": kind}
        for number, kind in enumerate(kinds, start=2)
    ]
    subject = await bench.start(*faults)

    for _ in kinds:
        assert await bench.reason(subject, ask()) is EndReason.FAILED
    await bench.serves(subject)


@CALLS.add(
    "Without chunked prefill a prompt longer than a step is refused: by ValueError, or by "
    "RequestError in newer versions.",
    fails="RequestError",
)
async def a_prompt_that_is_too_long_for_a_step_fails_alone(bench: Bench) -> None:
    section = {"batching": {"chunked_prefill": False, "max_num_tokens": 64}}
    subject = await bench.start(version=NEW, section=section)

    assert await bench.reason(subject, ask(PROMPT * 20)) is EndReason.FAILED
    await bench.serves(subject)


@CALLS.add(
    "A prompt that leaves no room for output is an error, and has hung or ended older engines."
)
async def a_prompt_that_fills_the_context_never_gets_there(bench: Bench) -> None:
    subject = await bench.plain()

    reason = await bench.reason(subject, ask((PROMPT * 110)[:512]))

    assert reason is EndReason.CONTEXT_FULL


# What is drawn.


@CALLS.add("max_tokens is 32 unless it is set.", habit=Habit.NO_LENGTH)
async def an_output_is_as_long_as_it_may_be(bench: Bench) -> None:
    assert len(await bench.says(await bench.plain(), ask(most=40))) == 40


@CALLS.add(
    "Memory is set aside for all of max_tokens: with too large a one, requests run one by one.",
    habit=Habit.NO_LIMIT,
)
async def room_is_taken_for_what_was_asked_only(bench: Bench) -> None:
    subject = await bench.start(section={"kv_cache": {"max_tokens": 512}})

    first, second = (subject.submit(ask(most=40)) for _ in range(2))
    await bench.ended(subject, second)

    assert subject.journal.index(("begun", second)) < subject.journal.index(("ended", first))


@CALLS.add(
    "Without temperature, top_p and top_k it takes the likeliest token: 1 is no default.",
    habit=Habit.ONLY_WHAT_DIFFERS,
)
async def a_temperature_of_1_draws(bench: Bench) -> None:
    subject = await bench.plain()

    outputs = [await bench.says(subject, ask(sampling=warm(seed))) for seed in _SEEDS]

    assert outputs != [await bench.reference.says(PROMPT, 8)] * len(_SEEDS)


@CALLS.add("Without a seed every request has the same one.", habit=Habit.NO_SEED)
async def seeds_make_a_difference(bench: Bench) -> None:
    subject = await bench.plain()

    outputs = [await bench.says(subject, ask(sampling=warm(seed), most=20)) for seed in _SEEDS]

    assert outputs[0] != outputs[1] != outputs[2] != outputs[0]
    assert outputs[0] == await bench.says(subject, ask(sampling=warm(_SEEDS[0]), most=20))


@CALLS.add(
    "top_k = -1 is refused: 0 stands for all.",
    habit=Habit.ALL_IS_MINUS_ONE,
    fails="ValueError: .*top_k",
)
async def all_tokens_may_be_drawn(bench: Bench) -> None:
    assert len(await bench.says(await bench.plain(), ask(sampling=warm(1)))) == 8


@CALLS.add("Older versions take penalties and leave them out in silence.")
async def penalties_are_promised_where_they_work(bench: Bench) -> None:
    for version in ("1.2.1", NEWEST):
        subject = await bench.start(version=version)
        if subject.abilities.penalties:
            averse = replace(GREEDY, frequency_penalty=2.0)
            free = await bench.says(subject, ask(most=60))
            assert await bench.says(subject, ask(sampling=averse, most=60)) != free
        else:
            assert version != NEWEST


@CALLS.add("Penalties count the prompt, unless they are told how long it is.")
async def penalties_count_the_output_only(bench: Bench) -> None:
    subject = await bench.start(version=NEWEST)
    first = (await bench.reference.says(PROMPT, 1))[0]
    prompt = (first, *PROMPT)
    averse = replace(GREEDY, presence_penalty=2.0)

    assert await bench.says(subject, ask(prompt, most=1, sampling=averse)) == [first]


@CALLS.add("min_tokens counts the prompt, too, in older versions.")
async def a_least_length_is_promised_where_it_is_kept(bench: Bench) -> None:
    prompt, said = await bench.reference.ending(bench.model.eos_id)
    long_prompt = (*PROMPT * 8, *prompt)
    for version in ("1.2.1", NEWEST):
        subject = await bench.start(version=version)
        if subject.abilities.min_output_tokens:
            least = len(said) + 3
            request = ask(long_prompt, most=40, ignore_eos=False, min_output_tokens=least)
            assert len(await bench.says(subject, request)) >= least
        else:
            assert version != NEWEST


@CALLS.add("min_tokens holds back one end of the model only, where it has several.")
async def no_end_comes_before_the_least_length(bench: Bench) -> None:
    prompt, said = await bench.reference.ending(bench.model.eos_ids[1])
    subject = await bench.start(version=NEWEST)
    least = len(said) + 3

    output = await bench.says(
        subject, ask(prompt, most=40, ignore_eos=False, min_output_tokens=least)
    )

    assert len(output) >= least


@CALLS.add(
    "Speculation by layers of the model itself takes the likeliest token, whatever is asked for."
)
async def speculation_draws_as_it_is_asked(bench: Bench) -> None:
    section = {"speculative": {"kind": "mtp", "tokens": 1}}
    subject = await bench.start(version=NEW, section=section)

    outputs = [await bench.says(subject, ask(sampling=warm(seed), most=20)) for seed in _SEEDS]

    assert any(output != outputs[0] for output in outputs)
