"""The simulated prefix cache: which beginnings of prompts have been computed already.

Prompts are cut into blocks of BLOCK_TOKENS tokens. A block is found below the block before it, and
the first one below its salt and adapter: who has another salt can neither hit a block nor find out
that it is there. The blocks that were unused for longest make room.

Whoever watches is told the tokens only: equal blocks below several salts and adapters are there for
as long as one of them is.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import count

from services.worker.engine.base import EngineRequest
from services.worker.engine.kv_events import KvEvent, KvRemoved, KvStored

BLOCK_TOKENS = 16
_BLOCK_BYTES = BLOCK_TOKENS * array("I").itemsize
_NAME_BYTES = 8

Root = tuple[bytes, str]
"""Salt and digest of the adapter; empty for none."""


def root_of(request: EngineRequest) -> Root:
    """Returns what only equal ones share the cache."""
    return request.cache_salt, request.adapter.digest if request.adapter is not None else ""


def blocks_of(prompt_ids: Sequence[int]) -> list[bytes]:
    """Cuts a prompt into whole blocks: the bytes of int32, little-endian."""
    if len(prompt_ids) < BLOCK_TOKENS:
        return []
    column = array("I", prompt_ids)
    if sys.byteorder == "big":
        column.byteswap()
    tokens = column.tobytes()
    whole = len(tokens) - len(tokens) % _BLOCK_BYTES
    return [tokens[start : start + _BLOCK_BYTES] for start in range(0, whole, _BLOCK_BYTES)]


class PrefixCache:
    """Blocks that have been computed."""

    def __init__(self, tokens: int) -> None:
        """Starts empty.

        Args:
            tokens: that fit.
        """
        # Number and name of each block, by the number of the one before. Numbers are never used
        # again, so what hangs below a block that made room is not found any more.
        self._blocks: OrderedDict[tuple[Root | int, bytes], tuple[int, int]] = OrderedDict()
        self._next = count(1)
        self._most = tokens // BLOCK_TOKENS
        # Blocks with the same name: one for each salt and adapter.
        self._copies: dict[int, int] = {}

    def __len__(self) -> int:
        """Returns how many blocks there are."""
        return len(self._blocks)

    def find(self, root: Root, blocks: Sequence[bytes], prompt_tokens: int) -> int:
        """Returns how many tokens of a prompt need not be computed. At least one always is."""
        before: Root | int = root
        for at, block in enumerate(blocks[: (prompt_tokens - 1) // BLOCK_TOKENS]):
            found = self._blocks.get((before, block))
            if found is None:
                return at * BLOCK_TOKENS
            before = found[0]
        return (prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS

    def keep(self, root: Root, blocks: Sequence[bytes]) -> list[KvEvent]:
        """Keeps the blocks of a prompt. A new block costs 1 us more than one that is there.

        Returns:
            what came and went: first what made room, so that nobody ever hears of more blocks than
            fit.
        """
        before: Root | int = root
        name: int | None = None
        parent: int | None = None
        stored: list[int] = []
        path = []
        for block in blocks[: self._most]:
            key = (before, block)
            found = self._blocks.get(key)
            if found is None:
                found = self._blocks[key] = (next(self._next), name_of(name, block))
                if self._add_copy(found[1]):
                    # What is new to everybody is the end of the path: below it all is new, too.
                    parent = parent if stored else name
                    stored.append(found[1])
            path.append(key)
            before, name = found
        # The end goes first when room is needed: beginnings are shared by more.
        for key in reversed(path):
            self._blocks.move_to_end(key)
        events: list[KvEvent] = []
        if removed := self._make_room():
            events.append(KvRemoved(removed))
        if stored:
            events.append(KvStored(tuple(stored), parent))
        return events

    def _add_copy(self, name: int) -> bool:
        """Counts a block; tells whether it is the first with its name."""
        copies = self._copies.get(name, 0)
        self._copies[name] = copies + 1
        return not copies

    def _make_room(self) -> tuple[int, ...]:
        """Drops what is too much; returns the names of which nothing is left."""
        removed = []
        while len(self._blocks) > self._most:
            _, (_, name) = self._blocks.popitem(last=False)
            self._copies[name] -= 1
            if not self._copies[name]:
                del self._copies[name]
                removed.append(name)
        return tuple(removed)


def name_of(parent: int | None, block: bytes) -> int:
    """Names a block as `kv_events.chain` does, from what `blocks_of` has cut: in half the time."""
    data = (parent or 0).to_bytes(_NAME_BYTES, "little") + block
    return int.from_bytes(blake2b(data, digest_size=_NAME_BYTES).digest(), "little")
