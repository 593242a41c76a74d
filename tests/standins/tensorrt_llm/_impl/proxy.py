"""The executor as the process that serves sees it: hands requests in, carries responses out."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from typing_extensions import override

from .cache import KvCache
from .engine import Engine, Sink, Told
from .lanes import Request
from .results import (
    EngineDeadError,
    GenerationResult,
    Handler,
    Mailbox,
    RequestError,
    Response,
)
from .settings import Settings
from .statistics import FetchedResult, IterationResult, Stats

Decode = Callable[[list[int], bool], str]

_POLL_S = 0.002
_JOIN_S = 5.0


class Executor(Handler, Sink):
    """Between an event loop and the engine's thread.

    All requests have to come from one loop and one thread. There, wake-ups are lost otherwise; here
    it is an AssertionError.
    """

    def __init__(
        self,
        settings: Settings,
        decode: Decode,
        *,
        stats_max: int,
        tells_stats: bool,
        tells_events: bool,
        by_rpc: bool,
        dead_errors: bool,
    ) -> None:
        self._settings, self._decode = settings, decode
        self._tells_stats, self._tells_events = tells_stats, tells_events
        self._by_rpc, self._dead_errors = by_rpc, dead_errors
        self._results: dict[int, GenerationResult] = {}
        self._home: tuple[asyncio.AbstractEventLoop, int] | None = None
        self._last_client_id = 1
        self._error_queue: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self._fatal_error: Exception | None = None
        self._fatal_blocks_s: float | None = 0.0
        self._stats_max = stats_max
        self._stats: deque[Stats] = deque(maxlen=stats_max)
        self._events: deque[Stats] = deque()
        self._iter_stats_result: IterationResult | None = None
        self._iter_kv_events_result: IterationResult | None = None
        self._consumers = {"stats": threading.Lock(), "events": threading.Lock()}
        self.doing_shutdown = False
        self._is_closed = False
        self.engine: Engine | None = None

    @override
    def handle_background_error(self, error: str | Exception | None = None) -> None:
        """Raises an error of a request, or whatever has killed the engine."""
        if isinstance(error, str):
            raise RequestError(error)
        if error is not None:
            if not isinstance(error, RequestError):
                self._die_slowly()
            raise error
        if not self._error_queue.empty():
            found = self._error_queue.get()
            self._die_slowly()
            raise found

    @override
    def abort_request(self, request_id: int) -> None:
        """Asks the engine to stop a request."""
        if self.engine is not None:
            self.engine.cancel(request_id)

    @override
    def decode(self, token_ids: list[int], *, skip_special: bool) -> str:
        """Turns ids into text."""
        return self._decode(token_ids, skip_special)

    def next_request_id(self) -> int:
        """Counts requests."""
        self._last_client_id += 1
        return self._last_client_id

    def submit(self, request: Request, result: GenerationResult) -> None:
        """Hands a request in.

        Raises:
            AssertionError: it comes from another loop or thread than the first.
            Exception: whatever has killed the engine.
        """
        self._check_home(result)
        self._begin_iteration_results()
        self._results[request.request_id] = result
        if self.engine is not None:
            self.engine.submit(request)
        self.handle_background_error()

    def _check_home(self, result: GenerationResult) -> None:
        loop = result.queue.loop
        if loop is None:
            return
        here = (loop, threading.get_ident())
        if self._home is None:
            self._home = here
        assert self._home == here, "all requests have to come from one event loop and one thread"

    def _begin_iteration_results(self) -> None:
        for found in (self._iter_stats_result, self._iter_kv_events_result):
            if found is not None:
                found.mark_undone()
        if self._by_rpc:
            return
        if self._tells_stats and self._iter_stats_result is None:
            self._iter_stats_result = IterationResult(self._stats_max)
        if self._iter_kv_events_result is None:
            self._iter_kv_events_result = IterationResult(self._stats_max)

    @override
    def respond(self, told: Told) -> threading.Event | None:
        """Puts responses into the boxes of their readers and wakes them, all at once."""
        boxes: list[Mailbox[Response]] = []
        for request_id, response in told:
            result = self._results.get(request_id)
            if result is None:
                continue
            if response.is_final or response.error is not None:
                del self._results[request_id]
            result.queue.put(response)
            boxes.append(result.queue)
        return self._wake(boxes)

    def _wake(self, boxes: Iterable[Mailbox[Response]]) -> threading.Event | None:
        boxes = [box for box in boxes if box.loop is not None]
        if not boxes or self._home is None:
            return None
        woken = threading.Event()

        def wake() -> None:
            for box in boxes:
                box.wake()
            # Behind the readers, who run next.
            loop.call_soon(woken.set)

        loop = self._home[0]
        with contextlib.suppress(RuntimeError):  # The loop is closed; nobody reads any more.
            loop.call_soon_threadsafe(wake)
            return woken
        return None

    @override
    def take_stats(self, entry: Stats) -> None:
        """Keeps the description of an iteration; drops the oldest when nobody reads them."""
        if self._settings.named("stats_none"):
            return
        if self._by_rpc:
            self._stats.append(entry)
        elif self._iter_stats_result is not None:
            self._put(self._iter_stats_result, entry)

    @override
    def take_events(self, cache: KvCache) -> None:
        """Carries events on, for the older versions; the newer ones fetch them."""
        entries = self._faulty(cache.take_events())
        if self._by_rpc:
            self._events.extend(entries)
            while len(self._events) > (cache.events.maxlen or 0):
                self._events.popleft()
        elif self._iter_kv_events_result is not None:
            for entry in entries:
                self._put(self._iter_kv_events_result, entry)

    def _faulty(self, entries: list[Stats]) -> list[Stats]:
        gaps = [fault.number("event", 1) for fault in self._settings.named("events_gap")]
        return [entry for entry in entries if entry["event_id"] not in gaps]

    def _put(self, result: IterationResult, entry: Stats) -> None:
        result.mailbox.put(entry)
        loop = result.mailbox.loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # The loop is closed.
                loop.call_soon_threadsafe(result.mailbox.wake)

    @override
    def fail_all(self, message: str) -> None:
        """Tells all pending requests that the engine is dead."""
        self._fatal_error = EngineDeadError(message)
        pending = list(self._results)
        self.respond([(one, Response(error=EngineDeadError(message))) for one in pending])

    @override
    def fail_fatally(self, message: str, blocks_s: float | None) -> None:
        """Leaves an error for whoever looks next."""
        self._fatal_blocks_s = blocks_s
        self._fatal_error = RuntimeError(message)
        self._error_queue.put(RuntimeError(message))

    def _die_slowly(self) -> None:
        """Shuts down in the coroutine of whoever was told; nothing else runs meanwhile."""
        self.doing_shutdown = True
        if self._fatal_blocks_s is None:
            self._hang()
        else:
            time.sleep(self._fatal_blocks_s)

    def stats(self, timeout: float | None) -> IterationResult | FetchedResult:
        """What get_stats_async() returns."""
        if not self._by_rpc:
            if self._settings.named("stats_error"):
                raise RuntimeError("the statistics cannot be read")
            if self._iter_stats_result is None:
                print("Iteration statistics are not available yet.")  # noqa: T201 - as there
                return FetchedResult([])
            self._iter_stats_result.set_timeout(timeout)
            return self._iter_stats_result
        return self._fetch("stats", self._stats, timeout)

    def kv_events(self, timeout: float | None) -> IterationResult | FetchedResult:
        """What get_kv_cache_events_async() returns.

        Raises:
            AssertionError: there has been no request yet (older versions).
        """
        if not self._by_rpc:
            found = self._iter_kv_events_result
            assert found is not None, "KV Event IterationResult is not properly instantiated."
            found.set_timeout(timeout)
            return found
        return self._fetch("events", self._events, timeout)

    def _fetch(self, what: str, source: deque[Stats], timeout: float | None) -> FetchedResult:
        """Asks the rank, in the caller's thread, for as long as `timeout`."""
        lock = self._consumers[what]
        assert lock.acquire(blocking=False), f"there is one consumer of {what} already"
        try:
            for fault in self._settings.named("stats_block"):
                time.sleep(fault.number("s", 1.0) or 0.0)
            until_s = time.monotonic() + (timeout or 0.0)  # noqa: TID251 - of the engine
            is_dead = self.engine is None or self.engine.is_stuck
            while not source or is_dead:
                if time.monotonic() >= until_s:  # noqa: TID251 - of the engine
                    return FetchedResult([])
                time.sleep(_POLL_S)
            if self._settings.named("stats_error"):
                # Errors of the call are nothing that anybody hears about.
                return FetchedResult([])
            return FetchedResult([source.popleft() for _ in range(len(source))])
        finally:
            lock.release()

    def is_shutdown(self) -> bool:
        """Whether it takes no more requests."""
        return self.doing_shutdown

    def check_health(self) -> bool:
        """Whether nothing fatal is known, which is less than being alive."""
        if self.doing_shutdown or self._fatal_error is not None:
            return False
        return not self._settings.named("unhealthy")

    def shutdown(self) -> None:
        """Ends the engine. Waits for a rank that is dead or stuck, for ever in older versions."""
        self.doing_shutdown = True
        if self._is_closed or self.engine is None:
            return
        self._is_closed = True
        for request_id in list(self._results):
            self.engine.cancel(request_id)
        if self._settings.named("shutdown_error"):
            raise RuntimeError("the rank has not ended as it should")
        is_dead = self.engine.is_stuck or not self.engine.process.is_alive()
        if self._settings.named("shutdown_hang") or (is_dead and not self._dead_errors):
            self._hang()
        self.engine.stop()
        self.engine.join(_JOIN_S)
        self.engine.process.close()

    def _hang(self) -> None:
        """Blocks the thread, for ever unless a test has said otherwise."""
        threading.Event().wait(self._settings.hang_s)
