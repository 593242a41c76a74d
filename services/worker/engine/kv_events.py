"""Changes of an engine's prefix cache, and the names of its blocks. Pure."""

from __future__ import annotations

import array
import enum
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_BYTES = 8


class KvTier(enum.Enum):
    """Where a block of the KV cache lies."""

    DEVICE = "device"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class KvStored:
    """Blocks of the prefix cache that can be shared from here on, or have moved to another tier.

    A block's hash says all that stands before it, too: `chain` computes it from token ids, the
    same on every engine.

    Attributes:
        hashes: 64 bits each. Block i follows block i - 1; the first follows `parent`.
        parent: hash of the block before the first; None where that is the beginning of a prompt.
        tier: where they lie.
    """

    hashes: tuple[int, ...]
    parent: int | None
    tier: KvTier = KvTier.DEVICE


@dataclass(frozen=True, slots=True)
class KvRemoved:
    """Blocks that are in no tier any more. Unknown ones mean nothing.

    Attributes:
        hashes: of them.
    """

    hashes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KvCleared:
    """Nothing is known to be cached: all went away, or events were lost."""


KvEvent = KvStored | KvRemoved | KvCleared


def chain(parent: int | None, token_ids: Sequence[int]) -> int:
    """Names a block by its tokens and all that stand before it.

    The first 8 bytes, little-endian, of BLAKE2b (digest size 8) over the name of the block before
    (8 bytes, little-endian; zeros at the beginning of a prompt) and the token ids (int32,
    little-endian). Salt and adapter are not part of it: whoever looks for a prefix knows neither,
    and blocks that differ in them only count as one for as long as any of them is there.

    Args:
        parent: name of the block before; None at the beginning of a prompt.
        token_ids: of the block.

    Returns:
        64 bits.
    """
    column = array.array("i", token_ids)
    if sys.byteorder == "big":
        column.byteswap()
    data = (parent or 0).to_bytes(_BYTES, "little") + column.tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=_BYTES).digest(), "little")
