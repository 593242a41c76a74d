"""Log-probabilities of outputs and prompts."""

from __future__ import annotations

import math
from dataclasses import replace

from services.worker.engine.base import Sampling
from tools.conformance.engine.check import (
    LOGIT_BIAS,
    LOGPROBS,
    PROMPT_LOGPROBS,
    THREE_LOGPROBS,
    TOP_LOGPROBS,
    Book,
)
from tools.conformance.engine.harness import GREEDY, LONG_PROMPT, Harness, ask, seeded
from tools.conformance.verdict import CannotShow, expect, expect_equal

SCORES = Book("scores")
_CLOSE = 1e-3
_ROUNDING = 1e-4
_SAMPLINGS = {"greedy": GREEDY, "seeded": seeded(4)}


def is_close(left: dict[int, float], right: dict[int, float]) -> bool:
    """Whether two rows have the same alternatives with about the same values."""
    return left.keys() == right.keys() and all(
        math.isclose(left[token_id], right[token_id], abs_tol=_CLOSE) for token_id in left
    )


@SCORES.check(LOGPROBS)
async def log_probabilities_are_those_of_a_distribution(harness: Harness) -> None:
    """Alternatives come best first, sum to at most 1, and agree with the token's own."""
    most = harness.info.abilities.max_top_logprobs or 0
    request = replace(ask(20, sampling=seeded(3)), top_logprobs=most)

    token_ids, _ = await harness.run(1, request)

    told = harness.told[1]
    expect(len(told.logprobs) == len(told.tops) == len(token_ids) == 20, "a row is missing")  # noqa: PLR2004
    for token_id, logprob, top in zip(token_ids, told.logprobs, told.tops, strict=True):
        values = list(top.values())
        expect_equal(len(values), most, "alternatives")
        expect(values == sorted(values, reverse=True), "alternatives are not best first")
        expect(sum(math.exp(value) for value in values) <= 1 + _ROUNDING, "they sum to above 1")
        expect(not values or logprob <= values[0] + _ROUNDING, "the token is above the best")
        if token_id in top:
            expect(
                math.isclose(logprob, top[token_id], abs_tol=_CLOSE),
                "a token and the same alternative differ",
            )


@SCORES.check(TOP_LOGPROBS)
async def temperature_0_takes_the_likeliest(harness: Harness) -> None:
    """At temperature 0 each token is the first of its alternatives."""
    token_ids, _ = await harness.run(1, replace(ask(20), top_logprobs=1))

    likeliest = [next(iter(top)) for top in harness.told[1].tops]
    expect(likeliest == token_ids, "a token at temperature 0 is not the likeliest")


@SCORES.cases(_SAMPLINGS, LOGPROBS)
async def asking_for_log_probabilities_changes_no_token(
    harness: Harness, sampling: Sampling
) -> None:
    """An output with scores is the output without them."""
    plain, _ = await harness.run(1, ask(24, sampling=sampling))

    scored, _ = await harness.run(2, replace(ask(24, sampling=sampling), top_logprobs=0))

    told = harness.told[2]
    harness.expect_same(scored, plain, "the output with scores")
    expect_equal(len(told.logprobs), len(scored), "log-probabilities")
    expect(all(logprob <= 0 for logprob in told.logprobs), "a log-probability is no number <= 0")
    expect(not any(told.tops), "alternatives came that nobody asked for")


@SCORES.check(THREE_LOGPROBS)
async def each_lane_gets_the_alternatives_that_it_asked_for(harness: Harness) -> None:
    """None, three and one, side by side in one batch."""
    counts = {1: None, 2: 3, 3: 1}
    for lane, count in counts.items():
        harness.submit(lane, replace(ask(10), top_logprobs=count))

    await harness.until_ended(*counts)

    for lane, count in counts.items():
        told = harness.told[lane]
        rows = list(zip(told.tops, told.logprobs, strict=True))
        expect(all(len(top) == (count or 0) for top, _ in rows), "too many or few alternatives")
        unscored = {math.isnan(value) for _, value in rows}
        expect(unscored <= {count is None}, "scores are not where they were asked for")
        expect(count is None or len(rows) == 10, "a row has no scores")  # noqa: PLR2004


@SCORES.check(PROMPT_LOGPROBS)
async def prompts_have_log_probabilities_from_the_second_token_on(harness: Harness) -> None:
    """The whole prompt is scored, in order, though it stands in the cache."""
    request = replace(ask(3, prompt=LONG_PROMPT), top_logprobs=2, prompt_logprobs=True)
    await harness.run(1, ask(1, prompt=LONG_PROMPT))

    await harness.run(2, request)

    logprobs: list[float] = []
    for part in harness.told[2].prompt:
        expect_equal(part.offset, len(logprobs), "place of a part")
        wanted = part.scores.top_count * len(part.scores.logprobs)
        expect_equal(len(part.scores.top_token_ids), wanted, "alternatives of a part")
        logprobs += part.scores.logprobs
    expect_equal(len(logprobs), len(LONG_PROMPT), "scores of the prompt")
    expect(math.isnan(logprobs[0]), "the first token has a score")
    expect(all(-100 < value <= 0 for value in logprobs[1:]), "a score is no log-probability")  # noqa: PLR2004
    expect_equal(harness.told[2].cached_tokens, 0, "cached tokens")


@SCORES.check(LOGIT_BIAS, TOP_LOGPROBS)
async def log_probabilities_are_told_before_bias(harness: Harness) -> None:
    """A forbidden token keeps its place among the alternatives."""
    free, _ = await harness.run(1, replace(ask(1), top_logprobs=1))
    sampling = replace(GREEDY, logit_bias=((free[0], -100.0),))

    await harness.run(2, replace(ask(1, sampling=sampling), top_logprobs=1))

    first, second = harness.told[1].tops[0], harness.told[2].tops[0]
    if not is_close(second, first) and not harness.row.is_repeatable:
        raise CannotShow("alternatives differ, and this engine does not promise that they do not")
    expect(is_close(second, first), "bias changed the alternatives")
