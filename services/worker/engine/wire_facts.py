"""Frames that say what an engine is: its settings, its start, its abilities, its prefix cache."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from services.worker.engine.base import (
    ConstraintKind,
    EngineAbilities,
    EngineInfo,
    LoadProgress,
    LoadStage,
)
from services.worker.engine.kv_events import KvCleared, KvEvent, KvRemoved, KvStored, KvTier
from services.worker.engine.wire import Columns, Kind, Value, column, frame, pack_control

Setting = Value | Sequence["Setting"] | Mapping[str, "Setting"]
"""What a child is told at its start: all that JSON can say."""

_KV: Final = struct.Struct("=BBBI")
_TIERS: Final = tuple(KvTier)
_KV_EVENTS: Final = (KvStored, KvRemoved, KvCleared)


def pack_settings(settings: Mapping[str, Setting]) -> bytes:
    """Makes a START frame."""
    return frame(Kind.START, json.dumps(settings).encode())


def unpack_settings(body: bytes) -> dict[str, Setting]:
    """Reads a START body."""
    settings: dict[str, Setting] = json.loads(body)
    return settings


def pack_progress(progress: LoadProgress) -> bytes:
    """Makes a PROGRESS frame."""
    values = {"stage": progress.stage.value, "fraction": progress.fraction}
    return pack_control(Kind.PROGRESS, values)


def unpack_progress(body: bytes) -> LoadProgress:
    """Reads a PROGRESS body."""
    values = json.loads(body)
    return LoadProgress(LoadStage(values["stage"]), values["fraction"])


def pack_ready(info: EngineInfo, kv_total_tokens: int | None) -> bytes:
    """Makes a READY frame.

    Args:
        info: of the engine.
        kv_total_tokens: that fit into the KV cache; None when that is not known.
    """
    facts = dataclasses.asdict(info)
    facts["abilities"]["constraints"] = [kind.value for kind in info.abilities.constraints]
    return frame(Kind.READY, json.dumps([facts, kv_total_tokens]).encode())


def unpack_ready(body: bytes) -> tuple[EngineInfo, int | None]:
    """Reads a READY body."""
    facts, kv_total_tokens = json.loads(body)
    able = facts.pop("abilities")
    kinds = frozenset(map(ConstraintKind, able.pop("constraints")))
    abilities = EngineAbilities(constraints=kinds, **able)
    return EngineInfo(abilities=abilities, **facts), kv_total_tokens


def pack_kv(events: Sequence[KvEvent]) -> bytes:
    """Makes a KV frame."""
    parts = []
    for event in events:
        hashes = () if isinstance(event, KvCleared) else event.hashes
        parent = event.parent if isinstance(event, KvStored) else None
        tier = event.tier if isinstance(event, KvStored) else KvTier.DEVICE
        code = _KV_EVENTS.index(type(event))
        parts.append(_KV.pack(code, _TIERS.index(tier), parent is not None, len(hashes)))
        parts.append(column("Q", hashes if parent is None else (parent, *hashes)))
    return frame(Kind.KV, b"".join(parts))


def unpack_kv(body: bytes) -> list[KvEvent]:
    """Reads a KV body."""
    events: list[KvEvent] = []
    columns = Columns(body, 0)
    while not columns.is_over:
        code, tier, has_parent, count = columns.take_fixed(_KV)
        parent = columns.take("Q", 1)[0] if has_parent else None
        hashes = columns.take("Q", count)
        kind = _KV_EVENTS[code]
        if kind is KvStored:
            events.append(KvStored(hashes, parent, _TIERS[tier]))
        else:
            events.append(KvRemoved(hashes) if kind is KvRemoved else KvCleared())
    return events
