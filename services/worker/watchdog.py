"""Notices an engine that hangs: frozen, stopped, or waiting for a device that never answers.

An Engine around another one. It counts what goes in and comes out, and looks every TICK_S:

    a batch, an answer, or more steps -------------------------> the engine lives
    silence for canary_after_s: a canary is sent --it ends-----> the engine lives
                                               '--silence for silent_within_s--> the engine hangs

Ends by abort or failure are no signs of life, nor that an adapter is there already: a child process
says so by itself.

A canary is an execution of one token, one at a time, with a salt that nobody else has. Nobody hears
of it: it takes no place, its token reaches no stream, and the load that is told leaves it out. An
idle engine so proves every canary_after_s that it lives; one that works proves it by its steps, and
a canary that waits behind others harms nobody as long as there are steps.

An engine may be silent for silent_within_s - canary_after_s at least and remain unsuspected: that
has to be more than its longest step. Engines that count no steps (EngineLoad.steps) are silent for
the whole prefill of a long prompt that is not cut into chunks, and need larger numbers than the
defaults. While it loads an adapter an engine may be silent for adapter_within_s more.

With the defaults, 4 s and 9 s, silence is noticed 9.5 s after the last sign of life at the latest.

An aborted execution that does not end within abort_within_s is no proof: an engine may tell of it
late. It takes another canary. If that does not end, the engine hangs; if it does, the execution is
stuck: its place stays taken, and it is looked at again after as long. Once half of the capacity is
stuck the engine counts as hung.

What was itself stopped blames nobody: when a look comes much too late, the event loop or the whole
machine stood still, and all times begin anew.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import structlog

from libs.clock import Clock
from services.worker import metrics
from services.worker.engine.base import (
    LOCAL_ENDS,
    Adapter,
    AdapterUnusable,
    EmbeddingFailed,
    Ended,
    EndReason,
    Engine,
    EngineDied,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    Lane,
    Sampling,
    StepBatch,
    Tell,
)

log = structlog.get_logger(__name__)

CANARY: Final[Lane] = 0
"""Lane of the canary; those of executions count from 1."""
TICK_S: Final = 0.25
LATE_S: Final = 1.0
"""A look that comes so much too late finds a process that stood still itself."""
CANARIES_FAILED_MAX: Final = 3
"""An engine that fails so many canaries one after the other, and ends nothing else well, is broken
even though it speaks."""
# Two tokens: an engine that keeps prefixes by slot finds its slot again by the first, and so leaves
# those of others alone.
_PROMPT_TOKENS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an engine may be silent. Seconds.

    Attributes:
        canary_after_s: silence after which it gets a canary.
        silent_within_s: silence after which it hangs, with a canary in it.
        abort_within_s: that an aborted execution may take to end.
        adapter_within_s: that loading an adapter may take.
    """

    canary_after_s: float
    silent_within_s: float
    abort_within_s: float
    adapter_within_s: float


