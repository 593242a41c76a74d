"""The simulated model's opinion of what comes next: logits for the whole vocabulary.

They depend on (prompt without seed, position, token before) alone. Each place in a sentence has a
fixed row of logits, in which words are likely as their rank says (Zipf); on top of it one token is
lifted above all others, and that is what the model says at temperature 0:

    logit = 8 - ln((rank + 8) / 8) of a word of the row; 8 of the full stop inside a sentence
            -17 of any other token
            8 + lift of the likeliest

Plain sampling (temperature 1, no filter) draws from the table in sim_output.py, which is the row
without the lift and with sentences of its own length: it differs from the log-probabilities told
here by some hundredths. All other sampling draws from exactly these logits.

The end of the output is not in them: the model ends where sim_output.end_of says.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import Sampling, TokenScores
from services.worker.engine.matcher import Mask
from services.worker.engine.sim_output import (
    FIRST,
    INSIDE,
    OPENING,
    Rows,
    SimOutput,
    Tokens,
    mix,
    mix_columns,
)
from services.worker.engine.sim_tokenizer import SimTokenizer

Logits = npt.NDArray[np.float64]
Bisect = Callable[[Sequence[float], float], int]

TOP_LOGPROBS_MAX = 20
LIFT = 0.5
"""Of the likeliest token above the row."""
SCRIPT_LIFT = 40.0
"""Of a token that the model is determined to say: a constraint's, a tool call's."""

_TOP = 8.0
_FLOOR = -17.0
# Shares of less than e^-40 of the likeliest are never drawn: there are no such random numbers.
_NEGLIGIBLE = 40.0
# Below this the likeliest token has all the weight that a number can hold.
_TEMPERATURE_MIN = 1e-6
# Rows that are kept, 30 kB each: three for each temperature in use.
_TEMPERED_MAX = 768
_DRAW = 0x5851F42D4C957F2D


@dataclass(frozen=True, slots=True)
class Place:
    """What the logits of one position are made of.

    Attributes:
        row: INSIDE, FIRST or OPENING.
        likeliest: token.
        lift: of the likeliest token.
    """

    row: int
    likeliest: int
    lift: float = LIFT


@dataclass(frozen=True, slots=True)
class PlainText:
    """What some outputs said in some steps, by column.

    Attributes:
        bases: of each output, with its seed; uint64, shape (outputs,).
        model_bases: without.
        positions: of each token; uint64, shape (steps, outputs).
        tokens: what was said; the same shape.
    """

    bases: npt.NDArray[np.uint64]
    model_bases: npt.NDArray[np.uint64]
    positions: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.int64]


class SimModel:
    """The logits of one vocabulary."""

    def __init__(self, tokenizer: SimTokenizer, output: SimOutput) -> None:
        self._output = output
        self._full_stop = ord(".")
        self._controls = np.array(tokenizer.control_ids, dtype=np.int64)
        self._logits = np.full((3, tokenizer.vocabulary_size), _FLOOR)
        for row in (INSIDE, FIRST, OPENING):
            for rank, token_id in enumerate(output.words(row)):
                logit = _TOP - math.log((rank + 8) / 8)
                self._logits[row, token_id] = max(logit, self._logits[row, token_id])
        self._logits[INSIDE, self._full_stop] = _TOP
        self._totals: list[float] = np.exp(self._logits).sum(axis=1).tolist()
        order = np.argsort(-self._logits, axis=1, kind="stable")
        self._ranked = order[:, : TOP_LOGPROBS_MAX + 1]
        self._words = [
            RowWords.of(row, ranked) for row, ranked in zip(self._logits, order, strict=True)
        ]
        self._tempered: OrderedDict[tuple[int, float], TemperedRow] = OrderedDict()
        # With the likeliest token lifted: its logit, and the logarithm of the sum of all.
        self._lifts = np.maximum(self._logits, _TOP) + LIFT
        sums = np.array(self._totals)[:, np.newaxis] - np.exp(self._logits) + np.exp(self._lifts)
        self._log_totals = np.log(sums)
        self._lists: list[list[float]] = self._logits.tolist()
        self._ranked_lists: list[list[int]] = self._ranked.tolist()

    def place(self, base: int, position: int, before: int | None) -> Place:
        """Looks at one position of an output.

        Args:
            base: of the prompt, without seed.
            position: of the token that comes, 0-based.
            before: token before it in the output; None for none.
        """
        row = OPENING if before is None else FIRST if before == self._full_stop else INSIDE
        return Place(row, self._output.likeliest(base, position, row))

    def logprob(self, place: Place, token_id: int) -> float:
        """Returns the natural logarithm of a token's probability."""
        if token_id == place.likeliest:
            return self._lifted(place) - self._log_total(place)
        return self._lists[place.row][token_id] - self._log_total(place)

    def top(self, place: Place, count: int) -> tuple[list[int], list[float]]:
        """Returns the likeliest tokens and their log-probabilities, best first."""
        if not count:
            return [], []
        likeliest = place.likeliest
        ranked = [other for other in self._ranked_lists[place.row][:count] if other != likeliest]
        ids = [likeliest, *ranked][:count]
        logits, total = self._lists[place.row], self._log_total(place)
        found = [logits[token_id] - total for token_id in ids]
        found[0] = self._lifted(place) - total
        return ids, found

    def columns(self, said: PlainText, counts: Sequence[int | None]) -> list[TokenScores]:
        """Scores plain text, for many outputs and steps at once: 0.5 us a token.

        Args:
            said: what was said.
            counts: alternatives that each output asked for; None for no log-probabilities.

        Returns:
            the scores of each step.
        """
        rows = self._output.rows(said.bases, said.positions)
        likeliest = self._output.likeliest_columns(said.model_bases, said.positions, rows)
        most = max(count or 0 for count in counts)
        logprobs, ids, tops = self._score(rows, likeliest, said.tokens, most)
        logprobs[:, [count is None for count in counts]] = np.nan
        unasked = np.arange(most) >= np.array([count or 0 for count in counts])[:, np.newaxis]
        ids[:, unasked] = -1
        tops[:, unasked] = -np.inf
        steps = len(logprobs)
        return [
            TokenScores(logprobs=logprobs_of, top_count=most, top_token_ids=ids_of, top_logprobs=of)
            for logprobs_of, ids_of, of in zip(
                logprobs.tolist(),
                ids.reshape(steps, -1).tolist(),
                tops.reshape(steps, -1).tolist(),
                strict=True,
            )
        ]

    def _score(
        self, rows: Rows, likeliest: Tokens, tokens: npt.NDArray[np.int64], most: int
    ) -> tuple[Logits, npt.NDArray[np.int64], Logits]:
        """Returns log-probabilities, and the likeliest tokens with theirs on a further axis."""
        totals, lifts = self._log_totals[rows, likeliest], self._lifts[rows, likeliest]
        logits = np.where(tokens == likeliest, lifts, self._logits[rows, tokens])
        ranked = self._ranked[rows][..., :most]
        ids = ranked.copy()
        if most:
            is_it = ranked == likeliest[..., np.newaxis]
            at = np.where(is_it.any(axis=-1), is_it.argmax(axis=-1), most)
            is_before = np.arange(most - 1) < at[..., np.newaxis]
            ids[..., 1:] = np.where(is_before, ranked[..., :-1], ranked[..., 1:])
            ids[..., 0] = likeliest
        tops = self._logits[rows[..., np.newaxis], ids] - totals[..., np.newaxis]
        tops[..., :1] = (lifts - totals)[..., np.newaxis]
        return logits - totals, ids, tops

    def draw(
        self,
        place: Place,
        sampling: Sampling,
        *,
        base: int,
        position: int,
        said: Mapping[int, int],
        seen: Mask | None = None,
        mask: Mask | None = None,
    ) -> int:
        """Draws a token: bias, repetition, penalties, constraint, temperature, top-k, top-p, min-p.

        Args:
            place: position.
            sampling: all of it acts.
            base: of the prompt with the seed.
            position: of the token, 0-based.
            said: how often each token stands in the output.
            seen: whether each token stands in prompt or output; needed for repetition_penalty.
            mask: what may come; None for anything. Control tokens never come.

        Returns:
            a token.
        """
        if mask is None and place.lift == LIFT and not changes_logits(sampling):
            share = _share(base, position)
            return self._tempered_row(place.row, sampling.temperature).draw(
                place.likeliest, sampling, share
            )
        logits = self._logits[place.row].copy()
        logits[place.likeliest] = self._lifted(place)
        for token_id, bias in sampling.logit_bias:
            logits[token_id] += bias
        _penalize(logits, sampling, said, seen)
        logits[self._controls] = -np.inf
        if mask is not None:
            logits[~mask] = -np.inf
        if sampling.temperature == 0:
            return int(logits.argmax())
        # From the largest on, so that no temperature makes it more than a number can be.
        logits = (logits - logits.max()) / max(sampling.temperature, _TEMPERATURE_MIN)
        kept = np.flatnonzero(logits >= -_NEGLIGIBLE)
        kept = kept[np.argsort(-logits[kept], kind="stable")]
        weights = _filtered(np.exp(logits[kept] - logits[kept[0]]), sampling)
        ends = np.cumsum(weights)
        share = _share(base, position)
        return int(
            kept[min(int(np.searchsorted(ends, share * ends[-1], side="right")), len(weights) - 1)]
        )

    def prompt_scores(
        self, prompt_ids: Sequence[int], start: int, end: int, count: int, base: int
    ) -> TokenScores:
        """Scores some tokens of a prompt, each from the tokens before it. 1 us a token.

        Args:
            prompt_ids: all of it.
            start: first position.
            end: position behind the last one.
            count: of alternatives.
            base: 64 bits of the adapter; 0 for none.
        """
        tokens = np.array(prompt_ids[max(0, start - 1) : end], dtype=np.int64)
        before, tokens = tokens[:-1], tokens[1:]
        positions = np.arange(end - len(tokens), end, dtype=np.uint64)
        rows: Rows = np.where(before == self._full_stop, FIRST, INSIDE)
        bases = mix_columns(base, before.astype(np.uint64) + np.uint64(1))
        likeliest = self._output.likeliest_columns(bases, positions, rows)
        logprobs, ids, tops = self._score(rows, likeliest, tokens, count)
        scores = TokenScores(logprobs=[], top_count=count)
        if start == 0:
            scores.logprobs.append(math.nan)
            _add_top(scores, [], [])
        scores.logprobs += logprobs.tolist()
        scores.top_token_ids += ids.ravel().tolist()
        scores.top_logprobs += tops.ravel().tolist()
        return scores

    def _tempered_row(self, row: int, temperature: float) -> TemperedRow:
        found = self._tempered.get((row, temperature))
        if found is None:
            found = TemperedRow(self._words[row], temperature)
            self._tempered[row, temperature] = found
            if len(self._tempered) > _TEMPERED_MAX:
                self._tempered.popitem(last=False)
        return found

    def _lifted(self, place: Place) -> float:
        return max(self._lists[place.row][place.likeliest], _TOP) + place.lift

    def _log_total(self, place: Place) -> float:
        usual = math.exp(self._lists[place.row][place.likeliest])
        return math.log(self._totals[place.row] - usual + math.exp(self._lifted(place)))


