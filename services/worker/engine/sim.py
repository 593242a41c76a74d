"""The simulator: a deterministic cost model of a GPU under an injected clock.

For load tests, simulations and demos of scale. It batches as real engines do: every step prefills
at most one chunk of prompts, in the order of arrival, and draws one token for each execution whose
prompt is prefilled. With costs of 0 it steps as fast as Python can, once around the event loop for
each step.

    step = prefilled tokens / prefill rate + base + per_lane * decoding        seconds

An execution runs only while its whole worst case fits into the KV cache, so nothing is preempted.
An abort frees its place at once; its end does not wait for the step that runs.
Plain text is looked up in columns, for all lanes at once. Whatever else is asked for, each lane's
speaker says token by token (sim_speaker.py); what needs a grammar waits until a thread of its own
has compiled it.
Never: reads the system's clock or draws randomness. It looks at text only for the forms of prompts
that sim_script.py names.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from libs.clock import CancelTimer, Clock
from services.worker.engine.base import (
    Adapter,
    ConstraintKind,
    Ended,
    EndReason,
    EngineAbilities,
    EngineDied,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    EngineStartError,
    Lane,
    Prefilled,
    StepBatch,
    Tell,
)
from services.worker.engine.matcher import MatcherError
from services.worker.engine.sim_adapters import SimAdapters, check
from services.worker.engine.sim_cache import BLOCK_TOKENS, PrefixCache
from services.worker.engine.sim_columns import Columns
from services.worker.engine.sim_costs import FLAT_OUT, SimCosts
from services.worker.engine.sim_embedding import DIMENSIONS, SimEmbedding
from services.worker.engine.sim_model import TOP_LOGPROBS_MAX, ScoredRows
from services.worker.engine.sim_output import SimOutput, base_of, end_of, model_base_of
from services.worker.engine.sim_run import Run
from services.worker.engine.sim_speaker import Speaker, Voice
from services.worker.engine.sim_tokenizer import SimTokenizer

__all__ = ["FLAT_OUT", "VERSION", "SimCosts", "SimEngine"]

VERSION = "2"
ABILITIES = EngineAbilities(
    constraints=frozenset(ConstraintKind),
    min_p=True,
    penalties=True,
    repetition_penalty=True,
    logit_bias=True,
    min_output_tokens=True,
    ignore_eos=True,
    max_top_logprobs=TOP_LOGPROBS_MAX,
    prompt_logprobs=True,
    adapters=True,
    embedding_dimensions=DIMENSIONS,
    prompt_cache=True,
    kv_block_tokens=BLOCK_TOKENS,
)


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
        self._voice = Voice(tokenizer, self._output, costs.mean_output_tokens)
        self._embedding = SimEmbedding(tokenizer)
        self._adapters = SimAdapters(costs.adapters)
        self._cache = PrefixCache(kv_tokens)
        # Compiles grammars. One thread, because a vocabulary's matchers belong to one.
        self._compiler = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sim-grammar")
        self._preparing: dict[Lane, Run] = {}
        self._waiting: dict[Lane, Run] = {}
        # Those that start when nobody else waits.
        self._background: dict[Lane, Run] = {}
        self._running: dict[Lane, Run] = {}
        self._prefilling: deque[Run] = deque()
        self._decoding: dict[Lane, Run] = {}
        # Those that decode with a speaker.
        self._speaking: dict[Lane, Run] = {}
        self._columns = Columns(self._voice.model)
        # Who ends in which step. Known beforehand, so that a step costs nothing for each lane.
        self._endings: dict[int, list[Run]] = {}
        self._waiting_tokens = 0
        self._kv_reserved = 0
        self._step = 0
        self._batch = StepBatch()
        # Of the step that runs: its prompt tokens, by execution, and its end.
        self._chunk: list[tuple[Run, int]] = []
        self._step_ends_s: float | None = None
        self._last_step_ended_s = 0.0
        # Of the end of the step; and who waits in next_step.
        self._cancel_timer: CancelTimer | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_stopped = False

    async def start(self, tell: Tell | None = None) -> EngineInfo:  # noqa: ARG002 - of the protocol
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
            abilities=ABILITIES,
        )

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        """Queues an execution. 20 us and more: its ending is looked up in its whole output.

        Raises:
            EngineDied: it was stopped.
        """
        if self._is_stopped:
            raise EngineDied("the engine was stopped")
        run = Run(lane, request)
        self._waiting_tokens += run.prompt_left
        if self._voice.is_slow_to_make(request):
            self._prepare(run)
            return
        if self._voice.needs_speaker(request):
            self._limit(run)
            run.speaker = self._voice.speaker(request, is_slow=False)
        else:
            self._plan(run)
        self._queue(run)

    def abort(self, lane: Lane) -> None:
        """Takes an execution out at once; next_step returns with its end."""
        run = next((runs[lane] for runs in self._all_runs() if lane in runs), None)
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
            if self._step_ends_s is None and self._has_work:
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
            waiting=len(self._waiting) + len(self._background) + len(self._preparing),
            waiting_tokens=self._waiting_tokens,
            kv_used_tokens=sum(run.kv_used(self._step) for run in self._running.values()),
            kv_total_tokens=self._kv_tokens,
            resident_adapters=self._adapters.names,
            steps=self._step,
        )

    async def load_adapter(self, adapter: Adapter) -> None:
        """Takes the time of loading it, unless it is loaded.

        Raises:
            AdapterUnusable: its digest is none.
            EngineDied: it was stopped.
        """
        check(adapter)
        if not self._adapters.has(adapter):
            await self._clock.sleep_s(self._costs.adapter_load_s)
        if self._is_stopped:
            raise EngineDied("the engine was stopped")
        self._adapters.use(adapter)

    async def embed(self, inputs: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Takes the time of a prefill of all inputs.

        Raises:
            EmbeddingFailed: an input is empty, too long or has a token that does not exist.
            EngineDied: it was stopped.
        """
        found = np.empty((len(inputs), DIMENSIONS), dtype=np.float32)
        for row, token_ids in enumerate(inputs):
            found[row] = self._embedding.embed([token_ids], self._context_length)[0]
            # Everybody else gets a turn: a request may have millions of tokens.
            await asyncio.sleep(0)
        tokens = sum(len(token_ids) for token_ids in inputs)
        await self._clock.sleep_s(self._costs.step_s(tokens, 0))
        if self._is_stopped:
            raise EngineDied("the engine was stopped")
        return found

    async def stop(self) -> None:
        """Ends the engine; what runs is lost. A grammar that is being compiled is left to end."""
        self._is_stopped = True
        self._compiler.shutdown(wait=False, cancel_futures=True)
        if self._cancel_timer is not None:
            self._cancel_timer()
        self._wake()

    @property
    def _has_work(self) -> bool:
        return bool(self._waiting or self._background or self._running)

    def _all_runs(self) -> tuple[dict[Lane, Run], ...]:
        return self._preparing, self._waiting, self._background, self._running

    def _prepare(self, run: Run) -> None:
        """Lets the compiler's thread make its speaker; until then it is not in the queue."""
        self._preparing[run.lane] = run
        self._limit(run)
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(
            self._compiler, partial(self._voice.speaker, run.request, is_slow=True)
        )
        future.add_done_callback(partial(self._prepared, run))

    def _prepared(self, run: Run, future: asyncio.Future[Speaker]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if run.is_over or self._is_stopped:
            return
        if error is not None:
            # Of other errors the text may show what somebody wrote.
            is_ours = isinstance(error, MatcherError)
            self._finish(run, EndReason.FAILED, str(error) if is_ours else type(error).__name__)
            self._wake()
            return
        del self._preparing[run.lane]
        run.speaker = future.result()
        self._queue(run)

    def _queue(self, run: Run) -> None:
        if self._step_ends_s is None and not self._has_work:
            self._last_step_ended_s = self._clock.monotonic_s()
        (self._background if run.request.is_background else self._waiting)[run.lane] = run
        self._wake()

    def _limit(self, run: Run) -> None:
        """Ends it where there is no room left."""
        run.end_at(self._context_length - run.prompt_tokens, EndReason.CONTEXT_FULL)
        run.kv_tokens = run.prompt_tokens + run.end

    def _plan(self, run: Run) -> None:
        """Finds out how an execution will end: its plain output is known beforehand."""
        request = run.request
        run.base = base = base_of(request)
        if request.top_logprobs is not None:
            run.model_base = model_base_of(request)
        self._limit(run)
        if self._costs.mean_output_tokens and not request.ignore_eos:
            end = max(end_of(base, self._costs.mean_output_tokens), request.min_output_tokens)
            run.end_at(end, EndReason.END_OF_SEQUENCE)
        if request.stop_token_ids:
            found = self._output.find(base, run.position, run.end, request.stop_token_ids)
            if found is not None:
                run.end_at(found, EndReason.STOP_TOKEN)
                run.stop_token_id = int(self._output.tokens(base, found, found + 1)[0])

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
        load_s = 0.0
        while (self._waiting or self._background) and len(self._running) < self._capacity:
            queue = self._waiting or self._background
            lane, run = next(iter(queue.items()))
            if self._kv_reserved + run.kv_tokens > self._kv_tokens:
                break
            del queue[lane]
            load_s += self._admit(run)
        self._take_chunk()
        prefilled = sum(tokens for _, tokens in self._chunk)
        decoding = len(self._decoding) + len(self._speaking)
        cost_s = self._costs.step_s(prefilled, decoding) + load_s
        # A consumer that comes late finds a step that ran meanwhile, but no more than one.
        self._step_ends_s = max(self._clock.monotonic_s(), self._last_step_ended_s + cost_s)

    def _admit(self, run: Run) -> float:
        """Puts it into the batch, and returns the seconds until its adapter is there."""
        self._running[run.lane] = run
        self._kv_reserved += run.kv_tokens
        self._waiting_tokens -= run.use_cache(self._cache)
        self._prefilling.append(run)
        adapter = run.request.adapter
        if adapter is None:
            return 0.0
        load_s = 0.0 if self._adapters.has(adapter) else self._costs.adapter_load_s
        self._adapters.use(adapter)
        return load_s

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
        if self._speaking:
            self._speak()
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
                self._decode(run)

    def _decode(self, run: Run) -> None:
        """Its prompt has been computed."""
        run.first_step = self._step
        self._batch.kv_events += run.fill_cache(self._cache)
        self._batch.prefilled.append(Prefilled(run.lane, run.cached_tokens))
        if run.request.prompt_logprobs:
            self._batch.prompt_scores += self._voice.prompt_scores(run.lane, run.request)
        if run.speaker is not None:
            self._speaking[run.lane] = run
            return
        self._endings.setdefault(run.last_step, []).append(run)
        self._decoding[run.lane] = run
        self._columns.change()

    def _draw(self) -> None:
        if self._decoding:
            token_ids = self._columns.draw(self._output, self._decoding.values(), self._step)
            self._batch.lanes, self._batch.token_ids = self._columns.lanes.copy(), token_ids
            self._batch.scores = self._columns.scores

    def _speak(self) -> None:
        """Lets everybody who has a speaker say a token."""
        scored = ScoredRows(self._voice.model, self._batch.scores, len(self._batch.lanes))
        for run in list(self._speaking.values()):
            assert run.speaker is not None
            if run.speaker.position >= run.end:
                self._finish(run, run.reason)
                continue
            try:
                token_id = run.speaker.say()
            except MatcherError as error:
                self._finish(run, EndReason.CONSTRAINT_LIMIT, str(error))
                continue
            if token_id is None:
                self._finish(run, EndReason.END_OF_SEQUENCE)
            elif token_id in run.request.stop_token_ids:
                run.stop_token_id = token_id
                self._finish(run, EndReason.STOP_TOKEN)
            else:
                self._batch.lanes.append(run.lane)
                self._batch.token_ids.append(token_id)
                scored.add(run.speaker.place, token_id, run.request.top_logprobs)
                if run.speaker.is_over:
                    self._finish(run, EndReason.END_OF_SEQUENCE)
                elif run.speaker.position >= run.end:
                    self._finish(run, run.reason)
        self._batch.scores = scored.scores()

    def _finish(self, run: Run, reason: EndReason, message: str = "") -> None:
        run.is_over = True
        self._waiting_tokens -= run.prompt_left
        if self._running.pop(run.lane, None) is not None:
            self._kv_reserved -= run.kv_tokens
        for queue in (self._preparing, self._waiting, self._background, self._speaking):
            queue.pop(run.lane, None)
        if self._decoding.pop(run.lane, None) is not None:
            self._columns.change()
        stop_token_id = run.stop_token_id if reason is EndReason.STOP_TOKEN else None
        self._batch.ended.append(Ended(run.lane, reason, stop_token_id, message))
