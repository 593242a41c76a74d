"""What the llamacpp engine does of the whole request, on the small model and against numpy."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
import pytest_asyncio
from llguidance import LLMatcher

from services.worker.engine.base import (
    Constraint,
    ConstraintKind,
    EndReason,
    Sampling,
)
from tests.integration.services.worker.engine.llamacpp_bench import (
    CAPACITY,
    DRAWN,
    GREEDY,
    MODEL,
    STORY,
    TOKENIZER,
    TOLERANCE,
    Bench,
    Told,
    ask,
    running_bench,
    text_of,
)
from tests.integration.services.worker.engine.llamacpp_reference import Reference

# One engine for the whole module; every test uses salts of its own.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench() -> AsyncIterator[Bench]:
    async with running_bench() as bench:
        yield bench


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(MODEL)


# Log-probabilities.


async def test_log_probabilities_are_the_model_s(bench: Bench, reference: Reference) -> None:
    (told,) = await bench.run(ask(top_logprobs=5))

    expected = reference.logprobs((*STORY, *told.ids))[len(STORY) - 1 :]
    assert len(told.logprobs) == 12
    for place, token_id in enumerate(told.ids):
        assert told.logprobs[place] == pytest.approx(expected[place, token_id], abs=TOLERANCE)
        assert len(told.tops[place]) == 5
        assert list(told.tops[place].values()) == sorted(told.tops[place].values(), reverse=True)
        # Greedy takes the first of them.
        assert next(iter(told.tops[place].items())) == (token_id, told.logprobs[place])
        for top, value in told.tops[place].items():
            assert value == pytest.approx(expected[place, top], abs=2 * TOLERANCE)


async def test_asking_for_log_probabilities_changes_no_token(bench: Bench) -> None:
    plain, scored, beside = await bench.run(
        ask(40, DRAWN), ask(40, DRAWN, top_logprobs=20), ask(40, DRAWN)
    )

    assert plain.ids == scored.ids == beside.ids
    assert not any(plain.tops)
    assert all(np.isnan(value) for value in plain.logprobs)
    assert not any(np.isnan(value) for value in scored.logprobs)


async def test_log_probabilities_do_not_see_temperature_penalties_bias_or_constraint(
    bench: Bench,
) -> None:
    odd = Sampling(
        temperature=2,
        top_p=0.5,
        top_k=7,
        seed=3,
        presence_penalty=2,
        repetition_penalty=3,
        logit_bias=((300, 90.0),),
    )
    plain, changed = await bench.run(ask(1, top_logprobs=20), ask(1, odd, top_logprobs=20))

    assert changed.tops == plain.tops
    assert changed.ids == [300]
    assert changed.logprobs[0] < plain.logprobs[0]


async def test_a_prompt_s_log_probabilities_come_before_its_output(
    bench: Bench, reference: Reference
) -> None:
    # Longer than what one step may score, and asked for twice: the cache is not read.
    prompt = tuple(TOKENIZER.encode("The fox ran through the snow. " * 25, parse_special=False))
    request = ask(3, prompt_ids=prompt, prompt_logprobs=True, top_logprobs=2, cache_salt=b"scored")
    await bench.run(request)

    (told,) = await bench.run(request)

    expected = reference.logprobs(prompt)
    assert told.cached == 0
    assert len(told.prompt) > 2
    values = [value for part in told.prompt for value in part.scores.logprobs]
    assert len(values) == len(prompt)
    assert np.isnan(values[0])
    errors = [
        abs(value - expected[place - 1, prompt[place]])
        for place, value in enumerate(values)
        if place
    ]
    assert np.mean(errors) < TOLERANCE / 2
    assert [part.offset for part in told.prompt] == list(
        np.cumsum([0] + [len(part.scores.logprobs) for part in told.prompt[:-1]])
    )


# Sampling.


async def test_penalties_and_bias_change_tokens_as_they_say(bench: Bench) -> None:
    (plain,) = await bench.run(ask(120))
    often = max(set(plain.ids), key=plain.ids.count)
    forbidden, penalised, loved, repeated = await bench.run(
        ask(120, replace(GREEDY, logit_bias=((often, -100.0),))),
        ask(120, replace(GREEDY, frequency_penalty=2, presence_penalty=2)),
        ask(120, replace(GREEDY, frequency_penalty=-2, presence_penalty=-2)),
        ask(120, replace(GREEDY, repetition_penalty=1.5)),
    )

    assert plain.ids.count(often) > 3
    assert often not in forbidden.ids
    different = [len(set(told.ids)) for told in (penalised, plain, loved)]
    assert different[0] > different[1] > different[2]
    assert len(set(repeated.ids) - set(STORY)) > len(set(plain.ids) - set(STORY))


async def test_a_continued_lane_is_penalised_for_what_it_said_elsewhere(bench: Bench) -> None:
    sampling = replace(DRAWN, frequency_penalty=1.5, repetition_penalty=1.2)
    (whole,) = await bench.run(ask(40, sampling))

    (rest,) = await bench.run(ask(40, sampling, continue_ids=tuple(whole.ids[:23])))

    assert rest.ids == whole.ids[23:]


async def test_min_p_leaves_only_what_is_likely_enough(bench: Bench) -> None:
    hot = replace(DRAWN, temperature=2, top_p=1)
    sampled, told = await bench.run(
        ask(60, hot, top_logprobs=1), ask(60, replace(hot, min_p=0.3), top_logprobs=1)
    )

    def least(lane: Told) -> float:
        # At temperature 2 a share of 0.3 is 2 * ln 0.3 in the model's own logits.
        gaps = [
            value - max(top.values()) for value, top in zip(lane.logprobs, lane.tops, strict=True)
        ]
        return min(gaps)

    assert least(told) >= 2 * np.log(0.3) - 1e-3
    assert least(sampled) < 2 * np.log(0.3)


async def test_the_end_comes_no_sooner_than_asked(bench: Bench) -> None:
    end = TOKENIZER.encode("<|im_end|>", parse_special=True)
    loves_end = replace(GREEDY, logit_bias=tuple((token, 100.0) for token in end))

    now, later = await bench.run(
        ask(50, loves_end, ignore_eos=False),
        ask(50, loves_end, ignore_eos=False, min_output_tokens=20),
    )

    assert (len(now.ids), len(later.ids)) == (0, 20)
    for told in (now, later):
        assert told.ended is not None
        assert told.ended.reason is EndReason.END_OF_SEQUENCE


# Constraints.


SCHEMA = {
    "x-guidance": {"whitespace_flexible": False},
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}


def constraint_of(kind: ConstraintKind, grammar: str) -> Constraint:
    return Constraint(kind=kind, source="", grammar=grammar)


CONSTRAINED = {
    "schema": (
        constraint_of(
            ConstraintKind.JSON_SCHEMA, LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA))
        ),
        r'\{"name":"[^"]{0,8}","n":[0-9]{1,2}\}',
    ),
    "regex": (
        constraint_of(ConstraintKind.REGEX, LLMatcher.grammar_from_regex("(yes|no){2}")),
        "(yes|no){2}",
    ),
    "lark": (
        constraint_of(
            ConstraintKind.GRAMMAR, LLMatcher.grammar_from_lark('start: "a" /[0-9]{3}/ "z"')
        ),
        "a[0-9]{3}z",
    ),
}


@pytest.mark.parametrize("name", CONSTRAINED)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, replace(DRAWN, temperature=2, top_p=1)])
async def test_a_constrained_output_is_what_it_has_to_be(
    bench: Bench, name: str, sampling: Sampling
) -> None:
    constraint, pattern = CONSTRAINED[name]
    request = ask(120, sampling, constraint=constraint, ignore_eos=False)

    told, beside, plain = await bench.run(
        request, replace(request, ignore_eos=True, min_output_tokens=100), ask(20, DRAWN)
    )

    for lane in (told, beside):
        assert lane.ended is not None
        assert lane.ended.reason is EndReason.END_OF_SEQUENCE
        assert re.fullmatch(pattern, text_of(lane.ids))
    assert plain.ids == (await bench.run(ask(20, DRAWN)))[0].ids


async def test_a_constraint_that_does_not_compile_fails_its_lane_alone(bench: Bench) -> None:
    bad, good = await bench.run(
        ask(constraint=constraint_of(ConstraintKind.REGEX, "no grammar {")), ask()
    )

    assert bad.ended is not None
    assert (bad.ended.reason, bad.ids) == (EndReason.FAILED, [])
    assert "no grammar" not in bad.ended.message
    assert good.ended is not None
    assert good.ended.reason is EndReason.MAX_TOKENS


# The prefix cache.


async def test_the_same_salt_finds_a_prompt_and_another_does_not(bench: Bench) -> None:
    first, again, other, unread = [
        (await bench.run(request))[0]
        for request in (
            ask(30, DRAWN, cache_salt=b"one"),
            ask(30, DRAWN, cache_salt=b"one"),
            ask(30, DRAWN, cache_salt=b"two"),
            ask(30, DRAWN, cache_salt=b"one", reads_cache=False),
        )
    ]

    assert [told.cached for told in (first, again, other, unread)] == [0, len(STORY) - 1, 0, 0]
    assert first.ids == again.ids == other.ids == unread.ids


@pytest.mark.parametrize("length", [20, 131, 300])
async def test_tokens_are_the_same_behind_a_cached_prefix_of_any_length(
    bench: Bench, length: int
) -> None:
    """In the slot of the first, and copied from it while it runs."""
    rng = np.random.default_rng(length)
    prompt = tuple(rng.integers(16, 2000, length).tolist())
    (whole,) = await bench.run(ask(40, DRAWN, prompt_ids=prompt, cache_salt=b"whole"))
    salt = b"part %d" % length
    running = bench.submit(ask(90, DRAWN, prompt_ids=(*prompt[: length - 3], 77), cache_salt=salt))
    while bench.told[running].cached is None:
        await bench.step()

    (copied,) = await bench.run(ask(40, DRAWN, prompt_ids=prompt, cache_salt=salt))
    (reused,) = await bench.run(ask(40, DRAWN, prompt_ids=prompt, cache_salt=salt))
    while bench.told[running].ended is None:
        await bench.step()

    assert (copied.cached, reused.cached) == (length - 3, length - 1)
    assert copied.ids == reused.ids == whole.ids


async def test_a_prefix_is_copied_whole_though_its_slot_is_taken_in_the_same_step(
    bench: Bench,
) -> None:
    rng = np.random.default_rng(9)
    prompts = [tuple(rng.integers(16, 2000, 100).tolist()) for _ in range(CAPACITY)]
    follower = (*prompts[0][:40], 55)
    (alone,) = await bench.run(ask(20, DRAWN, prompt_ids=follower, cache_salt=b"alone"))
    await bench.run(ask(20, DRAWN, prompt_ids=prompts[0], cache_salt=b"taken"))

    told = await bench.run(
        ask(20, DRAWN, prompt_ids=follower, cache_salt=b"taken"),
        *(ask(20, DRAWN, prompt_ids=prompt, cache_salt=b"x") for prompt in prompts[1:]),
    )

    assert told[0].cached == 40
    assert told[0].ids == alone.ids


# Order, and death.


async def test_lanes_in_the_background_start_behind_all_others(bench: Bench) -> None:
    first = [bench.submit(ask(30 + lane)) for lane in range(CAPACITY)]
    behind = bench.submit(ask(5, is_background=True))
    later = [bench.submit(ask(5)) for _ in range(3)]
    while any(bench.told[lane].ended is None for lane in (*first, behind, *later)):
        await bench.step()

    assert bench.order[-4:] == [*later, behind]