@dataclass(frozen=True, slots=True)
class RowWords:
    """The tokens of a row that are above the floor: all others have a hundred thousandth together.

    Attributes:
        order: tokens, likeliest first.
        ranks: of the tokens in that order.
        logits: in that order.
    """

    order: list[int]
    ranks: dict[int, int]
    logits: Logits

    @classmethod
    def of(cls, logits: Logits, ranked: npt.NDArray[np.intp]) -> RowWords:
        """Takes them from a row of logits; ranked has all tokens, likeliest first."""
        above = ranked[logits[ranked] > _FLOOR]
        order: list[int] = above.tolist()
        ranks = {token_id: rank for rank, token_id in enumerate(order)}
        return cls(order, ranks, logits[above])


class TemperedRow:
    """A row at one temperature, in order, so that filters and draws need no look at all of it."""

    def __init__(self, words: RowWords, temperature: float) -> None:
        """Sums up: 30 us.

        Args:
            words: of the row.
            temperature: above 0.
        """
        coldness = 1 / max(temperature, _TEMPERATURE_MIN)
        weights = np.exp((words.logits - _TOP - LIFT) * coldness)
        self._order = words.order
        self._ranks = words.ranks
        self._weights = array("d", weights.tobytes())
        # Descending weights as an ascending column, for bisection.
        self._negative = array("d", (-weights).tobytes())
        self._sums = array("d", np.concatenate(([0.0], np.cumsum(weights))).tobytes())

    def draw(self, likeliest: int, sampling: Sampling, share: float) -> int:
        """Draws a token: top-k, top-p, min-p. 4 us.

        Args:
            likeliest: token that is lifted: its weight is 1.
            sampling: filters.
            share: of all that stays, 0 <= share < 1.
        """
        rank = self._ranks.get(likeliest, len(self._order))
        others = len(self._order) - (rank < len(self._order))
        if sampling.top_k:
            others = min(others, sampling.top_k - 1)
        if sampling.top_p < 1:
            least = sampling.top_p * (1 + self._sum(others, rank)) - 1
            others = 0 if least <= 0 else min(others, self._count(least, rank, bisect_left))
        if sampling.min_p > 0:
            likely = bisect_right(self._negative, -sampling.min_p)
            others = min(others, likely - (rank < likely))
        drawn = share * (1 + self._sum(others, rank)) - 1
        if drawn < 0 or not others:
            return likeliest
        at = min(self._count(drawn, rank, bisect_right) - 1, others - 1)
        return self._order[at + (at >= rank)]

    def _sum(self, others: int, rank: int) -> float:
        """Weight of the first so many, the likeliest not counted."""
        if others <= rank:
            return self._sums[others]
        return self._sums[others + 1] - self._weights[rank]

    def _count(self, weight: float, rank: int, bisect: Bisect) -> int:
        """How many of the others it takes to reach a weight."""
        found = bisect(self._sums, weight)
        if found <= rank:
            return found
        return bisect(self._sums, weight + self._weights[rank]) - 1


