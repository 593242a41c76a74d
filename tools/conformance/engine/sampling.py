"""How tokens are drawn: bias, penalties, filters, least output."""

from __future__ import annotations

from dataclasses import replace

from services.worker.engine.base import EndReason, Sampling
from tools.conformance.engine.check import (
    LOGIT_BIAS,
    MIN_OUTPUT_TOKENS,
    MIN_P,
    PENALTIES,
    REPETITION_PENALTY,
    Book,
)
from tools.conformance.engine.harness import GREEDY, Harness, ask, seeded
from tools.conformance.verdict import expect, expect_equal

SAMPLING = Book("sampling")
_PENALIZED = {"frequency": "frequency_penalty", "presence": "presence_penalty"}
_FORCED = 16
_LEAST = 40


def distinct(token_ids: list[int]) -> int:
    """How many different tokens there are."""
    return len(set(token_ids))


@SAMPLING.check(LOGIT_BIAS)
async def bias_forbids_and_forces(harness: Harness) -> None:
    """A bias of -100 keeps tokens away, one of 100 lets nothing else come."""
    free, _ = await harness.run(1, ask(_FORCED))
    banned = tuple((token_id, -100.0) for token_id in sorted(set(free)))
    forced = next(at for at in range(60, 120) if at not in free)

    without, _ = await harness.run(2, ask(_FORCED, sampling=replace(GREEDY, logit_bias=banned)))
    only, _ = await harness.run(
        3, ask(_FORCED, sampling=replace(seeded(2), logit_bias=((forced, 100.0),)))
    )

    expect(not set(without) & set(free), "a forbidden token came")
    expect(only == [forced] * _FORCED, "another token than the forced one came")


@SAMPLING.cases(_PENALIZED, PENALTIES)
async def penalties_make_more_or_fewer_different_tokens(harness: Harness, name: str) -> None:
    """Over three seeds: fewer different tokens with -2 than with 0, more with 2."""
    counts: dict[float, int] = {}
    lanes: dict[int, float] = {}
    for penalty in (-2.0, 0.0, 2.0):
        for seed in range(3):
            drawn = replace(seeded(seed), top_k=40)
            lane = len(lanes)
            lanes[lane] = penalty
            harness.submit(lane, ask(80, sampling=_with(drawn, name, penalty)))
    await harness.until_ended(*lanes)
    for lane, penalty in lanes.items():
        counts[penalty] = counts.get(penalty, 0) + distinct(harness.told[lane].token_ids)

    expect(
        counts[-2.0] < counts[0.0] < counts[2.0],
        f"different tokens with -2, 0 and 2: {counts[-2.0]}, {counts[0.0]}, {counts[2.0]}",
    )


def _with(sampling: Sampling, name: str, penalty: float) -> Sampling:
    if name == "frequency_penalty":
        return replace(sampling, frequency_penalty=penalty)
    return replace(sampling, presence_penalty=penalty)


@SAMPLING.check(REPETITION_PENALTY)
async def repetition_penalty_keeps_off_what_was_there(harness: Harness) -> None:
    """Above 1 there are more different tokens, below 1 fewer."""
    base = replace(seeded(6), top_k=40)
    free, _ = await harness.run(1, ask(80, sampling=base))

    averse, _ = await harness.run(2, ask(80, sampling=replace(base, repetition_penalty=5.0)))
    fond, _ = await harness.run(3, ask(80, sampling=replace(base, repetition_penalty=0.3)))

    found = (distinct(fond), distinct(free), distinct(averse))
    expect(found[0] < found[1] < found[2], f"different tokens with 0.3, 1 and 5: {found}")


@SAMPLING.check()
async def filters_that_leave_one_token_leave_the_likeliest(harness: Harness) -> None:
    """A top_k of 1 and a tiny top_p are temperature 0."""
    greedy, _ = await harness.run(1, ask(16))

    by_count, _ = await harness.run(2, ask(16, sampling=replace(seeded(5), top_k=1)))
    by_share, _ = await harness.run(3, ask(16, sampling=replace(seeded(5), top_p=1e-6)))

    harness.expect_same(by_count, greedy, "top_k 1")
    harness.expect_same(by_share, greedy, "a tiny top_p")


@SAMPLING.check()
async def a_temperature_is_no_temperature_0(harness: Harness) -> None:
    """With every other setting left as it is, temperature 1 is left to chance."""
    greedy, _ = await harness.run(1, ask(60))

    drawn = [(await harness.run(lane, ask(60, sampling=seeded(lane))))[0] for lane in (2, 3)]

    expect(any(output != greedy for output in drawn), "temperature 1 said what temperature 0 said")


@SAMPLING.check(MIN_P)
async def min_p_of_1_leaves_the_likeliest(harness: Harness) -> None:
    """A min_p of 1 is temperature 0."""
    greedy, _ = await harness.run(1, ask(16))

    filtered, _ = await harness.run(2, ask(16, sampling=replace(seeded(5), min_p=1.0)))

    harness.expect_same(filtered, greedy, "min_p 1")


@SAMPLING.check(MIN_OUTPUT_TOKENS)
async def the_end_of_sequence_waits_for_the_least_tokens(harness: Harness) -> None:
    """The model's own end does not come before the least output, and changes nothing before."""
    for seed in range(4):
        free = ask(90, sampling=seeded(seed), ignore_eos=False)
        whole, _ = await harness.run(seed, free)

        longer, ended = await harness.run(10 + seed, replace(free, min_output_tokens=_LEAST))

        expect(len(longer) >= _LEAST, f"{len(longer)} tokens, least were {_LEAST}")
        shared = min(len(whole), len(longer))
        harness.expect_same(longer[:shared], whole[:shared], "what came before the end")
        expect(
            ended.reason in {EndReason.END_OF_SEQUENCE, EndReason.MAX_TOKENS},
            "it ended in another way",
        )


@SAMPLING.check(MIN_OUTPUT_TOKENS)
async def the_least_tokens_count_a_continuation_in(harness: Harness) -> None:
    """Behind a continuation as long as the least output, the model may end at once."""
    lengths = []
    for seed in range(4):
        request = ask(90, sampling=seeded(seed), ignore_eos=False)
        whole, ended = await harness.run(seed, request)
        if ended.reason is not EndReason.END_OF_SEQUENCE or not whole:
            continue
        least = replace(request, min_output_tokens=len(whole), continue_ids=tuple(whole[:-1]))
        rest, _ = await harness.run(10 + seed, least)
        lengths.append(len(rest))

    expect_equal([length for length in lengths if length < 1], [], "outputs below the least")
