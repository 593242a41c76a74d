"""The executor loop: one thread that computes all requests step by step, as rank 0 does there."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from .adapters import Adapters, RefusedAdapter
from .batch import Batch
from .cache import KvCache
from .guidance import Guides
from .lanes import RefusedGrammar, Request, make_lanes
from .language import Floats, LanguageModel
from .process import RankProcess
from .records import LoRABase
from .results import Response
from .sampling import Sampler
from .settings import Fault, Settings
from .statistics import Stats, describe

Told = list[tuple[int, Response]]

_IDLE_S = 0.05
_CONSUMER_WAIT_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What LLM() was given, resolved.

    Attributes:
        length_max: tokens of prompt and output.
        batch_max: requests in the batch.
        tokens_max: tokens computed in one step.
        chunked: whether a prompt may take several steps.
        policy: of the scheduler.
        draft_tokens: guessed ahead in each step.
        tells_stats: whether iterations are described.
        tells_requests: whether their requests are, too.
        attention_dp: whether ranks share the attention.
        guided_errors: a grammar that does not compile fails its request only.
        lora_errors: so does an adapter.
        context_stats: newer statistics.
        dead_errors: requests of a dead rank get an error.
        sampler: what it does of what it is asked.
        more_end_ids: ends besides the tokenizer's that this version knows.
    """

    length_max: int
    batch_max: int
    tokens_max: int
    chunked: bool
    policy: str
    draft_tokens: int
    tells_stats: bool
    tells_requests: bool
    attention_dp: bool
    guided_errors: bool
    lora_errors: bool
    context_stats: bool
    dead_errors: bool
    sampler: Sampler
    more_end_ids: tuple[int, ...]


class Sink:
    """Where the engine's thread puts what it has to say."""

    def respond(self, told: Told) -> threading.Event | None:
        """Takes responses; returns what is set when the consumer has been woken."""
        raise NotImplementedError

    def take_stats(self, entry: Stats) -> None:
        """Takes the description of one iteration."""

    def take_events(self, cache: KvCache) -> None:
        """May take events of the KV cache."""

    def fail_all(self, message: str) -> None:
        """The rank is dead, and this version says so."""

    def fail_fatally(self, message: str, blocks_s: float | None) -> None:
        """Something that concerns everybody has gone wrong."""


class LoopDied(Exception):
    """The executor loop has ended by an exception, or will never go on."""