class ScoredRows:
    """Collects the log-probabilities of one step, for as long as anybody asked for some."""

    def __init__(self, model: SimModel, plain: TokenScores | None, rows: int) -> None:
        """Starts behind the rows of plain text.

        Args:
            model: whose log-probabilities they are.
            plain: of the plain text; None when nobody asked for them.
            rows: of plain text.
        """
        self._model = model
        self._plain = plain if plain is not None else TokenScores(logprobs=[math.nan] * rows)
        self._is_asked = plain is not None
        self._rows: list[tuple[Place, int, int] | None] = []

    def add(self, place: Place, token_id: int, top_count: int | None) -> None:
        """Adds a row; None for top_count where it did not ask."""
        self._rows.append((place, token_id, top_count) if top_count is not None else None)

    def scores(self) -> TokenScores | None:
        """Returns the columns; None when no row asked."""
        counts = [row[2] for row in self._rows if row is not None]
        if not counts and not self._is_asked:
            return None
        plain = self._plain
        scores = TokenScores(logprobs=[], top_count=max([plain.top_count, *counts]))
        for at, logprob in enumerate(plain.logprobs):
            columns = slice(at * plain.top_count, (at + 1) * plain.top_count)
            scores.logprobs.append(logprob)
            _add_top(scores, plain.top_token_ids[columns], plain.top_logprobs[columns])
        for row in self._rows:
            if row is None:
                scores.logprobs.append(math.nan)
                _add_top(scores, [], [])
                continue
            place, token_id, count = row
            scores.logprobs.append(self._model.logprob(place, token_id))
            _add_top(scores, *self._model.top(place, count))
        return scores


