"""The KV cache: blocks that requests with the same beginning, salt and adapter share.

It is a tree: a block hangs below the block before it. What a request holds is not dropped; of the
rest, the block that nobody has used for longest goes first, leaves before branches: to the host's
memory where there is room, else for good. Every change is an event.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Event = dict[str, object]
Root = tuple[str | None, int | None]
"""Salt and adapter: what splits the cache."""

_PRIORITY = 35
_BYTES_PER_TOKEN = 1024


@dataclass(slots=True)
class Block:
    """Tokens in the cache, behind those of its parent.

    Attributes:
        tokens: as many as fit in a block, or fewer in the last one of a request.
        digest: names it in events: 64 bits, never negative.
        parent: the block before; None for the first.
        root: salt and adapter.
        level: 0 in the GPU's memory, 1 in the host's.
        holders: requests that need it now.
        used: grows with each use.
    """

    tokens: tuple[int, ...]
    digest: int
    parent: Block | None
    root: Root
    level: int = 0
    holders: int = 0
    used: int = 0
    children: dict[tuple[int, ...], Block] = field(default_factory=dict)


@dataclass(slots=True)
class Held:
    """What one request holds.

    Attributes:
        blocks: shared ones, first to last.
        cached: tokens of the prompt that were there.
        reserved: blocks that are set aside for it besides.
    """

    blocks: list[Block]
    cached: int
    reserved: int


class KvCache:
    """All blocks of one engine. Belongs to its thread."""

    def __init__(
        self,
        *,
        blocks: int,
        tokens_per_block: int,
        reuse: bool,
        partial_reuse: bool,
        host_bytes: int,
        windows: Sequence[int],
        rank: int | None,
        events_max: int,
        with_salts: bool,
    ) -> None:
        self.blocks_max = blocks
        self.tokens_per_block = tokens_per_block
        self.allocated = self.reused = self.missed = 0
        self.events: deque[Event] = deque(maxlen=events_max)
        self._reuse, self._partial_reuse = reuse, partial_reuse
        self._host_max = host_bytes // (tokens_per_block * _BYTES_PER_TOKEN)
        self._windows, self._rank, self._with_salts = windows, rank, with_salts
        self._roots: dict[Root, dict[tuple[int, ...], Block]] = {}
        self._ticks, self._event_ids = itertools.count(1), itertools.count()
        # Blocks set aside, blocks that are held, and blocks in the GPU's memory.
        self._reserved = self._held = self._resident = 0
        if events_max and reuse:
            self._tell({"type": "created", "num_blocks_per_cache_level": [blocks, self._host_max]})

    @property
    def used(self) -> int:
        """Blocks in the GPU's memory that requests hold, or that are set aside for them."""
        return self._reserved + self._held

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.tokens_per_block)

    def begin(self, root: Root, prompt: Sequence[int], blocks: int) -> Held | None:
        """Finds what is there of a prompt, and sets the rest aside.

        Args:
            root: salt and adapter.
            prompt: its last token is always computed.
            blocks: that the request may come to need, all together.

        Returns:
            None while there is no room.
        """
        found, cached = self._find(root, prompt[:-1]) if self._reuse else ([], 0)
        fresh = blocks - len(found)
        returning = sum(1 for block in found if not block.holders)
        if self.used + fresh + returning > self.blocks_max:
            return None
        for block in found:
            self._hold(block)
        self._reserved += fresh
        self.allocated += fresh
        self.reused += len(found)
        self.missed += fresh
        self._make_room()
        return Held(found, cached, fresh)

    def grow(self, held: Held, blocks: int) -> bool:
        """Sets more aside; False while there is no room."""
        more = blocks - len(held.blocks) - held.reserved
        if more <= 0:
            return True
        if self.used + more > self.blocks_max:
            return False
        held.reserved += more
        self._reserved += more
        self.allocated += more
        self._make_room()
        return True

    def store(self, root: Root, held: Held, tokens: Sequence[int], *, partial: bool) -> None:
        """Makes computed tokens findable, whole blocks first.

        Args:
            root: salt and adapter.
            held: of the request that has computed them.
            tokens: all that is computed, from the first of the prompt on.
            partial: whether the tokens of a last block that is not full count too.
        """
        if not self._reuse:
            return
        size = self.tokens_per_block
        parent = held.blocks[-1] if held.blocks else None
        fresh: list[Block] = []
        for start in range(len(held.blocks) * size, len(tokens), size):
            piece = tuple(tokens[start : start + size])
            if len(piece) < size and not partial:
                break
            block, is_fresh = self._put(root, parent, piece)
            self._hold(block)
            if held.reserved:
                held.reserved -= 1
                self._reserved -= 1
            held.blocks.append(block)
            if is_fresh:
                fresh.append(block)
            parent = block
        self._tell_stored(fresh)

    def end(self, held: Held) -> None:
        """Lets go of what a request held; what is stored stays until the room is needed."""
        for block in held.blocks:
            block.holders -= 1
            self._held -= not block.holders
        self._reserved -= held.reserved
        held.blocks, held.reserved = [], 0
        self._make_room()

    def take_events(self) -> list[Event]:
        """The events since the last time; the oldest are lost when there were too many."""
        found = list(self.events)
        self.events.clear()
        return found

    def _find(self, root: Root, tokens: Sequence[int]) -> tuple[list[Block], int]:
        size = self.tokens_per_block
        children = self._roots.get(root, {})
        found: list[Block] = []
        cached = 0
        while cached + size <= len(tokens):
            block = children.get(tuple(tokens[cached : cached + size]))
            if block is None:
                break
            found.append(block)
            cached += size
            children = block.children
        if self._partial_reuse:
            rest = tokens[cached:]
            cached += max((_common(piece, rest) for piece in children), default=0)
        return found, cached

    def _put(self, root: Root, parent: Block | None, piece: tuple[int, ...]) -> tuple[Block, bool]:
        siblings = self._roots.setdefault(root, {}) if parent is None else parent.children
        block = siblings.get(piece)
        if block is not None:
            return block, False
        for shorter in [other for other in siblings if other == piece[: len(other)]]:
            if not siblings[shorter].holders:
                self._remove(siblings[shorter])
        block = Block(piece, _digest(root, parent, piece), parent, root)
        siblings[piece] = block
        self._resident += 1
        return block, True

    def _hold(self, block: Block) -> None:
        self._held += not block.holders
        block.holders += 1
        block.used = next(self._ticks)
        self._move(block, 0)

    def _make_room(self) -> None:
        """Drops what nobody holds until everything fits."""
        over = self._resident + self._reserved - self.blocks_max
        if over <= 0:
            return
        resident = [block for block in self._all() if not block.level]
        while over > 0:
            free = [
                block
                for block in resident
                if not block.holders and all(child.level for child in block.children.values())
            ]
            if not free:
                return
            oldest = min(free, key=lambda block: block.used)
            self._drop(oldest)
            resident.remove(oldest)
            over -= 1

    def _drop(self, block: Block) -> None:
        if self._host_max:
            outside = [other for other in self._all() if other.level and not other.children]
            if sum(1 for other in self._all() if other.level) >= self._host_max and outside:
                self._remove(min(outside, key=lambda other: other.used))
            self._move(block, 1)
        else:
            self._remove(block)

    def _remove(self, block: Block) -> None:
        for child in list(block.children.values()):
            self._remove(child)
        siblings = self._roots[block.root] if block.parent is None else block.parent.children
        del siblings[block.tokens]
        self._resident -= not block.level
        self._tell({"type": "removed", "block_hashes": [block.digest]})

    def _move(self, block: Block, level: int) -> None:
        if block.level == level:
            return
        self._resident += 1 if level == 0 else -1
        change = {"type": "event_diff", "new_value": level, "old_value": block.level}
        block.level = level
        same = {"type": "event_diff", "new_value": _PRIORITY, "old_value": _PRIORITY}
        data = {"type": "updated", "block_hash": block.digest, "cache_level": change}
        self._tell({**data, "priority": same})

    def _all(self) -> Iterator[Block]:
        waiting = [block for blocks in self._roots.values() for block in blocks.values()]
        while waiting:
            block = waiting.pop()
            waiting.extend(block.children.values())
            yield block

    def _tell_stored(self, blocks: list[Block]) -> None:
        if not blocks:
            return
        parent = blocks[0].parent
        data: Event = {
            "type": "stored",
            "parent_hash": None if parent is None else parent.digest,
            "blocks": [self._described(block) for block in blocks],
        }
        if self._with_salts and blocks[0].root[1] is not None:
            data["lora_name"] = str(blocks[0].root[1])
        self._tell(data)

    def _described(self, block: Block) -> Event:
        tokens = [
            {"type": "unique_token", "token_id": token_id, "token_extra_id": 0}
            for token_id in block.tokens
        ]
        found: Event = {
            "type": "stored_block",
            "block_hash": block.digest,
            "tokens": tokens,
            "cache_level": block.level,
            "priority": _PRIORITY,
        }
        return {**found, "cache_salt": block.root[0]} if self._with_salts else found

    def _tell(self, data: Event) -> None:
        if not self.events.maxlen:
            return
        # Each window of attention has blocks of its own, and they are told one by one.
        for window in self._windows:
            event: Event = {"event_id": next(self._event_ids), "data": data, "window_size": window}
            if self._rank is not None:
                event["attention_dp_rank"] = self._rank
            self.events.append(event)


def _common(piece: Sequence[int], tokens: Sequence[int]) -> int:
    count = 0
    for one, other in zip(piece, tokens, strict=False):
        if one != other:
            break
        count += 1
    return count


def _digest(root: Root, parent: Block | None, piece: tuple[int, ...]) -> int:
    text = repr((root, parent.digest if parent else None, piece)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") | 1 << 63
