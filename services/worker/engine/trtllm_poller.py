"""Fetches statistics and events of the KV cache, on a thread of its own.

There are two kinds of TensorRT-LLM. One puts them into queues that exist from the first request on
and end when nothing comes for a while; the other asks its process and blocks the caller meanwhile.
What is done here is right for both: short rounds with tiny patience, begun anew each time, not
before the first request, and whatever goes wrong is no news. Should a question hang for ever, only
this thread does.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from services.worker.engine.kv_events import KvEvent
from services.worker.engine.trtllm_api import Llm, Records
from services.worker.engine.trtllm_kv import KvTranslator
from services.worker.engine.trtllm_load import Measured, StatsReader

PATIENCE_S: Final = 0.01
"""How long the engine may wait for something to tell."""

RECORDS_MAX: Final = 5000
"""Most of what is read from a queue in one round; the rest is there in the next."""

_ROUND_S: Final = 1.0
_BACK_OFF_MAX: Final = 16

Record = Mapping[str, object] | str
Tell = Callable[[Measured, list[KvEvent]], None]
"""Hears what has been fetched, on this thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is fetched.

    Attributes:
        stats: of iterations.
        block_tokens: of the KV cache whose events are wanted; 0 for none.
        interval_s: between two rounds.
    """

    stats: bool
    block_tokens: int
    interval_s: float


class Poller:
    """The thread. It ends with the process, or before.

    Args:
        llm: the engine.
        wanted: what is fetched.
        tell: hears of it.
    """

    def __init__(self, llm: Llm, wanted: Wanted, tell: Tell) -> None:
        self._llm = llm
        self._wanted = wanted
        self._tell = tell
        self._reader = StatsReader()
        self._translator = KvTranslator(max(1, wanted.block_tokens))
        self._failures = 0
        self._is_over = False

    def start(self) -> None:
        """Begins; there has to have been a request before."""
        if self._wanted.stats or self._wanted.block_tokens:
            threading.Thread(target=self._run, name="poller", daemon=True).start()

    def stop(self) -> None:
        """Ends it after its round; does not wait."""
        self._is_over = True

    def _run(self) -> None:
        asyncio.run(self._poll())

    async def _poll(self) -> None:
        while not self._is_over:
            await self.round()
            # An engine that answers with errors only is asked less and less often.
            await asyncio.sleep(self._wanted.interval_s * min(_BACK_OFF_MAX, 1 << self._failures))

    async def round(self) -> None:
        """Fetches what there is, once, and tells it."""
        stats, events = [], []
        if self._wanted.stats:
            stats = await self._fetch(lambda: self._llm.get_stats_async(timeout=PATIENCE_S))
        if self._wanted.block_tokens:
            ask = self._llm.get_kv_cache_events_async
            # Those that are there, without any wait: they come in bulk.
            events = await self._fetch(lambda: ask(timeout=0.0))
        if stats or events:
            self._tell(self._reader.read(stats), self._translator.translate(events))

    async def _fetch(self, ask: Callable[[], Records]) -> list[Record]:
        found: list[Record] = []
        try:
            records = ask()
            again: object = getattr(records, "mark_undone", None)
            is_queue = callable(again)
            if callable(again):
                # One that was found empty once says nothing until the next request.
                again()
            give_up_s = time.perf_counter() + PATIENCE_S
            async with asyncio.timeout(_ROUND_S):
                async for record in records:
                    found.append(record)
                    # What was fetched is lost unless it is read; a queue keeps the rest, and would
                    # never let us go where the engine's steps are shorter than our patience.
                    is_enough = len(found) >= RECORDS_MAX or time.perf_counter() > give_up_s
                    if is_queue and is_enough:
                        break
        except asyncio.QueueEmpty:
            # So says a queue that was not to wait.
            self._failures = 0
        except Exception:  # noqa: BLE001 - no news, whatever it was
            self._failures = min(self._failures + 1, _BACK_OFF_MAX)
        else:
            self._failures = 0
        return found
