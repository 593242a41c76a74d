"""The simulator: a deterministic cost model of a GPU under an injected clock.

For load tests, simulations and demos of scale. It batches as real engines do: every step prefills
at most one chunk of prompts, in the order of arrival, and draws one token for each execution whose
prompt is prefilled. With costs of 0 it steps as fast as Python can, once around the event loop for
each step.

    step = prefilled tokens / prefill rate + base + per_lane * decoding        seconds

An execution runs only while its whole worst case fits into the KV cache, so nothing is preempted.
An abort frees its place at once; its end does not wait for the step that runs.
Never: reads the system's clock, draws randomness, or looks at text.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from libs.clock import CancelTimer, Clock
from services.worker.engine.base import (
    Ended,
    EndReason,
    EngineDied,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    EngineStartError,
    Lane,
    Prefilled,
    StepBatch,
)
from services.worker.engine.sim_output import SimOutput, base_of, end_of
from services.worker.engine.sim_tokenizer import SimTokenizer

VERSION = "1"
# Tokens drawn at once.
AHEAD_TOKENS_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SimCosts:
    """What the simulated GPU can do. The defaults are about one H100 with an 8B model.

    Attributes:
        prefill_tokens_per_s: prompt tokens; 0 means at no cost.
        prefill_chunk_tokens: most prompt tokens in one step.
        decode_base_s: of a step, whatever runs.
        decode_per_lane_s: more for each execution that decodes.
        mean_output_tokens: mean length at which the model ends by itself; 0 means never.
    """

    prefill_tokens_per_s: float = 20_000.0
    prefill_chunk_tokens: int = 2048
    decode_base_s: float = 0.008
    decode_per_lane_s: float = 0.000_05
    mean_output_tokens: int = 0

    def step_s(self, prefilled: int, decoding: int) -> float:
        """Returns the seconds that a step takes."""
        prefill_s = prefilled / self.prefill_tokens_per_s if self.prefill_tokens_per_s else 0.0
        return prefill_s + self.decode_base_s + self.decode_per_lane_s * decoding


FLAT_OUT = SimCosts(
    prefill_tokens_per_s=0, prefill_chunk_tokens=1 << 30, decode_base_s=0, decode_per_lane_s=0
)
"""No cost at all: for benchmarks of everything else."""


class _Run:
    """One execution in the engine.

    Attributes:
        prompt_left: tokens whose prefill has not happened.
        position: output position of its first token here.
        end: output position at which it ends; it draws no token there.
        reason: why it ends there.
        base: of what it says.
        first_step: step in which it draws its first token.
        kv_tokens: most tokens that it can ever have in the cache.
        is_over: it has ended; whatever still refers to it drops it.
    """

    __slots__ = (
        "base",
        "end",
        "first_step",
        "is_over",
        "kv_tokens",
        "lane",
        "position",
        "prompt_left",
        "prompt_tokens",
        "reason",
        "stop_token_id",
    )

    def __init__(self, lane: Lane, request: EngineRequest) -> None:
        self.lane = lane
        self.position = len(request.continue_ids)
        self.prompt_tokens = len(request.prompt_ids)
        self.prompt_left = self.prompt_tokens + self.position
        self.end = max(self.position, request.max_output_tokens)
        self.reason = EndReason.MAX_TOKENS
        self.stop_token_id: int | None = None
        self.base = 0
        self.first_step = 0
        self.kv_tokens = 0
        self.is_over = False

    def end_at(self, position: int, reason: EndReason) -> None:
        """Ends at a position unless it ends before."""
        if position < self.end:
            self.end = max(position, self.position)
            self.reason = reason

    @property
    def is_silent(self) -> bool:
        """It takes a step to end, in which it says nothing: the model draws what ends it."""
        return self.end == self.position or self.reason in _DRAWN

    @property
    def last_step(self) -> int:
        """Step in which it ends, once it decodes."""
        return self.first_step + self.end - self.position - (not self.is_silent)

    def kv_used(self, step: int) -> int:
        """Returns its tokens in the cache after a step."""
        whole = self.prompt_tokens + self.position
        return whole - self.prompt_left if self.prompt_left else whole + step - self.first_step


_DRAWN = frozenset({EndReason.END_OF_SEQUENCE, EndReason.STOP_TOKEN})


class SimEngine:
    """Implements services.worker.engine.base.Engine."""

    def __init__(
        self,
        clock: Clock,
        tokenizer: SimTokenizer,
        *,
        capacity: int,
        context_length: int,
        kv_tokens: int,
        costs: SimCosts,
    ) -> None:
        self._clock = clock
        self._tokenizer = tokenizer
        self._capacity = capacity
        self._context_length = context_length
        self._kv_tokens = kv_tokens
        self._costs = costs
        self._output = SimOutput(tokenizer)
        self._waiting: dict[Lane, _Run] = {}
        self._running: dict[Lane, _Run] = {}
        self._prefilling: deque[_Run] = deque()
        self._decoding: dict[Lane, _Run] = {}
        # The columns of _decoding; made anew when an execution came or went.
        self._lanes: list[Lane] = []
        self._bases: list[int] = []
        self._offsets: list[int] = []
        self._is_changed = False
        # Tokens of the steps to come, last step first, drawn ahead while nobody comes or goes.
        self._rows: list[list[int]] = []
        self._ahead = 1
        # Who ends in which step. Known beforehand, so that a step costs nothing for each lane.
        self._endings: dict[int, list[_Run]] = {}
        self._waiting_tokens = 0
        self._kv_reserved = 0
        self._step = 0
        self._batch = StepBatch()
        # Of the step that runs: its prompt tokens, by execution, and its end.
        self._chunk: list[tuple[_Run, int]] = []
        self._step_ends_s: float | None = None
        self._last_step_ended_s = 0.0
        # Of the end of the step; and who waits in next_step.
        self._cancel_timer: CancelTimer | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_stopped = False

    async def start(self) -> EngineInfo:
        """Describes itself; there is nothing to load.

        Raises:
            EngineStartError: the KV cache holds less than one context.
        """
        if self._kv_tokens < self._context_length:
            raise EngineStartError(
                f"sim: kv_tokens is {self._kv_tokens}, less than one context of"
                f" {self._context_length} tokens"
            )
        return EngineInfo(
            engine="sim",
            version=VERSION,
            context_length=self._context_length,
            max_running=self._capacity,
            vocabulary_size=self._tokenizer.vocabulary_size,
            digest="",
            is_deterministic=True,
        )

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        """Queues an execution. 20 us and more: its ending is looked up in its whole output.

        Raises:
            EngineDied: it was stopped.
        """
        if self._is_stopped:
            raise EngineDied("the engine was stopped")
        run = self._plan(lane, request)
        if self._step_ends_s is None and not self._waiting and not self._running:
            self._last_step_ended_s = self._clock.monotonic_s()
        self._waiting[lane] = run
        self._waiting_tokens += run.prompt_left
        self._wake()

    def abort(self, lane: Lane) -> None:
        """Takes an execution out at once; next_step returns with its end."""
        run = self._waiting.get(lane) or self._running.get(lane)
        if run is None:
            return
        ending = self._endings.get(run.last_step, [])
        if run in ending:
            ending.remove(run)
        self._finish(run, EndReason.ABORTED)
        self._wake()

    async def next_step(self) -> StepBatch:
        """Waits until a step is over, or until something ended outside of one.

        Raises:
            EngineDied: it was stopped.
        """
        # Everybody else has had a turn of the event loop since the step before.
        has_waited = False
        while not (self._batch.ended or self._batch.lanes or self._batch.prefilled):
            if self._is_stopped:
                raise EngineDied("the engine was stopped")
            if self._step_ends_s is None and (self._waiting or self._running):
                self._begin_step()
            if has_waited and self._is_step_over():
                self._finish_step()
                continue
            await self._wait()
            has_waited = True
        batch, self._batch = self._batch, StepBatch()
        return batch

    def load(self) -> EngineLoad:
        """Measures the load. O(running)."""
        return EngineLoad(
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting_tokens,
            kv_used_tokens=sum(run.kv_used(self._step) for run in self._running.values()),
            kv_total_tokens=self._kv_tokens,
        )

    async def stop(self) -> None:
        """Ends the engine; what runs is lost."""
        self._is_stopped = True
        if self._cancel_timer is not None:
            self._cancel_timer()
        self._wake()

    def _plan(self, lane: Lane, request: EngineRequest) -> _Run:
        """Finds out how an execution will end: its output is known beforehand."""
        run = _Run(lane, request)
        base = base_of(request)
        run.end_at(self._context_length - run.prompt_tokens, EndReason.CONTEXT_FULL)
        run.kv_tokens = run.prompt_tokens + run.end
        if self._costs.mean_output_tokens and not request.ignore_eos:
            run.end_at(end_of(base, self._costs.mean_output_tokens), EndReason.END_OF_SEQUENCE)
        if request.stop_token_ids:
            found = self._output.find(base, run.position, run.end, request.stop_token_ids)
            if found is not None:
                run.end_at(found, EndReason.STOP_TOKEN)
                run.stop_token_id = int(self._output.tokens(base, found, found + 1)[0])
        run.base = base
        return run

    async def _wait(self) -> None:
        """Waits for the end of the step, or for something to happen before."""
        if self._step_ends_s is None:
            await self._sleep()
            return
        left_s = self._step_ends_s - self._clock.monotonic_s()
        if left_s <= 0:
            # Once around the event loop, so that everybody else gets a turn.
            await asyncio.sleep(0)
            return
        if self._cancel_timer is None:
            self._cancel_timer = self._clock.call_after(left_s, self._ring)
        await self._sleep()

    async def _sleep(self) -> None:
        """Waits for `_wake`. What was missed before is seen in the state."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _ring(self) -> None:
        """The timer of a step went off: of the one that runs, or of one that ended before it."""
        self._cancel_timer = None
        self._wake()

    def _is_step_over(self) -> bool:
        return self._step_ends_s is not None and self._clock.monotonic_s() >= self._step_ends_s

    def _begin_step(self) -> None:
        """Admits what fits, in the order of arrival, and decides how long the step takes."""
        while self._waiting and len(self._running) < self._capacity:
            lane, run = next(iter(self._waiting.items()))
            if self._kv_reserved + run.kv_tokens > self._kv_tokens:
                break
            del self._waiting[lane]
            self._running[lane] = run
            self._kv_reserved += run.kv_tokens
            self._prefilling.append(run)
        self._take_chunk()
        prefilled = sum(tokens for _, tokens in self._chunk)
        cost_s = self._costs.step_s(prefilled, len(self._decoding))
        # A consumer that comes late finds a step that ran meanwhile, but no more than one.
        self._step_ends_s = max(self._clock.monotonic_s(), self._last_step_ended_s + cost_s)

    def _take_chunk(self) -> None:
        left = self._costs.prefill_chunk_tokens
        self._chunk = []
        while self._prefilling and left > 0:
            run = self._prefilling[0]
            if run.is_over:
                self._prefilling.popleft()
                continue
            taken = min(left, run.prompt_left)
            self._chunk.append((run, taken))
            left -= taken
            if taken < run.prompt_left:
                break
            self._prefilling.popleft()

    def _finish_step(self) -> None:
        """Makes the batch of the step: prefilled, tokens, ends."""
        assert self._step_ends_s is not None
        self._last_step_ended_s = self._step_ends_s
        self._step_ends_s = None
        self._step += 1
        self._finish_chunk()
        ending = self._endings.pop(self._step, ())
        for run in ending:
            if run.is_silent:
                self._finish(run, run.reason)
        self._draw()
        for run in ending:
            if not run.is_silent:
                self._finish(run, run.reason)

    def _finish_chunk(self) -> None:
        for run, tokens in self._chunk:
            if run.is_over:
                continue
            run.prompt_left -= tokens
            self._waiting_tokens -= tokens
            if run.prompt_left == 0:
                run.first_step = self._step
                self._endings.setdefault(run.last_step, []).append(run)
                self._decoding[run.lane] = run
                self._is_changed = True
                self._batch.prefilled.append(Prefilled(run.lane, 0))

    def _draw(self) -> None:
        if self._is_changed:
            self._change()
        if not self._lanes:
            return
        if not self._rows:
            self._draw_ahead()
        self._batch.lanes = self._lanes.copy()
        self._batch.token_ids = self._rows.pop()

    def _change(self) -> None:
        """Makes the columns anew. What was drawn ahead was for others."""
        self._is_changed = False
        runs = self._decoding.values()
        self._lanes = list(self._decoding)
        self._bases = [run.base for run in runs]
        self._offsets = [run.position - run.first_step for run in runs]
        self._rows = []
        self._ahead = 1

    def _draw_ahead(self) -> None:
        """Draws more steps each time: the longer nobody came or went, the longer nobody will."""
        positions = [offset + self._step for offset in self._offsets]
        self._rows = self._output.steps(self._bases, positions, self._ahead)
        self._rows.reverse()
        self._ahead = min(2 * self._ahead, max(1, AHEAD_TOKENS_MAX // len(self._lanes)))

    def _finish(self, run: _Run, reason: EndReason) -> None:
        run.is_over = True
        self._waiting_tokens -= run.prompt_left
        if self._waiting.pop(run.lane, None) is None:
            del self._running[run.lane]
            self._kv_reserved -= run.kv_tokens
        if self._decoding.pop(run.lane, None) is not None:
            self._is_changed = True
        stop_token_id = run.stop_token_id if reason is EndReason.STOP_TOKEN else None
        self._batch.ended.append(Ended(run.lane, reason, stop_token_id))
