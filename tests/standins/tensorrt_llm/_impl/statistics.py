"""Iteration statistics as get_stats() gives them, and the queues that carry them out."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from .cache import KvCache
from .results import Mailbox
from .settings import Settings

Stats = dict[str, object]
_POLL_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What happened in one iteration.

    Attributes:
        number: of the iteration.
        latency_s: of the iteration.
        new: requests that started.
        active: requests in the batch, those that ended in it too.
        queued: requests outside.
        completed: requests that ended.
        contexts: requests whose prompt was computed.
        context_tokens: of them.
        generating: requests that got a token, and had got one before.
        generating_tokens: in their KV caches.
        paused: requests that were thrown out.
        queued_tokens: of prompts outside.
        decoded: tokens per generating request.
    """

    number: int
    latency_s: float
    new: int
    active: int
    queued: int
    completed: int
    contexts: int
    context_tokens: int
    generating: int
    generating_tokens: int
    paused: int
    queued_tokens: int
    decoded: float


def describe(
    counts: Counts, cache: KvCache, *, batch_max: int, settings: Settings, is_new: bool
) -> Stats:
    """One entry, as JSON would give it."""
    batching: Stats = {
        "numScheduledRequests": counts.contexts + counts.generating,
        "numContextRequests": counts.contexts,
        "numGenRequests": counts.generating,
        "numPausedRequests": counts.paused,
        "numCtxTokens": counts.context_tokens,
        "microBatchId": 0,
        "avgNumDecodedTokensPerIter": counts.decoded,
    }
    found: Stats = {
        "timestamp": time.strftime("%m-%d-%Y %H:%M:%S.000000"),
        "iter": counts.number,
        "iterLatencyMS": counts.latency_s * 1000,
        "newActiveRequestsQueueLatencyMS": 0.0,
        "numNewActiveRequests": counts.new,
        "numActiveRequests": counts.active,
        "numQueuedRequests": counts.queued,
        "numCompletedRequests": counts.completed,
        "maxNumActiveRequests": batch_max,
        "gpuMemUsage": 1 << 33,
        "cpuMemUsage": 0,
        "pinnedMemUsage": 0,
        "kvCacheStats": _cache_stats(cache),
        "staticBatchingStats": None,
        "inflightBatchingStats": batching,
        "specDecodingStats": None,
    }
    for kind in ("Static", "TunerRecommended", "Runtime"):
        found[f"maxBatchSize{kind}"] = found[f"maxNumTokens{kind}"] = 0
    if is_new:
        batching |= {
            "numCtxKvTokens": counts.context_tokens,
            "numGenKvTokens": counts.generating_tokens,
            "numQueuedContextRequests": counts.queued,
            "numQueuedCtxTokens": counts.queued_tokens,
            "numQueuedGenRequests": 0,
            "numQueuedGenKvTokens": 0,
            "numPausedKvTokens": 0,
        }
        found["attentionDpRank"] = 0
    if settings.named("stats_null_kv"):
        found["kvCacheStats"] = None
    for fault in settings.named("stats_missing"):
        _remove(found, fault.texts("keys"))
    return found


def _cache_stats(cache: KvCache) -> Stats:
    asked = cache.reused + cache.missed
    return {
        "maxNumBlocks": cache.blocks_max,
        "freeNumBlocks": cache.blocks_max - cache.used,
        "usedNumBlocks": cache.used,
        "tokensPerBlock": cache.tokens_per_block,
        "allocTotalBlocks": cache.allocated,
        "allocNewBlocks": cache.allocated,
        "reusedBlocks": cache.reused,
        "missedBlocks": cache.missed,
        "cacheHitRate": cache.reused / asked if asked else 0.0,
    }


def _remove(found: Stats, keys: Iterable[str]) -> None:
    """Removes keys, also inside of others: "kvCacheStats.usedNumBlocks"."""
    for key in keys:
        outer, _, inner = key.partition(".")
        nested = found.get(outer)
        if inner and isinstance(nested, dict):
            nested.pop(inner, None)
        else:
            found.pop(key, None)


class IterationResult:
    """The queue of the older versions: one for the engine's whole life.

    It belongs to the event loop that ran at the first request. When nothing has come for a while
    it is done, until the next request.
    """

    def __init__(self, length_max: int) -> None:
        self.mailbox: Mailbox[Stats] = Mailbox(length_max)
        self._done = False
        self._timeout_s: float | None = 2.0

    def set_timeout(self, timeout: float | None) -> None:
        """Sets after how many seconds without an entry it is done."""
        self._timeout_s = timeout

    def mark_undone(self) -> None:
        """A new request has come: more is to be expected."""
        self._done = False

    def get_results(self) -> list[Stats]:
        """All entries, in whatever thread."""
        found: list[Stats] = []
        until_s = time.monotonic() + (self._timeout_s or 0.0)  # noqa: TID251 - of the engine
        while not self._done:
            try:
                found.append(self.mailbox.get_sync(self._timeout_s))
            except queue.Empty:
                self._done = time.monotonic() >= until_s  # noqa: TID251 - of the engine
                time.sleep(_POLL_S)
        return found

    def __aiter__(self) -> IterationResult:
        return self

    async def __anext__(self) -> Stats:
        if self._done:
            raise StopAsyncIteration
        try:
            return await self.mailbox.get(self._timeout_s)
        except TimeoutError:
            self._done = True
            raise StopAsyncIteration from None


class FetchedResult:
    """What one call of the newer versions has fetched."""

    def __init__(self, entries: list[Stats]) -> None:
        self._entries = deque(entries)

    def __aiter__(self) -> FetchedResult:
        return self

    async def __anext__(self) -> Stats:
        if not self._entries:
            raise StopAsyncIteration
        return self._entries.popleft()

    def get_results(self) -> list[Stats]:
        """All that is left."""
        found = list(self._entries)
        self._entries.clear()
        return found
