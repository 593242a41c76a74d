"""What the simulator says: pseudo-English, as a pure function. No clock, no randomness of its own.

The token at output position p depends on (prompt, seed, p) alone, so a continuation goes on as the
uninterrupted output would have:

    base   = first 64 bits of BLAKE2b(prompt ids, adapter, seed)   no seed at temperature 0
    hash   = splitmix64(base + p * golden ratio)                Steele, Lea, Flood 2014
    token  = table[place of p in its sentence][top 12 bits of hash]

Sentences have a length that the base picks; words are frequent as their rank says (Zipf).
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import EngineRequest
from services.worker.engine.sim_tokenizer import SimTokenizer
from services.worker.engine.sim_words import WORDS

_TABLE_BITS = 12
_SENTENCE_MIN = 6
_SENTENCE_KINDS = 8
# Positions are turned into tokens this many at a time: 20 ns a token, and little wasted on aborts.
_CHUNK = 256
# So few tokens are drawn one by one: they are not worth the columns.
_SINGLE_MAX = 24

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1
_STEP, _FACTOR_1, _FACTOR_2 = int(_GOLDEN), int(_MIX_1), int(_MIX_2)

# Rows of the table.
INSIDE, FIRST, OPENING, _LAST = range(4)

Tokens = npt.NDArray[np.int32]
Bases = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]


def base_of(request: EngineRequest) -> int:
    """Returns the 64 bits that fix the whole output of a request."""
    digest = _digest(request)
    if request.sampling.temperature > 0:
        digest.update(request.sampling.seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def model_base_of(request: EngineRequest) -> int:
    """Returns the 64 bits of prompt and adapter, whatever the seed."""
    return int.from_bytes(_digest(request).digest(), "little")


def _digest(request: EngineRequest) -> hashlib.blake2b:
    digest = hashlib.blake2b(array("I", request.prompt_ids).tobytes(), digest_size=8)
    if request.adapter is not None:
        digest.update(request.adapter.digest.encode())
    return digest


def share_of(base: int) -> float:
    """Returns a number 0 <= share < 1 that tells how long an output gets."""
    return ((base * _FACTOR_1 & _MASK) >> 11) / (1 << 53)


def end_of(base: int, mean_length: int) -> int:
    """Returns the position of the end of sequence: geometric with that mean, at least 1."""
    return max(1, math.ceil(-math.log1p(-share_of(base)) * mean_length))


class SimOutput:
    """The tables of one vocabulary."""

    def __init__(self, tokenizer: SimTokenizer) -> None:
        self._words = [
            [_known(tokenizer, form(word)) for word in WORDS]
            for form in (_inside, _first, str.capitalize)
        ]
        inside, first, opening = (_zipf(words) for words in self._words)
        last = np.full(1 << _TABLE_BITS, _known(tokenizer, "."), dtype=np.int32)
        self._table = np.stack([inside, first, opening, last])
        self._rows: list[list[int]] = self._table.tolist()

    def tokens(self, base: int, start: int, end: int) -> Tokens:
        """Returns the tokens of positions start <= p < end; int32, shape (end - start,)."""
        positions = np.arange(start, end, dtype=np.uint64)
        length = _SENTENCE_MIN + base % _SENTENCE_KINDS
        return self._look_up(np.uint64(base), positions, np.uint64(length))

    def token(self, base: int, position: int) -> int:
        """Returns the token of one position: 1 us, where any number of them costs 15 us."""
        length = _SENTENCE_MIN + base % _SENTENCE_KINDS
        place = position % length
        row = FIRST if place == 0 else _LAST if place == length - 1 else INSIDE
        if position == 0:
            row = OPENING
        return self._rows[row][mix(base, position) >> (64 - _TABLE_BITS)]

    def words(self, row: int) -> Sequence[int]:
        """Returns the tokens of INSIDE, FIRST or OPENING, likeliest first."""
        return self._words[row]

    def likeliest(self, base: int, position: int, row: int) -> int:
        """Returns what the output says at a position that is elsewhere in its sentence.

        The same as `token` where that is of this row, or the full stop that ends it.
        """
        if row == INSIDE:
            length = _SENTENCE_MIN + base % _SENTENCE_KINDS
            if position and position % length == length - 1:
                return self._rows[_LAST][0]
        return self._rows[row][mix(base, position) >> (64 - _TABLE_BITS)]

    def rows(self, bases: Bases, positions: Bases) -> Rows:
        """Returns where in its sentence each token is: INSIDE, FIRST or OPENING."""
        place = positions % (np.uint64(_SENTENCE_MIN) + bases % np.uint64(_SENTENCE_KINDS))
        row: Rows = np.where(place == 0, FIRST, INSIDE)
        row[positions == 0] = OPENING
        return row

    def likeliest_columns(self, bases: Bases, positions: Bases, rows: Rows) -> Tokens:
        """Does what `likeliest` does, for many; the three can be broadcast to one shape."""
        lengths = np.uint64(_SENTENCE_MIN) + bases % np.uint64(_SENTENCE_KINDS)
        is_end = (positions % lengths == lengths - np.uint64(1)) & (rows == INSIDE)
        column = splitmix(bases + positions * _GOLDEN) >> np.uint64(64 - _TABLE_BITS)
        tokens: Tokens = self._table[np.where(is_end, _LAST, rows), column]
        return tokens

    def steps(self, bases: Sequence[int], positions: Sequence[int], count: int) -> list[list[int]]:
        """Returns the tokens of some outputs, step by step.

        Args:
            bases: of each output.
            positions: of each output's first token here; at least 0.
            count: of steps.

        Returns:
            a row for each step, with a token of each output.
        """
        if count * len(bases) <= _SINGLE_MAX:
            return [
                [self.token(base, at + step) for base, at in zip(bases, positions, strict=True)]
                for step in range(count)
            ]
        column = np.array(bases, np.uint64)
        at = np.array(positions, np.uint64) + np.arange(count, dtype=np.uint64)[:, np.newaxis]
        lengths = np.uint64(_SENTENCE_MIN) + column % np.uint64(_SENTENCE_KINDS)
        found: list[list[int]] = self._look_up(column, at, lengths).tolist()
        return found

    def _look_up(
        self, bases: Bases | np.uint64, positions: Bases, lengths: Bases | np.uint64
    ) -> Tokens:
        """Looks up tokens; the three are of one shape, or one value for all."""
        place = positions % lengths
        row = np.where(place == 0, FIRST, np.where(place == lengths - np.uint64(1), _LAST, INSIDE))
        row[positions == 0] = OPENING
        column = splitmix(bases + positions * _GOLDEN) >> np.uint64(64 - _TABLE_BITS)
        tokens: Tokens = self._table[row, column]
        return tokens

    def find(self, base: int, start: int, end: int, wanted: frozenset[int]) -> int | None:
        """Returns the first position in start <= p < end that holds a wanted token, or None."""
        ids = np.fromiter(wanted, dtype=np.int64)
        while start < end:
            stop = min(end, start + _CHUNK)
            hits = np.flatnonzero(np.isin(self.tokens(base, start, stop), ids))
            if hits.size:
                return start + int(hits[0])
            start = stop
        return None


def mix(base: int, position: int) -> int:
    """Returns the 64 bits of one position, as the columns have them."""
    mixed = (base + position * _STEP) & _MASK
    mixed = (mixed ^ (mixed >> 30)) * _FACTOR_1 & _MASK
    mixed = (mixed ^ (mixed >> 27)) * _FACTOR_2 & _MASK
    return mixed ^ (mixed >> 31)


def mix_columns(base: int, positions: Bases) -> Bases:
    """Returns the 64 bits of many positions."""
    return splitmix(np.uint64(base) + positions * _GOLDEN)


def _inside(word: str) -> str:
    return f" {word}"


def _first(word: str) -> str:
    return f" {word.capitalize()}"


def _known(tokenizer: SimTokenizer, text: str) -> int:
    """Returns the token of a text; of its last character where the whole is no token."""
    found = tokenizer.id_of(text)
    return found if found is not None else ord(text[-1])


def _zipf(ids: list[int]) -> Tokens:
    """Fills a row so that the id of rank r comes about 1 / (r + 8) as often as the first."""
    weights = 1.0 / (np.arange(len(ids)) + 8.0)
    ends = np.cumsum(weights) / weights.sum() * (1 << _TABLE_BITS)
    ranks = np.searchsorted(ends, np.arange(1 << _TABLE_BITS), side="right")
    return np.asarray(ids, dtype=np.int32)[np.minimum(ranks, len(ids) - 1)]


def splitmix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Returns well mixed 64 bits of each number."""
    mixed = (state ^ (state >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))
