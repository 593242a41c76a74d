"""From logits to a token, for one output."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .language import Floats
from .records import SamplingBase

Mask = npt.NDArray[np.bool_]

_GOLDEN = 0x9E3779B97F4A7C15
_M64 = (1 << 64) - 1
_NOISE_ROWS, _NOISE_ROWS_MIN, _NOISE_NUMBERS = 251, 17, 4_000_000


class Guided(Protocol):
    """A grammar."""

    def mask(self) -> Mask | None:
        """What may come next; None for anything."""
        ...


class DeadEnd(Exception):
    """No token is left: the grammar allows none, or what it allows is forbidden."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """What a version does of what it is asked.

    Attributes:
        penalizes: penalties and min_p have an effect.
        counts_prompt: min_tokens is of prompt and output together.
        in_graph: it knows temperature, top_p and top_k, and nothing else.
        is_greedy: it always takes the likeliest token.
    """

    penalizes: bool = True
    counts_prompt: bool = False
    in_graph: bool = False
    is_greedy: bool = False


@dataclass
class Choice:
    """What one output needs besides logits.

    Attributes:
        params: of its request.
        sampler: of the version.
        prompt: of its request.
        end_id: that it ends with; -1 for none.
        seed: of its draws.
        bias: added to the logits; None for none.
        banned: sequences of ids that must not come.
        vocabulary: number of logits.
        is_guided: a grammar has a say.
    """

    params: SamplingBase
    sampler: Sampler
    prompt: Sequence[int]
    end_id: int
    seed: int
    bias: Floats | None
    banned: Sequence[Sequence[int]]
    vocabulary: int
    is_guided: bool

    def __post_init__(self) -> None:
        params, sampler = self.params, self.sampler
        self.temperature = 1.0 if params.temperature is None else params.temperature
        self.is_greedy = params.is_greedy or sampler.is_greedy
        penalizes = sampler.penalizes and not sampler.in_graph
        if sampler.in_graph:
            self.bias, self.banned = None, ()
        self._min_p = (params.min_p or 0.0) if penalizes else 0.0
        self._least = 0 if sampler.in_graph else params.min_tokens or 0
        if sampler.counts_prompt:
            self._least -= len(self.prompt)
        self._has_penalties = penalizes and bool(
            params.presence_penalty or params.frequency_penalty
        )
        # Tokens of the prompt count as well, but for the first so many.
        ignored = getattr(params, "prompt_ignore_length", None) or 0
        self._counts = Counter(self.prompt[ignored:] if self._has_penalties else ())
        self._seen: Mask | None = None
        if penalizes and params.repetition_penalty is not None:
            self._seen = np.zeros(self.vocabulary, dtype=np.bool_)
            self._seen[list(self.prompt)] = True
        changes = (self.bias is not None, bool(self.banned), self._seen is not None)
        is_free = not any((*changes, self._has_penalties, self._least > 0, self.is_guided))
        self.is_plain = is_free and not (params.top_k or (params.top_p or 1.0) < 1 or self._min_p)

    def take(self, token_id: int) -> None:
        """Remembers what has been said."""
        if self._seen is not None:
            self._seen[token_id] = True
        if self._has_penalties:
            self._counts[token_id] += 1

    def change(self, logits: Floats, output: Sequence[int], guide: Guided | None) -> Floats:
        """Applies penalties, bias, bans, the least length and the grammar, in a copy.

        Raises:
            DeadEnd: nothing is left.
        """
        row = logits.copy()
        self._penalize(row)
        if self.bias is not None:
            row[: len(self.bias)] += self.bias
        for sequence in self.banned:
            if list(output[len(output) - len(sequence) + 1 :]) == list(sequence[:-1]):
                row[sequence[-1]] = -np.inf
        if len(output) < self._least:
            # The only end that the engine knows of. Without one, that is the last row.
            row[self.end_id] = -np.inf
        mask = guide.mask() if guide is not None else None
        if mask is not None:
            row[~mask] = -np.inf
        if not np.isfinite(row.max()):
            raise DeadEnd
        return row

    def _penalize(self, row: Floats) -> None:
        repetition = self.params.repetition_penalty
        if self._seen is not None and repetition is not None:
            seen = row[self._seen]
            row[self._seen] = np.where(seen > 0, seen / repetition, seen * repetition)
        if self._has_penalties:
            for token_id, count in self._counts.items():
                row[token_id] -= (self.params.presence_penalty or 0.0) + count * (
                    self.params.frequency_penalty or 0.0
                )

    def pick(self, row: Floats, noise: Floats) -> int:
        """Draws a token from what is left: the likeliest one after adding noise."""
        if self.is_greedy:
            return int(row.argmax())
        noisy = row / self.temperature + noise
        if self.params.top_k or (self.params.top_p or 1.0) < 1 or self._min_p:
            order = np.argsort(-row, kind="stable")
            shares = np.exp((row[order] - row[order[0]]).astype(np.float64) / self.temperature)
            noisy[order[self._kept(shares / shares.sum()) :]] = -np.inf
        return int(noisy.argmax())

    def _kept(self, shares: npt.NDArray[np.float64]) -> int:
        """How many of the likeliest remain."""
        count = len(shares)
        if self.params.top_k:
            count = min(count, self.params.top_k)
        if self.params.top_p is not None and self.params.top_p < 1:
            before = shares.cumsum() - shares
            count = min(count, int((before < self.params.top_p).sum()))
        if self._min_p:
            count = min(count, int((shares >= self._min_p * shares[0]).sum()))
        return max(1, count)


class Noise:
    """Noise of the kind that makes taking the best one a draw.

    What is drawn is so the same whatever else may come, as long as it may come itself.
    """

    def __init__(self, vocabulary: int) -> None:
        rows = max(_NOISE_ROWS_MIN, min(_NOISE_ROWS, _NOISE_NUMBERS // vocabulary))
        numbers = np.random.default_rng(_GOLDEN).random((rows, vocabulary), dtype=np.float32)
        self._table: Floats = -np.log(-np.log(numbers + np.float32(1e-12)) + np.float32(1e-12))

    def rows(self, choices: Sequence[Choice], draws: Sequence[int]) -> Floats:
        """The noise of some draws, shape (draws, vocabulary)."""
        count = len(self._table)
        pairs = zip(choices, draws, strict=True)
        return self._table[[_mixed(one.seed, draw) % count for one, draw in pairs]]


def pick_plain(rows: Floats, choices: Sequence[Choice], noise: Floats | None) -> list[int]:
    """Draws from several rows at once, where temperature is all that is asked for."""
    if noise is not None:
        warmth = np.array([0.0 if one.is_greedy else one.temperature for one in choices])
        rows = rows + noise * warmth.astype(np.float32)[:, None]
    picked: list[int] = rows.argmax(axis=1).tolist()
    return picked


def _mixed(seed: int, draw: int) -> int:
    """A number that is a function of (seed, draw): splitmix64."""
    mixed = (seed * 0xD1342543DE82EF95 + (draw + 1) * _GOLDEN) & _M64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _M64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _M64
    return mixed ^ (mixed >> 31)
