"""Names of blocks of a KV cache, the same on every engine. Pure."""

from __future__ import annotations

import array
import hashlib
import sys
from collections.abc import Sequence

_BYTES = 8


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
