"""Slots of the KV cache: which are free, and what the free ones still hold for others to use.

The prefix cache. A lane that ends leaves its tokens where they are until its slot is taken again.
A new lane with the same cache key (salt and adapter) begins behind the longest prefix it shares
with any slot, free or not: in that slot, or in another one into which the cache's cells are copied.
Lanes with other keys never see them. With keys in q8_0 the bits of a token's key and value do not
depend on how a prompt was cut (see llamacpp.py), so a lane's tokens are the same either way.

Which slot. llama.cpp splits a batch wherever neighbouring sequence ids are not consecutive, and
each piece costs a pass over the weights. So a slot beside those in use is taken, a hole between
two first; among equals the one unused for longest, since that is what it costs others.

Pure: no ctypes, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Slot = int
Ids = npt.NDArray[np.int32]
CacheKey = tuple[bytes, str]
"""Salt and the adapter's digest; empty for none."""

COPY_TOKENS_MIN: Final = 16
"""Copying takes the cells of a whole slot, used or not: not worth it for fewer tokens."""
GAP_TOKENS_MIN: Final = 256
"""Prefix for which a slot is taken that has no neighbour in use."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a lane goes.

    Attributes:
        slot: that is its own now.
        source: slot that holds its prefix: the same one, or one to copy from.
        common: tokens of the prefix; 0 for none.
    """

    slot: Slot
    source: Slot
    common: int


class SlotPool:
    """Free slots and kept prefixes.

    Args:
        capacity: slots.
        context_length: tokens of each.
        keeps: whether the KV cache can drop the end of a sequence, without which there is no
            prefix cache.

    Attributes:
        lengths: int32, shape (slots,): tokens in the KV cache, kept ones included.
        ids: int32, shape (slots, context_length): these tokens.
        kept_tokens: in slots without a lane.
    """

    def __init__(self, capacity: int, context_length: int, *, keeps: bool) -> None:
        self.lengths = np.zeros(capacity, np.int32)
        self.ids = np.zeros((capacity, context_length), np.int32)
        self.kept_tokens = 0
        self._keeps = keeps
        self._keys: list[CacheKey | None] = [None] * capacity
        # 1 where a lane is, with an empty slot before the first and behind the last.
        self._in_use = np.zeros(capacity + 2, np.int8)
        self._free = set(range(capacity))
        self._freed_at = [0] * capacity
        self._releases = 0

    @property
    def free_count(self) -> int:
        """Slots without a lane."""
        return len(self._free)

    def take(self, key: CacheKey, ids: Ids, *, reads: bool) -> Place:
        """Gives the best free slot to a lane; there has to be one.

        The caller copies and drops what the answer implies; `lengths` of the slot is set to the
        common prefix here.

        Args:
            key: with which other lanes may share.
            ids: of the prompt and what continues it. The last one is never taken from the cache,
                since its logits are needed.
            reads: whether the prefix cache may be read.
        """
        source, common = self._longest(key, ids[:-1]) if reads and self._keeps else (-1, 0)
        slot = self._choose(source, common)
        if slot != source and common < COPY_TOKENS_MIN:
            common = 0
        self._free.remove(slot)
        self.kept_tokens -= int(self.lengths[slot])
        self._in_use[slot + 1] = 1
        self._keys[slot] = key
        if slot != source:
            self.ids[slot, :common] = ids[:common]
        self.lengths[slot] = common
        return Place(slot, source if common else slot, common)

    def give_back(self, slot: Slot, *, keeps: bool) -> bool:
        """Frees a slot.

        Args:
            slot: of a lane that ended.
            keeps: whether what is in it may be used again.

        Returns:
            whether its tokens stay; otherwise the caller drops them.
        """
        self._free.add(slot)
        self._in_use[slot + 1] = 0
        self._releases += 1
        self._freed_at[slot] = self._releases
        if keeps and self._keeps:
            self.kept_tokens += int(self.lengths[slot])
            return True
        self._keys[slot] = None
        self.lengths[slot] = 0
        # As good as never used: it goes before those that hold something.
        self._freed_at[slot] = 0
        return False

    def _longest(self, key: CacheKey, ids: Ids) -> tuple[Slot, int]:
        """The slot with the longest common prefix, a free one among equals; (-1, 0) for none."""
        best = (0, False, 0)
        for slot, other in enumerate(self._keys):
            if other == key:
                common = _common_prefix(self.ids[slot, : self.lengths[slot]], ids)
                best = max(best, (common, slot in self._free, -slot))
        return (-best[2], best[0]) if best[0] else (-1, 0)

    def _choose(self, source: Slot, common: int) -> Slot:
        is_idle = len(self._free) == len(self._keys)
        # Taking a slot destroys what else it holds, which must not be more than what is used.
        is_mostly_common = source in self._free and 2 * common >= int(self.lengths[source])
        if is_mostly_common and (is_idle or common >= GAP_TOKENS_MIN or self._neighbours(source)):
            return source
        return min(
            self._free, key=lambda slot: (-self._neighbours(slot), self._freed_at[slot], slot)
        )

    def _neighbours(self, slot: Slot) -> int:
        return int(self._in_use[slot] + self._in_use[slot + 2])


def _common_prefix(left: Ids, right: Ids) -> int:
    count = min(len(left), len(right))
    different = np.flatnonzero(left[:count] != right[:count])
    return int(different[0]) if different.size else count
