"""The simulated model's distribution, and sampling from it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from services.worker.engine.base import Sampling, TokenScores
from services.worker.engine.sim_model import (
    SCRIPT_LIFT,
    TOP_LOGPROBS_MAX,
    Place,
    PlainText,
    ScoredRows,
    SimModel,
)
from services.worker.engine.sim_output import FIRST, INSIDE, OPENING, SimOutput
from services.worker.engine.sim_tokenizer import SimTokenizer

TOKENIZER = SimTokenizer()
OUTPUT = SimOutput(TOKENIZER)
MODEL = SimModel(TOKENIZER, OUTPUT)
BASE = 0x1234_5678_9ABC_DEF0
FREE = Sampling(temperature=1, top_p=1, top_k=0, seed=1)
PLACE = MODEL.place(BASE, 3, 400)


def draws(sampling: Sampling, count: int = 400, place: Place = PLACE) -> Counter[int]:
    return Counter(
        MODEL.draw(place, sampling, base=BASE, position=at, said={}) for at in range(count)
    )


@pytest.mark.parametrize("before", [None, ord("."), 400], ids=["opening", "first", "inside"])
@pytest.mark.parametrize("lift", [0.5, SCRIPT_LIFT])
def test_probabilities_of_the_whole_vocabulary_sum_to_1(before: int | None, lift: float) -> None:
    place = replace(MODEL.place(BASE, 5, before), lift=lift)

    logprobs = [MODEL.logprob(place, at) for at in range(TOKENIZER.vocabulary_size)]

    assert math.fsum(math.exp(logprob) for logprob in logprobs) == pytest.approx(1)
    assert max(logprobs) == logprobs[place.likeliest]


@pytest.mark.parametrize("row", [OPENING, FIRST, INSIDE])
@pytest.mark.parametrize("rank", [0, 1, 19, 20, 500])
def test_the_top_is_what_sorting_all_of_it_gives(row: int, rank: int) -> None:
    place = Place(row, OUTPUT.words(row)[rank])
    logprobs = [MODEL.logprob(place, at) for at in range(TOKENIZER.vocabulary_size)]

    ids, values = MODEL.top(place, TOP_LOGPROBS_MAX)

    assert values == sorted(logprobs, reverse=True)[:TOP_LOGPROBS_MAX]
    assert [logprobs[token_id] for token_id in ids] == values
    assert len(set(ids)) == TOP_LOGPROBS_MAX
    assert MODEL.top(place, 3) == (ids[:3], values[:3])


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    counts = draws(FREE, 4000)

    for token_id in MODEL.top(PLACE, 5)[0]:
        expected = math.exp(MODEL.logprob(PLACE, token_id))
        assert counts[token_id] / 4000 == pytest.approx(expected, abs=0.01)


def test_low_temperature_prefers_the_likeliest() -> None:
    shares = [draws(replace(FREE, temperature=value))[PLACE.likeliest] for value in (2.0, 1.0, 0.1)]

    assert shares == sorted(shares)
    assert shares[-1] > 300


@pytest.mark.parametrize("bias", [(), ((0, 0.0),)])
def test_the_lowest_temperature_there_is_takes_the_likeliest(
    bias: tuple[tuple[int, float], ...],
) -> None:
    coldest = replace(FREE, temperature=math.ulp(0), logit_bias=bias)

    assert set(draws(coldest)) == {PLACE.likeliest}


def test_top_k_keeps_so_many() -> None:
    ids, _ = MODEL.top(PLACE, 4)

    assert set(draws(replace(FREE, top_k=4))) == set(ids)


def test_top_p_keeps_the_fewest_that_hold_the_share() -> None:
    ids, values = MODEL.top(PLACE, 4)
    share = sum(math.exp(value) for value in values[:3])

    assert set(draws(replace(FREE, top_p=share - 1e-6))) == set(ids[:3])
    assert set(draws(replace(FREE, top_p=share + 1e-6), 2000)) == set(ids)


def test_min_p_keeps_what_is_likely_enough() -> None:
    ids, values = MODEL.top(PLACE, 20)
    likely = {
        token_id
        for token_id, value in zip(ids, values, strict=True)
        if math.exp(value - values[0]) >= 0.5
    }

    found = set(draws(replace(FREE, min_p=0.5), 2000))

    assert 1 < len(likely) < 20
    assert found == likely


@pytest.mark.parametrize("rank", [0, 1, 7, 900])
@pytest.mark.parametrize(
    "filters",
    [
        FREE,
        replace(FREE, temperature=0.7, top_p=0.9),
        replace(FREE, temperature=1.6, top_k=30),
        replace(FREE, min_p=0.2),
        replace(FREE, temperature=0.3, top_k=9, top_p=0.7, min_p=0.01),
        replace(FREE, top_k=2, top_p=0.99),
        replace(FREE, top_p=0.1),
    ],
)
def test_the_short_way_draws_what_the_long_way_draws(filters: Sampling, rank: int) -> None:
    """A bias of 0 changes nothing, but all of the vocabulary is looked at."""
    place = Place(INSIDE, OUTPUT.words(INSIDE)[rank])
    long_way = replace(filters, logit_bias=((0, 0.0),))
    same = sum(
        len(
            {
                MODEL.draw(place, sampling, base=BASE, position=at, said={})
                for sampling in (filters, long_way)
            }
        )
        == 1
        for at in range(300)
    )

    # At the seams between two tokens rounding may decide.
    assert same >= 299


def test_filters_act_behind_temperature() -> None:
    sharp = replace(FREE, temperature=0.1, min_p=0.5)

    assert set(draws(sharp)) == {PLACE.likeliest}


def test_control_tokens_are_never_drawn() -> None:
    bias = tuple((token_id, 100.0) for token_id in TOKENIZER.control_ids)

    assert not set(draws(replace(FREE, logit_bias=bias))) & set(TOKENIZER.control_ids)


def test_prompt_scores_depend_on_what_came_before_alone() -> None:
    prompt = list(range(300, 340))
    changed = [*prompt[:20], 500, *prompt[21:]]

    first = MODEL.prompt_scores(prompt, 0, 40, 2, 0)
    second = MODEL.prompt_scores(changed, 0, 40, 2, 0)
    part = MODEL.prompt_scores(prompt, 10, 40, 2, 0)

    assert first.logprobs[1:20] == second.logprobs[1:20]
    assert first.top_token_ids[:42] == second.top_token_ids[:42]
    assert part.logprobs == first.logprobs[10:]
    assert first.top_token_ids[:2] == [-1, -1]


def test_prompt_scores_are_those_of_a_distribution() -> None:
    """A prompt whose last token is each of the vocabulary."""
    prompt = list(range(300, 320))
    ends = range(TOKENIZER.vocabulary_size)

    shares = [
        math.exp(MODEL.prompt_scores([*prompt, token_id], 20, 21, 0, 5).logprobs[0])
        for token_id in ends
    ]
    top = MODEL.prompt_scores([*prompt, 1], 20, 21, 4, 5)

    assert math.fsum(shares) == pytest.approx(1)
    best = sorted(ends, key=lambda token_id: -shares[token_id])[:4]
    assert top.top_token_ids == best
    assert [math.exp(value) for value in top.top_logprobs] == pytest.approx(
        [shares[token_id] for token_id in best]
    )


def test_a_prompt_of_one_token_has_no_probabilities() -> None:
    scores = MODEL.prompt_scores([300], 0, 1, 2, 0)

    assert math.isnan(scores.logprobs[0])
    assert scores.top_token_ids == [-1, -1]


def test_columns_hold_what_single_tokens_have() -> None:
    bases, model_bases, counts = [BASE, BASE + 1, BASE + 2], [BASE, 77, BASE], [5, 2, None]
    steps = 60
    tokens = [OUTPUT.tokens(base, 0, steps).tolist() for base in bases]
    positions = np.arange(steps, dtype=np.uint64)[:, np.newaxis] + np.zeros(3, np.uint64)

    columns = MODEL.columns(
        PlainText(
            bases=np.array(bases, np.uint64),
            model_bases=np.array(model_bases, np.uint64),
            positions=positions,
            tokens=np.array(tokens, np.int64).T,
        ),
        counts,
    )

    for step, scores in enumerate(columns):
        rows = ScoredRows(MODEL, None, 0)
        for said, model_base, count in zip(tokens, model_bases, counts, strict=True):
            before = said[step - 1] if step else None
            rows.add(MODEL.place(model_base, step, before), said[step], count)
        single = rows.scores()
        assert single is not None
        assert scores.top_token_ids == single.top_token_ids
        assert scores.top_logprobs == pytest.approx(single.top_logprobs)
        assert scores.logprobs == pytest.approx(single.logprobs, nan_ok=True)


def test_rows_of_plain_text_come_before_the_others() -> None:
    plain = TokenScores(
        logprobs=[-1.0, math.nan],
        top_count=1,
        top_token_ids=[7, -1],
        top_logprobs=[-1.0, -math.inf],
    )
    rows = ScoredRows(MODEL, plain, 2)
    rows.add(PLACE, PLACE.likeliest, 2)
    rows.add(PLACE, PLACE.likeliest, None)

    scores = rows.scores()

    assert scores is not None
    assert scores.logprobs == pytest.approx(
        [-1.0, math.nan, MODEL.logprob(PLACE, PLACE.likeliest), math.nan], nan_ok=True
    )
    assert scores.top_token_ids == [7, -1, -1, -1, *MODEL.top(PLACE, 2)[0], -1, -1]
