"""Events of TensorRT-LLM's KV cache, as changes of the prefix cache that all engines tell alike.

TensorRT-LLM names a block by a hash of its own, of tokens, salt and adapter; here a block's name is
that of its tokens and all before it. Several of its blocks may so have one name: the name is stored
with the first and removed with the last.

What is left out: blocks that are not full, and those behind them; blocks with more than text in
them; and, where a model has several attention windows, all but the largest: a prefix is only as
good as the window that reaches furthest. Events count up on each rank. Where one is missing, too
many blocks are known, or an event cannot be read, all is forgotten and that is told.

Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.worker.engine.kv_events import (
    KvCleared,
    KvEvent,
    KvRemoved,
    KvStored,
    KvTier,
    chain,
)

BLOCKS_MAX: Final = 2_000_000
"""Most blocks that are known at once: 64 million tokens of 32 each."""

_DEVICE_LEVEL: Final = 0


class _Unreadable(Exception):
    """An event is not as they have always been."""


@dataclass(slots=True)
class _Block:
    """A block of the engine.

    Attributes:
        name: as we call it.
        parent: name of the block before; None at the beginning of a prompt.
        is_on_device: in the GPU's memory.
    """

    name: int
    parent: int | None
    is_on_device: bool


@dataclass(slots=True)
class _Copies:
    """The engine's blocks with one name.

    Attributes:
        count: of them.
        on_device: of them.
    """

    count: int = 0
    on_device: int = 0

    @property
    def tier(self) -> KvTier:
        return KvTier.DEVICE if self.on_device else KvTier.HOST


@dataclass(slots=True)
class _Rank:
    """What one rank has told.

    Attributes:
        blocks: by the engine's hash.
        next_id: of its next event; None before the first.
    """

    blocks: dict[int, _Block] = field(default_factory=dict)
    next_id: int | None = None


class KvTranslator:
    """Reads events in order. Belongs to one thread.

    Args:
        block_tokens: of a full block.
        blocks_max: most blocks that are known at once.
    """

    def __init__(self, block_tokens: int, blocks_max: int = BLOCKS_MAX) -> None:
        self._block_tokens = block_tokens
        self._blocks_max = blocks_max
        self._window = -1
        self._ranks: dict[int, _Rank] = {}
        self._copies: dict[int, _Copies] = {}
        self._told: list[KvEvent] = []

    def translate(self, records: Iterable[Mapping[str, object] | str]) -> list[KvEvent]:
        """Returns what has changed; nothing for most events."""
        for record in records:
            try:
                self._take(json.loads(record) if isinstance(record, str) else record)
            except (_Unreadable, ValueError, TypeError, LookupError, AttributeError, OverflowError):
                self._forget()
            if len(self._copies) > self._blocks_max:
                self._forget()
        told, self._told = self._told, []
        return told

    def _forget(self) -> None:
        """Knows nothing any more. Numbers of events stay, as what comes can be read again."""
        for rank in self._ranks.values():
            rank.blocks.clear()
        self._copies.clear()
        self._told.append(KvCleared())

    def _take(self, record: Mapping[str, object]) -> None:
        rank = self._rank_of(record)
        data = record["data"]
        if not isinstance(data, Mapping):
            raise _Unreadable
        kind = data["type"]
        window = record.get("window_size")
        if isinstance(window, int) and window != self._window:
            if window < self._window:
                return
            if self._window >= 0 and self._copies:
                self._forget()
            self._window = window
        if kind == "stored":
            self._store(rank, data)
        elif kind == "removed":
            self._remove(rank, _hashes_in(data["block_hashes"]))
        elif kind == "updated":
            self._update(rank, data)

    def _rank_of(self, record: Mapping[str, object]) -> _Rank:
        """Finds the rank and counts its events."""
        number, event_id = record.get("attention_dp_rank"), _int_in(record["event_id"])
        rank = self._ranks.setdefault(number if isinstance(number, int) else 0, _Rank())
        # The same number again is that of another window.
        if rank.next_id is not None and event_id not in {rank.next_id, rank.next_id - 1}:
            self._forget()
        rank.next_id = event_id + 1
        return rank

    def _store(self, rank: _Rank, data: Mapping[str, object]) -> None:
        parent: int | None = None
        if data["parent_hash"] is not None:
            known = rank.blocks.get(_hash_in(data["parent_hash"]))
            if known is None:
                # It was left out, or forgotten: nobody can say what stands before these.
                return
            parent = known.name
        blocks = data["blocks"]
        if not isinstance(blocks, Sequence):
            raise _Unreadable
        run = _Run(parent)
        for block in blocks:
            token_ids = self._token_ids_of(block)
            if token_ids is None:
                break
            name = chain(parent, token_ids)
            is_on_device = block.get("cache_level", _DEVICE_LEVEL) == _DEVICE_LEVEL
            block_hash = _hash_in(block["block_hash"])
            if block_hash not in rank.blocks:
                rank.blocks[block_hash] = _Block(name, parent, is_on_device)
                if self._add(name, is_on_device=is_on_device):
                    run = self._extend(run, name, parent)
            parent = name
        self._finish(run)

    def _token_ids_of(self, block: Mapping[str, object]) -> list[int] | None:
        """The tokens of a full block of text; None for others."""
        tokens = block["tokens"]
        if not isinstance(tokens, Sequence) or len(tokens) != self._block_tokens:
            return None
        if block.get("mm_keys") or any(_has_more(token) for token in tokens):
            return None
        return [
            _int_in(token["token_id"] if isinstance(token, Mapping) else token) for token in tokens
        ]

    def _add(self, name: int, *, is_on_device: bool) -> bool:
        """Counts a block; returns whether that is to be told."""
        copies = self._copies.get(name)
        if copies is None:
            copies = self._copies[name] = _Copies()
        before = copies.tier if copies.count else None
        copies.count += 1
        copies.on_device += is_on_device
        return copies.tier is not before

    def _extend(self, run: _Run, name: int, parent: int | None) -> _Run:
        """Adds a block to those that follow each other in one tier, or begins anew."""
        tier = self._copies[name].tier
        if not run.names or (run.tier is tier and run.names[-1] == parent):
            if not run.names:
                run.parent, run.tier = parent, tier
            run.names.append(name)
            return run
        self._finish(run)
        return _Run(parent, tier, [name])

    def _finish(self, run: _Run) -> None:
        if run.names:
            self._told.append(KvStored(tuple(run.names), run.parent, run.tier))

    def _remove(self, rank: _Rank, hashes: Iterable[int]) -> None:
        gone: list[int] = []
        for block_hash in hashes:
            block = rank.blocks.pop(block_hash, None)
            if block is None:
                continue
            copies = self._copies[block.name]
            before = copies.tier
            copies.count -= 1
            copies.on_device -= block.is_on_device
            if not copies.count:
                del self._copies[block.name]
                gone.append(block.name)
            elif copies.tier is not before:
                self._told.append(KvStored((block.name,), block.parent, copies.tier))
        if gone:
            self._told.append(KvRemoved(tuple(gone)))

    def _update(self, rank: _Rank, data: Mapping[str, object]) -> None:
        level = data.get("cache_level")
        block = rank.blocks.get(_hash_in(data["block_hash"]))
        if block is None or not isinstance(level, Mapping):
            return
        is_on_device = level["new_value"] == _DEVICE_LEVEL
        copies = self._copies[block.name]
        before = copies.tier
        copies.on_device += is_on_device - block.is_on_device
        block.is_on_device = is_on_device
        if copies.tier is not before:
            self._told.append(KvStored((block.name,), block.parent, copies.tier))


@dataclass(slots=True)
class _Run:
    """Blocks that follow each other and are told together.

    Attributes:
        parent: of the first.
        tier: of all.
        names: of them.
    """

    parent: int | None
    tier: KvTier = KvTier.DEVICE
    names: list[int] = field(default_factory=list)


def _has_more(token: object) -> bool:
    """Whether a token stands for a part of something that is no text."""
    return isinstance(token, Mapping) and bool(token.get("token_extra_id"))


def _int_in(value: object) -> int:
    if not isinstance(value, int):
        raise _Unreadable
    return value


def _hash_in(value: object) -> int:
    """A hash, without sign whichever way it was written."""
    return _int_in(value) & (2**64 - 1)


def _hashes_in(value: object) -> list[int]:
    if not isinstance(value, Sequence):
        raise _Unreadable
    return [_hash_in(one) for one in value]
