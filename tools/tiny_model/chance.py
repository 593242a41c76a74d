"""Reproducible chance for the corpus: one small generator with a name for every stream.

Pure: no operating system entropy, no global state, no clock. The algorithm is written out here
instead of taken from the standard library, so that a seed makes the same corpus on every Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
"""Increment of SplitMix64 (Steele, Lea, Flood 2014): odd, so that every state is visited once."""


class Chance:
    """A stream of reproducible choices, owned by whoever made it.

    Args:
        seed: Any text. Equal seeds give equal streams.
    """

    def __init__(self, seed: str) -> None:
        digest = hashlib.sha256(seed.encode()).digest()
        self._seed = seed
        self._state = int.from_bytes(digest[:8], "little")

    def child(self, name: str) -> Chance:
        """Return the independent stream `name`, however much of this one was already used."""
        return Chance(f"{self._seed}/{name}")

    def bits(self) -> int:
        """Return the next 64 uniform bits (SplitMix64)."""
        self._state = (self._state + _STEP) & _MASK
        mixed = self._state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return mixed ^ (mixed >> 31)

    def below(self, limit: int) -> int:
        """Return a whole number in [0, limit).

        Raises:
            ValueError: If `limit` is not positive.
        """
        if limit <= 0:
            raise ValueError("there is nothing to choose from")
        return (self.bits() * limit) >> 64

    def pick(self, items: Sequence[Item]) -> Item:
        """Return one of `items`, all equally likely."""
        return items[self.below(len(items))]

    def weigh(self, choices: Sequence[tuple[int, Item]]) -> Item:
        """Return an item of the pairs (weight, item), each as likely as its weight says."""
        place = self.below(sum(weight for weight, _ in choices))
        for weight, item in choices:
            place -= weight
            if place < 0:
                return item
        raise AssertionError("weights are not negative")

    def happens(self, probability: float) -> bool:
        """Return true with the given probability, a number in [0, 1]."""
        return self.bits() < probability * (_MASK + 1)

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """Return a copy of `items` in a fair random order (Fisher-Yates)."""
        mixed = list(items)
        for last in range(len(mixed) - 1, 0, -1):
            other = self.below(last + 1)
            mixed[last], mixed[other] = mixed[other], mixed[last]
        return mixed