class Engine(threading.Thread):
    """The loop.

    Attributes:
        process: of the rank.
        is_stuck: it will never answer again.
        fatal: what it died of; "" while it lives.
    """

    def __init__(
        self,
        config: EngineConfig,
        settings: Settings,
        model: LanguageModel,
        cache: KvCache,
        adapters: Adapters | None,
        guides: Guides | None,
        sink: Sink,
    ) -> None:
        super().__init__(name="standin-rank", daemon=True)
        self.length_max, self.vocabulary = config.length_max, model.vocabulary
        self.more_end_ids = list(config.more_end_ids)
        self.guides, self.sampler = guides, config.sampler
        self.cache = cache
        self.process = RankProcess()
        self.is_stuck = False
        self.fatal = ""
        self._config, self._settings = config, settings
        self._adapters, self._sink = adapters, sink
        self._batch = Batch(config, settings, model, cache)
        self._inbox: deque[Callable[[], None]] = deque()
        self._news = threading.Condition()
        self._is_stopping = False
        self._loaded_s = time.monotonic()  # noqa: TID251 - of the engine
        self._fired: set[int] = set()
        self._aborts = 0
        self._dead_at_s: float | None = None

    def submit(self, request: Request) -> None:
        """Takes a request. From any thread."""
        self._tell(lambda: self._begin(request))

    def cancel(self, request_id: int) -> None:
        """Takes the wish to end a request. From any thread."""
        self._tell(lambda: self._cancel(request_id))

    def stop(self) -> None:
        """Ends the loop. From any thread."""
        self._is_stopping = True
        self._tell(lambda: None)

    def table_of(self, lora: LoRABase | None) -> Floats | None:
        """Loads an adapter.

        Raises:
            ValueError: it cannot be used.
        """
        if lora is None or self._adapters is None:
            return None
        return self._adapters.get(lora)

    @override
    def run(self) -> None:
        """Steps until it is told to stop, or dies."""
        try:
            while not self._is_stopping:
                self._turn()
        except LoopDied as death:
            self.is_stuck = True
            print(f"[TensorRT-LLM] the executor loop has ended: {death}", file=sys.stderr)  # noqa: T201
            while not self._is_stopping:
                self._watch_rank()
                self._wait()

    def _tell(self, what: Callable[[], None]) -> None:
        with self._news:
            self._inbox.append(what)
            self._news.notify()

    def _wait(self) -> None:
        with self._news:
            if not self._inbox or self.is_stuck:
                self._news.wait(_IDLE_S)

    def _turn(self) -> None:
        if self._batch.was_idle or not self._batch.has_work():
            self._wait()
        while self._inbox:
            self._inbox.popleft()()
        self._watch_rank()
        if self._dead_at_s is not None:
            raise LoopDied("the rank is gone")
        self._fire_faults()
        if self._batch.has_work():
            self._iterate()
        if self.fatal:
            raise LoopDied(self.fatal)

    def _iterate(self) -> None:
        started_s = time.perf_counter()
        try:
            told = self._batch.step()
        except ValueError as error:
            raise LoopDied(str(error)) from error
        # Before the responses, so that who has read those finds these.
        if self._config.tells_stats:
            latency_s = self._settings.step_s or time.perf_counter() - started_s
            self._sink.take_stats(self._described(latency_s))
        self._sink.take_events(self.cache)
        woken = self._sink.respond(told)
        if self._settings.step_s:
            time.sleep(self._settings.step_s)
        elif woken is not None:
            woken.wait(_CONSUMER_WAIT_S)

    def _described(self, latency_s: float) -> Stats:
        entry = describe(
            self._batch.counts(latency_s),
            self.cache,
            batch_max=self._config.batch_max,
            settings=self._settings,
            is_new=self._config.context_stats,
        )
        if self._config.tells_requests:
            entry["requestStats"] = self._batch.request_stats()
        return entry

    def _begin(self, request: Request) -> None:
        if self._is_deadly(request):
            self.process.kill()
            raise LoopDied("illegal memory access")
        try:
            lanes = make_lanes(request, self)
        except RefusedGrammar as error:
            self._refuse(request, str(error), only_it=self._config.guided_errors)
        except RefusedAdapter as error:
            self._refuse(request, str(error), only_it=self._config.lora_errors)
        except ValueError as error:
            self._refuse(request, str(error), only_it=True)
        else:
            self._batch.add(lanes)

    def _is_deadly(self, request: Request) -> bool:
        """A prompt that looks like those that idle ranks compute to keep in step."""
        return self._config.attention_dp and request.prompt == [1] and not request.salt

    def _refuse(self, request: Request, message: str, *, only_it: bool) -> None:
        if not only_it:
            raise LoopDied(message)
        self._sink.respond([(request.request_id, Response(error=message))])

    def _cancel(self, request_id: int) -> None:
        self._aborts += 1
        for fault in self._settings.named("wedge_after_aborts"):
            if self._aborts >= (fault.number("aborts", 1) or 1):
                raise LoopDied("too many requests were cancelled")
        self._batch.cancel(request_id)

    def _watch_rank(self) -> None:
        if self.process.is_alive():
            return
        now_s = time.monotonic()  # noqa: TID251 - of the engine
        if self._dead_at_s is None:
            self._dead_at_s = now_s
        is_noticed = now_s - self._dead_at_s >= self._settings.dead_after_s
        if self._config.dead_errors and is_noticed and not self.fatal:
            self.fatal = "the engine's rank has died"
            self._sink.fail_all(self.fatal)

    def _fire_faults(self) -> None:
        for number, fault in enumerate(self._settings.faults):
            if fault.name in _FIRES and number not in self._fired and self._is_due(fault):
                self._fired.add(number)
                _FIRES[fault.name](self, fault)

    def _is_due(self, fault: Fault) -> bool:
        passed_s = time.monotonic() - self._loaded_s  # noqa: TID251 - of the engine
        if passed_s < fault.after_s:
            return False
        if fault.when_file is not None and not Path(fault.when_file).exists():
            return False
        if fault.request is None and not fault.every and not fault.tokens:
            return True
        return self._batch.most_tokens(fault.request) >= fault.tokens

    def _fire_wedge(self, fault: Fault) -> None:
        lasts_s = fault.number("s", None)
        if lasts_s is None:
            raise LoopDied("it waits for a device that does not answer")
        time.sleep(lasts_s)

    def _fire_rank_killed(self, _fault: Fault) -> None:
        self.process.kill()

    def _fire_fatal(self, fault: Fault) -> None:
        message = fault.text("message", "CUDA error: an illegal memory access was encountered")
        self.fatal = message
        self._sink.fail_fatally(message, fault.number("blocks_s", 0.05))

    def _fire_process_killed(self, _fault: Fault) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


_FIRES: dict[str, Callable[[Engine, Fault], None]] = {
    "wedge": Engine._fire_wedge,
    "rank_killed": Engine._fire_rank_killed,
    "fatal": Engine._fire_fatal,
    "process_killed": Engine._fire_process_killed,
}