def _add_top(scores: TokenScores, ids: Sequence[int], logprobs: Sequence[float]) -> None:
    """Adds the alternatives of one row, padded to as many as every row has."""
    missing = scores.top_count - len(ids)
    scores.top_token_ids += ids
    scores.top_logprobs += logprobs
    if missing:
        scores.top_token_ids += [-1] * missing
        scores.top_logprobs += [-math.inf] * missing


def changes_logits(sampling: Sampling) -> bool:
    """Whether anything but temperature and filters acts."""
    return bool(
        sampling.frequency_penalty
        or sampling.presence_penalty
        or sampling.repetition_penalty != 1
        or sampling.logit_bias
    )


def _share(base: int, position: int) -> float:
    """A number 0 <= share < 1 for each position."""
    return (mix(base ^ _DRAW, position) >> 11) / (1 << 53)


def _penalize(
    logits: Logits, sampling: Sampling, said: Mapping[int, int], seen: Mask | None
) -> None:
    if seen is not None:
        before = logits[seen]
        logits[seen] = np.where(
            before > 0, before / sampling.repetition_penalty, before * sampling.repetition_penalty
        )
    if sampling.frequency_penalty or sampling.presence_penalty:
        for token_id, count in said.items():
            logits[token_id] -= sampling.frequency_penalty * count + sampling.presence_penalty


def _filtered(weights: Logits, sampling: Sampling) -> Logits:
    """Cuts off what the filters drop.

    Args:
        weights: descending; the first is 1.
        sampling: filters; the first token always stays.
    """
    if sampling.top_k:
        weights = weights[: sampling.top_k]
    if sampling.top_p < 1:
        ends = np.cumsum(weights)
        weights = weights[: int(np.searchsorted(ends, sampling.top_p * ends[-1])) + 1]
    if sampling.min_p > 0:
        weights = weights[: max(1, int(np.count_nonzero(weights >= sampling.min_p)))]
    return weights
