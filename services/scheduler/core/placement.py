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

Pick: the lowest score of those with a free slot; among equals the one that got its last slot
longest ago, so that idle workers take turns. The rest, in the same order and full ones last, are
the fallbacks. O(n log n) in the workers of the version.
"""

from __future__ import annotations

from services.scheduler.core.messages import Target
from services.scheduler.core.state import State, Worker

KV_WEIGHT = 0.25


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


def target_of(worker: Worker) -> Target:
    """Says how to reach a worker."""
    return Target(worker=worker.name, endpoint=worker.registration.endpoint, epoch=worker.epoch)


def _rank(worker: Worker) -> tuple[bool, float, int]:
    return worker.free <= 0, score(worker), worker.granted_turn
