"""Where an execution goes: filter, score, pick. Policy `least_load`.

Pure. Filter: workers that are ready, serve the version, are not excluded and could run the
execution if they were idle: one that wants several places gets them on one worker.
Score, lower is better:

    score = places_in_use / max_running  +  KV_WEIGHT * kv_used_tokens / kv_total_tokens

    places_in_use    of executions granted and not ended, counted here: exact and current
    max_running      places: executions of one output that it runs at a time, as it registered
    kv_used_tokens   tokens in its KV cache, as last reported: up to a heartbeat old
    kv_total_tokens  tokens that fit into it

Both terms are shares without a unit. The count leads, for it is never stale; the cache tells
workers apart whose executions differ in length. A missing KV signal counts as an empty cache:
engines that do not measure it compete by their slots alone. A slow worker needs no signal of its
own: it keeps its slots for longer and so gets fewer.

Pick: the lowest score of those with free places enough; if there is none, of those with spares to
take back; among equals the one that got its last slot longest ago, so that idle workers take turns.
The rest, in the same order and full ones last, are the fallbacks. O(n log n) in the workers of the
version.

Affinity: a request that brings bytes goes before all others to the first worker in the order of a
hash of these bytes and the worker's name (rendezvous hashing: nothing to remember, and a worker
that comes or goes moves only the requests that it wins or had). A worker is passed over, for the
next in that order, when it has not enough free places or when the share of its places that are in
use is above that of the least used worker by more than AFFINITY_SLACK: then the cache that it may
have is not worth the crowd. Who waits in the queue takes what becomes free first.

Spares are given one by one, each to the worker with the lowest score of those with ample room. A
worker has it while its spares, one more included, are at most a quarter of its room (free slots and
spares), rounded down: so one of fewer than four slots never gives any.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator

from services.scheduler.core.messages import Target
from services.scheduler.core.state import State, Worker

KV_WEIGHT = 0.25
# One spare for each so many slots of a worker's room.
ROOM_FOR_SPARE = 4
# How much busier than the least used worker one may be that affinity prefers: half of its places.
AFFINITY_SLACK = 0.5
_HASH_BYTES = 8


def ranked(
    state: State, model_version: str, excluded: frozenset[str], places: int = 1
) -> list[Worker]:
    """Lists the workers that may run an execution, best first, full ones last."""
    ready = state.ready.get(model_version)
    if ready is None:
        return []
    if places == 1:
        return sorted((item for name, item in ready.items() if name not in excluded), key=_rank)
    able = [
        item
        for name, item in ready.items()
        if name not in excluded and places <= item.registration.info.max_running
    ]
    return sorted(able, key=lambda item: _rank(item, places))


def preferred_first(workers: list[Worker], affinity: bytes, places: int) -> list[Worker]:
    """Puts the worker that affinity prefers before the others. O(n) hashes.

    Args:
        workers: as `ranked`.
        affinity: of the request, not empty.
        places: that it wants.
    """
    if not workers:
        return workers
    most = min(_share(item) for item in workers) + AFFINITY_SLACK
    good = [item for item in workers if item.free >= places and _share(item) <= most]
    if not good:
        return workers
    preferred = max(good, key=lambda item: _weight(item, affinity))
    return [preferred, *(item for item in workers if item is not preferred)]


def _share(worker: Worker) -> float:
    """Share of a worker's places that are in use; spares are in nobody's use yet."""
    return (worker.used - len(worker.spares)) / worker.registration.info.max_running


def _weight(worker: Worker, affinity: bytes) -> bytes:
    return hashlib.blake2b(worker.name.encode(), key=affinity, digest_size=_HASH_BYTES).digest()


def score(worker: Worker) -> float:
    """Returns how loaded a worker is, from 0."""
    used = worker.used / worker.registration.info.max_running
    load = worker.load
    if load is None or load.kv_used_tokens is None or not load.kv_total_tokens:
        return used
    return used + KV_WEIGHT * load.kv_used_tokens / load.kv_total_tokens


def least_loaded_with_ample_room(workers: list[Worker]) -> Iterator[Worker]:
    """Names the worker for one spare after the other; each has to be granted before the next.

    O(n), and O(log n) for each spare.
    """
    heap = [
        (_rank(worker), index, worker)
        for index, worker in enumerate(workers)
        if has_ample_room(worker)
    ]
    heapq.heapify(heap)
    while heap:
        _, index, worker = heap[0]
        yield worker
        if has_ample_room(worker):
            heapq.heapreplace(heap, (_rank(worker), index, worker))
        else:
            heapq.heappop(heap)


def has_ample_room(worker: Worker) -> bool:
    """Tells whether a worker may give a spare, or another one."""
    return len(worker.spares) < worker.room // ROOM_FOR_SPARE


def target_of(worker: Worker) -> Target:
    """Says how to reach a worker."""
    return Target(worker=worker.name, endpoint=worker.registration.endpoint, epoch=worker.epoch)


def _rank(worker: Worker, places: int = 1) -> tuple[bool, bool, float, int]:
    return worker.free < places, worker.room < places, score(worker), worker.granted_turn
