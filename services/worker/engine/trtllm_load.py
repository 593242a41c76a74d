"""What TensorRT-LLM's statistics of iterations say about the load. Pure.

A field that is missing or null is not known: older versions do not have it, and nothing may be
taken for idle that was only not told. There are no statistics while nothing runs, so what was told
last gets old.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

_NO_RANK: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KvUse:
    """The KV cache of one rank or of all.

    Attributes:
        used_tokens: in blocks that are in use.
        total_tokens: that fit; None when that is not told.
    """

    used_tokens: int
    total_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What statistics have said so far.

    Attributes:
        iteration: the highest number; None when none has been told.
        kv: of the KV cache; None when that is not told.
    """

    iteration: int | None = None
    kv: KvUse | None = None


class StatsReader:
    """Reads statistics in order. Belongs to one thread."""

    def __init__(self) -> None:
        self._iteration: int | None = None
        self._by_rank: dict[int, KvUse] = {}

    def read(self, records: Iterable[Mapping[str, object] | str]) -> Measured:
        """Returns what is known after these; with attention data parallelism, of all ranks."""
        for record in records:
            try:
                self._take(json.loads(record) if isinstance(record, str) else record)
            except (ValueError, TypeError, AttributeError):
                # One that cannot be read says nothing.
                continue
        return Measured(iteration=self._iteration, kv=self._sum())

    def _take(self, record: Mapping[str, object]) -> None:
        iteration = record.get("iter")
        if isinstance(iteration, int):
            self._iteration = max(iteration, self._iteration or 0)
        rank = record.get("attentionDpRank")
        use = _read_kv(record.get("kvCacheStats"))
        if use is not None:
            self._by_rank[rank if isinstance(rank, int) else _NO_RANK] = use

    def _sum(self) -> KvUse | None:
        uses = list(self._by_rank.values())
        if not uses:
            return None
        totals = [use.total_tokens for use in uses if use.total_tokens is not None]
        return KvUse(
            used_tokens=sum(use.used_tokens for use in uses),
            total_tokens=sum(totals) if len(totals) == len(uses) else None,
        )


def _read_kv(stats: object) -> KvUse | None:
    if not isinstance(stats, Mapping):
        return None
    block, used, total = (
        stats.get(name) for name in ("tokensPerBlock", "usedNumBlocks", "maxNumBlocks")
    )
    if not isinstance(block, int) or not isinstance(used, int):
        return None
    return KvUse(
        used_tokens=used * block,
        total_tokens=total * block if isinstance(total, int) and total > 0 else None,
    )