class Watchdog:
    """An Engine that has started, under watch. `run` it beside what consumes its batches.

    Belongs to the event loop of its engine.

    Args:
        engine: that is watched.
        info: of it.
        patience: how long it may be silent.
        clock: by which it is looked at.
    """

    def __init__(self, engine: Engine, info: EngineInfo, patience: Patience, clock: Clock) -> None:
        self._engine = engine
        self._info = info
        self._patience = patience
        self._clock = clock
        self._inside: set[Lane] = set()
        # When the abort of each lane was asked, or looked at last; the oldest first.
        self._aborted: dict[Lane, float] = {}
        self._stuck: set[Lane] = set()
        self._calls = 0
        self._loading = 0
        self._is_slow = False
        self._has_news = False
        # Whether it has been asked for anything since it last had nothing to do.
        self._is_asked = False
        self._steps = 0
        self._looked_s = self._life_s = clock.monotonic_s()
        self._canary = _canary(info)
        self._canary_sent_s: float | None = None
        # When the last canary that ended well had been sent.
        self._proved_s = float("-inf")
        self._canaries_failed = 0

    async def run(self, on_hung: Callable[[], None]) -> None:
        """Looks at the engine until it hangs.

        Args:
            on_hung: is told before all others.

        Raises:
            EngineDied: the engine hangs.
        """
        self._start_anew(self._clock.monotonic_s())
        while True:
            await self._clock.sleep_s(TICK_S)
            problem = self._look()
            if problem:
                log.error("the engine hangs", cause=problem)
                on_hung()
                raise EngineDied(problem)

    # The engine; see base.Engine.

    async def start(self, tell: Tell | None = None) -> EngineInfo:
        """Starts it."""
        return await self._engine.start(tell)

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        """Queues an execution."""
        self._begin()
        self._engine.submit(lane, request)
        self._inside.add(lane)

    def abort(self, lane: Lane) -> None:
        """Stops an execution soon."""
        self._engine.abort(lane)
        if lane in self._inside:
            self._aborted.setdefault(lane, self._clock.monotonic_s())

    async def next_step(self) -> StepBatch:
        """Waits for the next batch that has anything in it but a canary."""
        while True:
            batch = await self._engine.next_step()
            self._has_news |= _is_of_engine(batch)
            has_canary = self._canary_sent_s is not None
            for ended in batch.ended:
                self._end(ended)
            if not has_canary or _strip(batch):
                return batch

    def load(self) -> EngineLoad:
        """Measures the load, without the canary."""
        load = self._engine.load()
        if self._canary_sent_s is None:
            return load
        if load.waiting:
            tokens = load.waiting_tokens
            less = max(0, tokens - len(self._canary.prompt_ids)) if tokens is not None else None
            return replace(load, waiting=load.waiting - 1, waiting_tokens=less)
        return replace(load, running=load.running - 1) if load.running else load

    async def load_adapter(self, adapter: Adapter) -> None:
        """Loads an adapter."""
        self._begin()
        is_slow = adapter.name not in self._engine.load().resident_adapters
        self._is_slow |= is_slow
        self._calls += 1
        self._loading += is_slow
        try:
            await self._engine.load_adapter(adapter)
            # That it is there already, nobody has asked the engine for.
            self._has_news |= is_slow
        except AdapterUnusable:
            self._has_news |= is_slow
            raise
        finally:
            self._calls -= 1
            self._loading -= is_slow

    async def embed(self, inputs: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Embeds prompts."""
        self._begin()
        self._calls += 1
        try:
            vectors = await self._engine.embed(inputs)
            self._has_news = True
        except EmbeddingFailed:
            self._has_news = True
            raise
        finally:
            self._calls -= 1
        return vectors

    async def stop(self) -> None:
        """Ends it."""
        await self._engine.stop()

    # The watch.

    def _begin(self) -> None:
        """An engine that had nothing to do was silent with reason, but once it was asked."""
        if not self._is_asked and self._canary_sent_s is None:
            self._life_s = self._clock.monotonic_s()
        self._is_asked = True

    def _end(self, ended: Ended) -> None:
        lane = ended.lane
        has_failed = ended.reason is EndReason.FAILED
        if not has_failed:
            self._canaries_failed = 0
        if lane != CANARY:
            self._inside.discard(lane)
            self._aborted.pop(lane, None)
            if lane in self._stuck:
                self._stuck.discard(lane)
                metrics.STUCK_OUTPUTS.set(len(self._stuck))
            return
        if has_failed:
            self._canaries_failed += 1
            log.warning("the engine failed on a canary", cause=ended.message)
        elif self._canary_sent_s is not None:
            self._proved_s = self._canary_sent_s
        self._canary_sent_s = None

    def _look(self) -> str:
        """Looks at the engine; returns what is wrong with it, or an empty text."""
        now_s = self._clock.monotonic_s()
        late_s = now_s - self._looked_s - TICK_S
        self._looked_s = now_s
        if late_s > LATE_S:
            log.warning("this process stood still", for_s=round(late_s, 1))
            self._start_anew(now_s)
            return ""
        self._hear(now_s)
        silence_s = now_s - self._life_s
        if self._canary_sent_s is None:
            if silence_s >= self._patience.canary_after_s or self._wants_proof(now_s):
                self._send_canary(now_s)
        elif silence_s >= self._allowed_s():
            return f"nothing was heard of it for {silence_s:.1f} s, and a canary did not end"
        return self._judge(now_s)

    def _start_anew(self, now_s: float) -> None:
        self._looked_s = self._life_s = now_s
        self._aborted = dict.fromkeys(self._aborted, now_s)

    def _hear(self, now_s: float) -> None:
        """Takes note of signs of life since the look before."""
        steps = self._engine.load().steps or 0
        if self._has_news or steps > self._steps:
            self._life_s = now_s
            self._is_asked = bool(self._inside or self._calls)
            self._is_slow = self._loading > 0
        self._has_news = False
        self._steps = steps

    def _allowed_s(self) -> float:
        """Silence after which the engine hangs; loading adapters makes it longer once, not more."""
        patience = self._patience
        return patience.silent_within_s + patience.adapter_within_s * self._is_slow

    def _send_canary(self, now_s: float) -> None:
        try:
            self._engine.submit(CANARY, self._canary)
        except EngineDied:
            return  # Whoever waits for its batches hears of it.
        self._canary_sent_s = now_s

    def _wants_proof(self, now_s: float) -> bool:
        """Whether an abort is overdue, and no canary has ended well that was sent since then."""
        asked_s = next(iter(self._aborted.values()), float("inf"))
        due_s = asked_s + self._patience.abort_within_s
        return now_s >= due_s > self._proved_s

    def _judge(self, now_s: float) -> str:
        """Judges an engine that speaks; returns what is wrong with it, or an empty text."""
        for lane, asked_s in list(self._aborted.items()):
            due_s = asked_s + self._patience.abort_within_s
            if now_s < due_s or self._proved_s < due_s:
                break
            # To be looked at again, behind the others.
            del self._aborted[lane]
            self._aborted[lane] = now_s
            self._stuck.add(lane)
            metrics.STUCK_OUTPUTS.set(len(self._stuck))
            log.warning("an aborted execution does not end", stuck=len(self._stuck))
        if 2 * len(self._stuck) >= self._info.max_running:
            return f"{len(self._stuck)} aborted executions did not end"
        if self._canaries_failed >= CANARIES_FAILED_MAX:
            return f"it failed on {self._canaries_failed} canaries, one after the other"
        return ""


def _canary(info: EngineInfo) -> EngineRequest:
    return EngineRequest(
        prompt_ids=(0,) * min(_PROMPT_TOKENS, info.context_length - 1),
        max_output_tokens=1,
        ignore_eos=True,
        sampling=Sampling(temperature=0, top_p=1, top_k=0, seed=0),
        cache_salt=secrets.token_bytes(16),
    )


def _is_of_engine(batch: StepBatch) -> bool:
    """Whether a batch is a sign of life.

    What is refused or aborted before the engine has seen it ends in its child process, also while
    the engine behind it hangs. Where nothing else is heard, a canary has to decide.
    """
    return bool(
        batch.lanes
        or batch.prefilled
        or batch.prompt_scores
        or batch.kv_events
        or any(ended.lane == CANARY or ended.reason not in LOCAL_ENDS for ended in batch.ended)
    )


def _strip(batch: StepBatch) -> bool:
    """Takes the canary out of a batch; returns whether anything is left.

    Its row stays where there are others: nobody has its lane, so nobody gets it.
    """
    batch.ended = [ended for ended in batch.ended if ended.lane != CANARY]
    batch.prefilled = [prefilled for prefilled in batch.prefilled if prefilled.lane != CANARY]
    if all(lane == CANARY for lane in batch.lanes):
        batch.lanes, batch.token_ids, batch.scores = [], [], None
    return bool(
        batch.lanes or batch.ended or batch.prefilled or batch.prompt_scores or batch.kv_events
    )
