"""The simulated prefix cache: which beginnings of prompts have been computed already.

Prompts are cut into blocks of BLOCK_TOKENS tokens. A block is found below the block before it, and
the first one below its salt and adapter: who has another salt can neither hit a block nor find out
that it is there. The blocks that were unused for longest make room.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count

from services.worker.engine.base import EngineRequest

BLOCK_TOKENS = 16
_BLOCK_BYTES = BLOCK_TOKENS * array("I").itemsize

Root = tuple[bytes, str]
"""Salt and digest of the adapter; empty for none."""


def root_of(request: EngineRequest) -> Root:
    """Returns what only equal ones share the cache."""
    return request.cache_salt, request.adapter.digest if request.adapter is not None else ""


def blocks_of(prompt_ids: Sequence[int]) -> list[bytes]:
    """Cuts a prompt into whole blocks."""
    if len(prompt_ids) < BLOCK_TOKENS:
        return []
    tokens = array("I", prompt_ids).tobytes()
    whole = len(tokens) - len(tokens) % _BLOCK_BYTES
    return [tokens[start : start + _BLOCK_BYTES] for start in range(0, whole, _BLOCK_BYTES)]


class PrefixCache:
    """Blocks that have been computed."""

    def __init__(self, tokens: int) -> None:
        """Starts empty.

        Args:
            tokens: that fit.
        """
        # Number of each block, by the number of the one before. Numbers are never used again, so
        # what hangs below a block that made room is not found any more.
        self._numbers: OrderedDict[tuple[Root | int, bytes], int] = OrderedDict()
        self._next = count(1)
        self._most = tokens // BLOCK_TOKENS

    def __len__(self) -> int:
        """Returns how many blocks there are."""
        return len(self._numbers)

    def find(self, root: Root, blocks: Sequence[bytes], prompt_tokens: int) -> int:
        """Returns how many tokens of a prompt need not be computed. At least one always is."""
        before: Root | int = root
        for at, block in enumerate(blocks[: (prompt_tokens - 1) // BLOCK_TOKENS]):
            number = self._numbers.get((before, block))
            if number is None:
                return at * BLOCK_TOKENS
            before = number
        return (prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS

    def keep(self, root: Root, blocks: Sequence[bytes]) -> None:
        """Keeps the blocks of a prompt."""
        before: Root | int = root
        path = []
        for block in blocks:
            key = (before, block)
            number = self._numbers.get(key)
            if number is None:
                number = self._numbers[key] = next(self._next)
            path.append(key)
            before = number
        # The end goes first when room is needed: beginnings are shared by more.
        for key in reversed(path):
            self._numbers.move_to_end(key)
        while len(self._numbers) > self._most:
            self._numbers.popitem(last=False)
