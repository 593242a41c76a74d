"""How the llamacpp engine draws tokens from rows of logits.

For every row, in this order:

1. temperature: weight = exp((logit - largest) / temperature);
2. top_k: the k heaviest tokens stay; among equals the lower id does;
3. top_p: of these, heaviest first, the shortest run stays whose weights reach top_p of their sum;
4. min_p: of these, those stay that weigh at least min_p times the heaviest;
5. the token is where the running sum of the weights, tokens in ascending id, exceeds u * sum.

That is the order of OpenAI's, vLLM's and TensorRT-LLM's samplers, so top_p means the same on every
engine of a pool. (llama.cpp's own chain applies temperature last; top_p and min_p notice.) What
changes logits before, llamacpp_logits does.

u is uniform in [0, 1) and a function of (seed, output position) alone. Step 5 runs by id, not by
weight, so that the last bits of logits, which may differ between machines, move the borders a
little instead of swapping neighbours.

A row's token depends on that row alone, never on the company it is drawn in.

Pure: no clock, no randomness of its own, no ctypes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import Sampling

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

NO_ID: Final = -1
"""Stands for the token of a row that has no finite logit."""

# Below this the heaviest token has all the weight that a float can hold.
_TEMPERATURE_MIN: Final = 1e-6
# Finer buckets leave less to sort; together they reach down to exp(-64).
_BUCKETS_PER_UNIT: Final = 32
_BUCKETS: Final = 2048
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)


def uniform(streams: Words, positions: Ids) -> Doubles:
    """The uniform number in [0, 1) of each (stream, output position).

    Args:
        streams: uint64, shape (n,): streams_of(seeds).
        positions: int64, shape (n,): output positions, from 0.
    """
    # splitmix64 (Steele, Lea, Flood 2014), entered at the position's place of the stream.
    words = _mix(streams + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    mantissas: Doubles = (words >> np.uint64(11)).astype(np.float64)
    return mantissas * 2.0**-53


def streams_of(seeds: Sequence[int]) -> Words:
    """Where the stream of each seed starts; mixed, since neighbours in seed are common."""
    words = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    return _mix(words + _GOLDEN)


class Sampler:
    """Draws tokens for a fixed company of rows, step after step.

    Args:
        samplings: of each row, in order.
        vocabulary_size: length of a row of logits.
    """

    def __init__(self, samplings: Sequence[Sampling], vocabulary_size: int) -> None:
        members = defaultdict[tuple[int, bool, bool], list[int]](list)
        for row, sampling in enumerate(samplings):
            if _is_greedy(sampling):
                continue
            top_k = sampling.top_k if sampling.top_k < vocabulary_size else 0
            members[top_k, sampling.top_p < 1, sampling.min_p > 0].append(row)
        self._groups = [
            _Group(
                np.array(rows),
                [samplings[row] for row in rows],
                top_k,
                is_nucleus=is_nucleus,
                has_floor=has_floor,
            )
            for (top_k, is_nucleus, has_floor), rows in members.items()
        ]
        self._rows = np.arange(len(samplings))

    def draw(self, logits: Floats, positions: Ids) -> Ids:
        """Draws one token for each row.

        Args:
            logits: float32, shape (rows, vocabulary). Not changed.
            positions: int64, shape (rows,): output position of the token to draw.

        Returns:
            int64, shape (rows,); NO_ID for a row without a finite logit.
        """
        ids: Ids = logits.argmax(axis=1)  # The lowest id among equals; NaN counts as largest.
        largest = logits[self._rows, ids]
        is_sound = np.isfinite(largest)
        if not is_sound.all():
            # Rare: a broken row would break the arithmetic of its whole group.
            logits = np.where(is_sound[:, None], logits, np.float32(0))
            largest = np.where(is_sound, largest, np.float32(0))
        for group in self._groups:
            rows = group.rows
            ids[rows] = group.draw(logits[rows], largest[rows], positions[rows])
        ids[~is_sound] = NO_ID
        return ids


class _Group:
    """Rows that are drawn by the same steps, as one matrix."""

    def __init__(
        self,
        rows: Ids,
        samplings: Sequence[Sampling],
        top_k: int,
        *,
        is_nucleus: bool,
        has_floor: bool,
    ) -> None:
        self.rows = rows
        self._top_k = top_k
        self._is_nucleus = is_nucleus
        self._coldness = np.array(
            [[1 / max(sampling.temperature, _TEMPERATURE_MIN)] for sampling in samplings],
            dtype=np.float32,
        )
        self._top_p = np.array([[sampling.top_p] for sampling in samplings])
        self._has_floor = has_floor
        self._min_p = np.array([[sampling.min_p] for sampling in samplings], dtype=np.float32)
        self._streams = streams_of([sampling.seed for sampling in samplings])

    def draw(self, logits: Floats, largest: Floats, positions: Ids) -> Ids:
        exponents = (logits - largest[:, None]) * self._coldness
        numbers = uniform(self._streams, positions)
        if self._top_k:
            candidates = heaviest(logits, self._top_k)
            weights = np.exp(np.take_along_axis(exponents, candidates, axis=1))
            if self._is_nucleus:
                _cut_ranked(weights, self._top_p)
            if self._has_floor:
                _cut_floor(weights, self._min_p)
            chosen = _pick(weights, numbers)
            ids: Ids = np.take_along_axis(candidates, chosen[:, None], axis=1)[:, 0]
            return ids
        weights = np.exp(exponents)
        if self._is_nucleus:
            for row in range(len(weights)):
                _cut_bucketed(weights[row], exponents[row], float(self._top_p[row, 0]))
        if self._has_floor:
            _cut_floor(weights, self._min_p)
        return _pick(weights, numbers)


def heaviest(logits: Floats, count: int) -> Ids:
    """Ids of the largest logits of each row, ascending by id; among equals the lower ids.

    Args:
        logits: float32, shape (rows, vocabulary), finite or -inf.
        count: 1..vocabulary.

    Returns:
        int64, shape (rows, count).
    """
    rows, size = logits.shape
    if count == size:
        return np.broadcast_to(np.arange(size), (rows, size))
    border = np.partition(logits, size - count, axis=1)[:, size - count, None]
    is_kept = logits >= border
    excess = is_kept.sum(axis=1) - count
    for row in np.flatnonzero(excess):
        ties = np.flatnonzero(logits[row] == border[row])
        is_kept[row, ties[-excess[row] :]] = False
    ids: Ids = np.nonzero(is_kept)[1].reshape(rows, count)
    return ids


def _cut_ranked(weights: Floats, top_p: Doubles) -> None:
    """Zeroes, in rows of a few candidates, what comes after the nucleus.

    Args:
        weights: float32, shape (rows, candidates), changed in place.
        top_p: float64, shape (rows, 1).
    """
    order = np.argsort(-weights, axis=1, kind="stable")
    ranked = np.take_along_axis(weights, order, axis=1)
    running = np.cumsum(ranked, axis=1, dtype=np.float64)
    is_cut = running - ranked >= top_p * running[:, -1:]
    is_cut[:, 0] = False
    ranked[is_cut] = 0
    np.put_along_axis(weights, order, ranked, axis=1)


def _cut_bucketed(weights: Floats, exponents: Floats, top_p: float) -> None:
    """Zeroes, in one row over the whole vocabulary, what comes after the nucleus.

    Sorting 128 thousand weights would take 10 ms. The weights are summed in buckets of like
    exponents instead, and only the bucket in which top_p is reached is sorted: O(vocabulary).

    Args:
        weights: float32, shape (vocabulary,), changed in place: exp(exponents).
        exponents: float32, shape (vocabulary,), at most 0.
        top_p: above 0.
    """
    depths = np.minimum(exponents * -_BUCKETS_PER_UNIT, _BUCKETS - 1).astype(np.intp)
    running = np.cumsum(np.bincount(depths, weights=weights, minlength=_BUCKETS))
    wanted = top_p * running[-1]
    border = int(np.searchsorted(running, wanted))
    candidates = np.flatnonzero(depths == border)
    candidates = candidates[np.argsort(-weights[candidates], kind="stable")]
    ranked = weights[candidates]
    before = np.cumsum(ranked, dtype=np.float64) - ranked
    if border:
        before += running[border - 1]
    is_cut = before >= wanted
    weights[depths > border] = 0
    weights[candidates[is_cut]] = 0


def _cut_floor(weights: Floats, min_p: Floats) -> None:
    """Zeroes what weighs less than min_p; the heaviest of each row weighs 1 and so always stays."""
    weights[weights < min_p] = 0


def _pick(weights: Floats, numbers: Doubles) -> Ids:
    """Index in each row where the running sum of the weights exceeds number * sum."""
    running = np.cumsum(weights, axis=1, dtype=np.float64)
    total = running[:, -1]
    # Rounding may lift number * sum to the sum itself, which nothing exceeds.
    targets = np.minimum(numbers * total, np.nextafter(total, 0))
    return np.array(
        [row.searchsorted(target, "right") for row, target in zip(running, targets, strict=True)],
        dtype=np.int64,
    )


def _is_greedy(sampling: Sampling) -> bool:
    return (
        sampling.temperature <= 0
        or sampling.top_k == 1
        or sampling.top_p <= 0
        or sampling.min_p >= 1
    )


def _mix(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    return words ^ (words >> np.uint64(31))
