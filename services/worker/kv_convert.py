"""From changes of a prefix cache to messages. Pure and total."""

from __future__ import annotations

from maas.engine.v1 import engine_pb2
from maas.engine.v1 import engine_service_pb2 as engine_service_pb

from services.worker.engine.kv_events import KvEvent, KvRemoved, KvStored, KvTier
from services.worker.kv_watch import KvChanges

_TIERS = {
    KvTier.DEVICE: engine_pb2.KV_TIER_DEVICE,
    KvTier.HOST: engine_pb2.KV_TIER_HOST,
}


def changes_to_pb(changes: KvChanges) -> engine_service_pb.WatchKvEventsResponse:
    """Makes one message to a watcher."""
    return engine_service_pb.WatchKvEventsResponse(
        batch=engine_pb2.KvEventBatch(
            sequence=changes.sequence, events=map(event_to_pb, changes.events)
        ),
        snapshot_complete=changes.completes_listing,
    )


def event_to_pb(event: KvEvent) -> engine_pb2.KvEvent:
    """Describes one change."""
    if isinstance(event, KvStored):
        return engine_pb2.KvEvent(
            stored=engine_pb2.KvStored(
                block_hashes=event.hashes, parent_hash=event.parent, tier=_TIERS[event.tier]
            )
        )
    if isinstance(event, KvRemoved):
        return engine_pb2.KvEvent(removed=engine_pb2.KvRemoved(block_hashes=event.hashes))
    return engine_pb2.KvEvent(cleared=engine_pb2.KvCleared())
