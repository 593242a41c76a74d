"""Drawing tokens from logits, against a plain reference and against its own promises."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from services.worker.engine.base import Sampling
from services.worker.engine.llamacpp_sampling import (
    NO_ID,
    Sampler,
    heaviest,
    streams_of,
    uniform,
)

SIZE = 300
Floats = npt.NDArray[np.float32]

KINDS = [
    Sampling(temperature=0, top_p=1, top_k=0, seed=1),
    Sampling(temperature=1, top_p=1, top_k=0, seed=2),
    Sampling(temperature=0.7, top_p=1, top_k=20, seed=3),
    Sampling(temperature=1.3, top_p=0.9, top_k=0, seed=4),
    Sampling(temperature=0.9, top_p=0.8, top_k=50, seed=5),
    Sampling(temperature=2, top_p=0.5, top_k=SIZE + 10, seed=2**64 - 1),
    Sampling(temperature=1, top_p=0.9, top_k=1, seed=7),
    Sampling(temperature=1, top_p=0, top_k=0, seed=8),
    Sampling(temperature=1e-9, top_p=0.99, top_k=0, seed=9),
    Sampling(temperature=1.5, top_p=1, top_k=0, seed=10, min_p=0.2),
    Sampling(temperature=0.9, top_p=0.8, top_k=50, seed=11, min_p=0.1),
    Sampling(temperature=1.3, top_p=0.9, top_k=0, seed=12, min_p=0.05),
    Sampling(temperature=1, top_p=1, top_k=20, seed=13, min_p=0.5),
]


def rows_of(count: int, *, seed: int, size: int = SIZE, steps: int | None = None) -> Floats:
    """Random logits; with steps, rounded so that many are equal."""
    logits = np.random.default_rng(seed).normal(0, 3, (count, size))
    if steps is not None:
        logits = np.round(logits * steps) / steps
    return logits.astype(np.float32)


def reference(logits: Floats, sampling: Sampling, number: float) -> int:
    """The rule as the module states it, in the plainest way."""
    scale = max(sampling.temperature, 1e-6)
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    if sampling.temperature == 0 or sampling.top_p == 0:
        return order[0]
    weight = {
        token: float(np.exp(np.float32(logits[token] - logits.max()) * np.float32(1 / scale)))
        for token in order
    }
    kept = order[: sampling.top_k or None]
    total = sum(weight[token] for token in kept)
    nucleus: list[int] = []
    reached = 0.0
    for token in kept:
        if sampling.top_p < 1 and nucleus and reached >= sampling.top_p * total:
            break
        nucleus.append(token)
        reached += weight[token]
    nucleus = [token for token in nucleus if weight[token] >= np.float32(sampling.min_p)]
    reached = sum(weight[token] for token in nucleus)
    running = 0.0
    for token in sorted(nucleus):
        running += weight[token]
        if running > number * reached:
            return token
    return max(nucleus)


@pytest.mark.parametrize("steps", [None, 2], ids=["distinct", "ties"])
@pytest.mark.parametrize("sampling", KINDS, ids=str)
def test_draws_what_the_rule_says(sampling: Sampling, steps: int | None) -> None:
    logits = rows_of(40, seed=11, steps=steps)
    positions = np.arange(40)
    numbers = uniform(streams_of([sampling.seed] * 40), positions)

    got = Sampler([sampling] * 40, SIZE).draw(logits, positions).tolist()

    assert got == [
        reference(row, sampling, number) for row, number in zip(logits, numbers, strict=True)
    ]


def test_a_row_draws_the_same_alone_and_in_company() -> None:
    logits = rows_of(len(KINDS) * 3, seed=12)
    samplings = KINDS * 3
    positions = np.arange(len(samplings)) * 5

    together = Sampler(samplings, SIZE).draw(logits, positions)

    alone = [
        Sampler([sampling], SIZE).draw(logits[row : row + 1], positions[row : row + 1])[0]
        for row, sampling in enumerate(samplings)
    ]
    assert together.tolist() == alone


def test_the_logits_are_not_changed() -> None:
    logits = rows_of(len(KINDS), seed=13)
    before = logits.copy()

    Sampler(KINDS, SIZE).draw(logits, np.zeros(len(KINDS), np.int64))

    assert (logits == before).all()


def test_frequencies_follow_the_probabilities() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    count = 20_000
    sampler = Sampler([Sampling(temperature=1, top_p=1, top_k=0, seed=42)] * count, 4)

    ids = sampler.draw(np.tile(row, (count, 1)), np.arange(count))

    shares = np.bincount(ids, minlength=4) / count
    assert np.abs(shares - [0.5, 0.3, 0.15, 0.05]).max() < 0.015


def test_numbers_are_a_function_of_seed_and_position_alone() -> None:
    """The values are written down: a change would break every continuation after an upgrade."""
    seeds, positions = [0, 1, 2**64 - 1, 0], np.array([0, 0, 0, 1])

    got = uniform(streams_of(seeds), positions)

    assert got.tolist() == FIRST_NUMBERS
    assert uniform(streams_of([1]), np.array([0])).tolist() == [FIRST_NUMBERS[1]]


def test_numbers_of_neighbouring_seeds_and_positions_are_spread_evenly() -> None:
    seeds, positions = np.divmod(np.arange(10_000), 100)

    numbers = uniform(streams_of(seeds.tolist()), positions)

    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(set(numbers.tolist())) == 10_000
    shares = np.bincount((numbers * 10).astype(int)) / 10_000
    assert np.abs(shares - 0.1).max() < 0.015


def test_a_row_without_finite_logits_draws_no_token_and_harms_no_other() -> None:
    logits = rows_of(4, seed=14)
    sampling = Sampling(temperature=1, top_p=0.9, top_k=0, seed=3)
    sound = Sampler([sampling] * 4, SIZE).draw(logits, np.arange(4)).tolist()
    logits[1] = np.nan
    logits[2] = -np.inf

    got = Sampler([sampling] * 4, SIZE).draw(logits, np.arange(4)).tolist()

    assert got == [sound[0], NO_ID, NO_ID, sound[3]]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.full((200, 50), -np.inf, np.float32)
    logits[:, [7, 31]] = 0

    for kind in KINDS:
        ids = Sampler([kind] * 200, 50).draw(logits, np.arange(200))
        assert set(ids.tolist()) <= {7, 31}


@pytest.mark.parametrize("count", [1, 3, 49, 50])
def test_heaviest_prefers_lower_ids_among_equals(count: int) -> None:
    logits = np.random.default_rng(15).integers(0, 4, (30, 50)).astype(np.float32)

    got = heaviest(logits, count)

    for row, ids in zip(logits, got, strict=True):
        ranked = sorted(range(50), key=lambda token: (-row[token], token))
        assert ids.tolist() == sorted(ranked[:count])


FIRST_NUMBERS = [0.6524484863740322, 0.36818951565166946, 0.3662420901697574, 0.7012121095215252]
