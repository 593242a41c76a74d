"""Where an execution goes: filter, score, pick. Policy `least_load`.

Pure. Filter: workers that are ready, serve the version and are not excluded.
Score, lower is better:

    score = slots_in_use / max_running  +  KV_WEIGHT * kv_used_tokens / kv_total_tokens

    slots_in_use     executions granted and not ended, counted here: exact and current
    max_running      executions that the worker runs at the same time, as it registered
    kv_used_tokens   tokens in its KV cache, as last reported: up to a heartbeat old
    kv_total_tokens  tokens that fit into it

Both terms are shares without a unit. The count leads, for it is never stale; the cache tells
workers apart whose executions differ in length. A missing KV signal counts as an empty cache:
engines that do not measure it compete by their slots alone. A slow worker needs no signal of its
own: it keeps its slots for longer and so gets fewer.

Pick: the lowest score of those with a free slot; if there is none, of those with a spare to take
back; among equals the one that got its last slot longest ago, so that idle workers take turns. The
rest, in the same order and full ones last, are the fallbacks. O(n log n) in the workers of the
version.

Spares are given one by one, each to the worker with the lowest score of those with ample room. A
worker has it while its spares, one more included, are at most a quarter of its room (free slots and
spares), rounded down: so one of fewer than four slots never gives any.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from services.scheduler.core.messages import Target
from services.scheduler.core.state import State, Worker

KV_WEIGHT = 0.25
# One spare for each so many slots of a worker's room.
ROOM_FOR_SPARE = 4


def ranked(state: State, model_version: str, excluded: frozenset[str]) -> list[Worker]:
    """Lists the workers that may run an execution, best first, full ones last."""
    ready = state.ready.get(model_version)
    if ready is None:
        return []
    return sorted((item for name, item in ready.items() if name not in excluded), key=_rank)


def score(worker: Worker) -> float:
    """Returns how loaded a worker is, from 0."""
    used = len(worker.slots) / worker.registration.info.max_running
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


def _rank(worker: Worker) -> tuple[bool, bool, float, int]:
    return worker.free <= 0, worker.room <= 0, score(worker), worker.granted_turn
