"""The running executions of the trtllm engine: one request and one task for each.

What the tasks read in one turn of the event loop goes out as one STEP frame. All that the engine's
steps cost in Python, per token, is in `_take`.

Who starts. The engine has a queue of its own, first come first served, and gets everything at once
but two: background executions wait here until nothing else waits, and constraints are compiled
first, in a thread. A constraint begins with the first token that the engine draws, so an output
under one that was begun elsewhere cannot be continued.

Who ends. An execution ends with the engine's last word on it, also after an abort: its place is
taken until then. Two do not wait: one whose output is complete though the engine does not know it
(with ignored ends it knows no stops), which is told to stop and heard to its end by nobody; and a
request that has failed, since TensorRT-LLM never ends what it has raised an error from.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from services.worker.engine.base import (
    AdapterUnusable,
    Ended,
    EndReason,
    EngineRequest,
    Lane,
    Prefilled,
)
from services.worker.engine.trtllm_api import RequestOutput
from services.worker.engine.trtllm_guided import ConstraintUnusable
from services.worker.engine.trtllm_output import Output, bounds_of
from services.worker.engine.trtllm_requests import Guides, Requests
from services.worker.engine.trtllm_state import (
    Counts,
    LaneLimits,
    Pending,
    Running,
    prompt_tokens,
)
from services.worker.engine.wire import Report

Guide = Mapping[str, object]
Send = Callable[[Report], None]
Fatal = Callable[[BaseException], None]

_CROWD: Final = 32
"""Fewer lanes than these are never told at longer intervals."""

_PATIENCE_S: Final = 0.05
"""Longest time that a token waits for those of later steps."""

_MESSAGE_MAX: Final = 200
_NOT_CONTINUED: Final = "this engine cannot continue an output under a constraint: begin it anew"


class Lanes:
    """All running executions. Belongs to the event loop.

    Args:
        requests: starts them.
        guides: compiles constraints.
        limits: of all.
        request_error: what fails one request; anything else is the end of the engine.
        dead_error: what is the end of the engine in any case; None for none in particular.
        send: takes what has happened, at most once in a turn of the loop.
        fatal: is told what has ended the engine.
    """

    def __init__(
        self,
        requests: Requests,
        guides: Guides,
        limits: LaneLimits,
        *,
        request_error: type[Exception],
        dead_error: type[Exception] | None = None,
        send: Send,
        fatal: Fatal,
    ) -> None:
        self._requests = requests
        self._guides = guides
        self._limits = limits
        # What generate_async raises for one request, by version.
        self._refusals = (
            request_error,
            ValueError,
            TypeError,
            AssertionError,
            LookupError,
            NotImplementedError,
        )
        self._request_error = request_error
        self._dead_errors = () if dead_error is None else (dead_error,)
        self._send = send
        self._fatal = fatal
        self._running: dict[Lane, Running] = {}
        self._background: deque[Lane] = deque()
        self._is_admitting = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._compiler = ThreadPoolExecutor(1, "compiler")
        # Lanes that wait, but those in the background; and all lanes' tokens.
        self._unbegun = 0
        self._begun = 0
        self._waiting_tokens = 0
        self._held_tokens = 0
        self._in_engine = 0
        self._pending = Pending()
        self._is_due = False
        self._turns = 0
        self._late: asyncio.TimerHandle | None = None

    @property
    def counts(self) -> Counts:
        """How many there are. Counted along, as every frame says it."""
        return Counts(
            running=self._begun,
            waiting=len(self._running) - self._begun,
            waiting_tokens=self._waiting_tokens,
            held_tokens=self._held_tokens,
        )

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        """Takes an execution."""
        limits = self._limits
        bounds = bounds_of(
            lane, request, context_length=limits.context_length, end_ids=limits.end_ids
        )
        running = self._running[lane] = Running(request, bounds, Output(bounds))
        self._unbegun += 1
        self._waiting_tokens += prompt_tokens(request)
        if not bounds.room:
            self._begin(running, 0)
            self._end(running, Ended(lane, bounds.at_room))
        elif request.is_background:
            running.is_held = True
            self._unbegun -= 1
            self._background.append(lane)
            self._admit()
        else:
            self._begin_work(running)

    def abort(self, lane: Lane) -> None:
        """Stops an execution soon; unknown ones are ignored."""
        running = self._running.get(lane)
        if running is None or running.is_aborted:
            return
        running.is_aborted = True
        if running.result is None:
            self._end(running, Ended(lane, EndReason.ABORTED))
        else:
            self._stop(running, running.result)

    # How executions start.

    def _admit(self) -> None:
        """Starts background executions, when nothing else waits."""
        if self._is_admitting:
            # One that is refused at once comes here again, and the loop below goes on behind it.
            return
        self._is_admitting = True
        while self._background and not self._unbegun and self._in_engine < self._limits.capacity:
            running = self._running[self._background.popleft()]
            running.is_held = False
            self._unbegun += 1
            self._begin_work(running)
        self._is_admitting = False

    def _begin_work(self, running: Running) -> None:
        request = running.request
        if request.constraint is None:
            self._start(running, None)
        elif request.continue_ids:
            self._fail(running, _NOT_CONTINUED)
        else:
            self._spawn(self._compile(running))

    async def _compile(self, running: Running) -> None:
        """Compiles a constraint and starts its execution."""
        constraint = running.request.constraint
        if constraint is None:
            return
        loop = asyncio.get_running_loop()
        try:
            guide = await loop.run_in_executor(self._compiler, self._guides.check, constraint)
        except ConstraintUnusable as error:
            self._fail(running, str(error))
            return
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - libraries in Rust raise panics as such
            # Its words may hold what the constraint says.
            self._fail(running, f"the constraint could not be compiled ({type(error).__name__})")
            return
        if self._running.get(running.bounds.lane) is running:
            self._start(running, guide)

    def _start(self, running: Running, guide: Guide | None) -> None:
        try:
            result = self._requests.start(running.request, running.bounds.drawn, guide)
        except self._dead_errors as error:
            self._fatal(error)
        except (ConstraintUnusable, AdapterUnusable) as error:
            self._fail(running, str(error))
        except self._refusals as error:
            self._fail(running, self._words_of(running, error))
        except Exception as error:  # noqa: BLE001 - anything else is the end of the engine
            self._fatal(error)
        else:
            running.result = result
            self._in_engine += 1
            self._spawn(self._guarded(running, result))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What the engine says.

    async def _guarded(self, running: Running, result: RequestOutput) -> None:
        """Reads a request to its end, and ends its execution or the engine by what is raised.

        A request that has raised an error is never to be asked again: it would wait for ever.
        """
        try:
            await self._follow(running, result)
        except self._dead_errors as error:
            self._fatal(error)
        except self._request_error as error:
            # About this one; anything else is about all.
            self._fail(running, self._words_of(running, error))
        except Exception as error:  # noqa: BLE001 - the end of the engine
            self._fatal(error)

    async def _follow(self, running: Running, result: RequestOutput) -> None:
        """Reads a request to its end."""
        try:
            async for _ in result:
                self._take(running, result)
        finally:
            self._in_engine -= 1
            self._admit()
        reason = result.outputs[0].finish_reason
        self._end(running, running.output.end(reason, is_aborted=running.is_aborted))

    def _take(self, running: Running, result: RequestOutput) -> None:
        """Takes a step of one request."""
        if running.is_aborted:
            return
        completion, output = result.outputs[0], running.output
        before = output.seen
        new = output.take(completion.token_ids)
        self._held_tokens += output.seen - before
        if not running.has_begun and output.seen:
            # Not in every version.
            self._begin(running, getattr(result, "cached_tokens", None) or 0)
        if new:
            self._tell(running, new, completion.logprobs or (), before)
        if output.is_cut and not result.finished:
            self._stop(running, result)
            self._end(running, output.end(None, is_aborted=False))

    def _tell(
        self, running: Running, new: Sequence[int], logprobs: Sequence[object], before: int
    ) -> None:
        """Tells what is new of an output.

        Args:
            running: the execution.
            new: tokens to be told.
            logprobs: of the whole output; not read where nobody asked for any.
            before: tokens of the output that stand before.
        """
        pending, lane = self._pending, running.bounds.lane
        top_logprobs = running.request.top_logprobs
        if top_logprobs is not None:
            pending.scores.add(len(pending.lanes), new, logprobs[before:], top_logprobs)
        if len(new) == 1:
            pending.lanes.append(lane)
        else:
            pending.lanes += [lane] * len(new)
        pending.token_ids += new
        self._schedule()

    def _begin(self, running: Running, cached_tokens: int) -> None:
        running.has_begun = True
        self._unbegun -= 1
        self._begun += 1
        size = prompt_tokens(running.request)
        self._waiting_tokens -= size
        self._held_tokens += size
        cached = min(max(0, cached_tokens), len(running.request.prompt_ids))
        self._pending.prefilled.append(Prefilled(running.bounds.lane, cached))
        self._schedule()
        if self._background:
            self._admit()

    def _stop(self, running: Running, result: RequestOutput) -> None:
        """Asks the engine to stop; its last word comes all the same."""
        if running.is_stopping:
            return
        running.is_stopping = True
        try:
            result.abort()
        except Exception:  # noqa: BLE001 - an engine that is gone is noticed elsewhere
            return

    def _fail(self, running: Running, message: str) -> None:
        reason = EndReason.ABORTED if running.is_aborted else EndReason.FAILED
        message = "" if running.is_aborted else message
        self._end(running, Ended(running.bounds.lane, reason, message=message))

    def _end(self, running: Running, ended: Ended) -> None:
        if self._running.get(ended.lane) is not running:
            return
        del self._running[ended.lane]
        size = prompt_tokens(running.request)
        if running.has_begun:
            self._begun -= 1
            self._held_tokens -= size + running.output.seen
        else:
            self._waiting_tokens -= size
            self._unbegun -= not running.is_held
        if running.is_held:
            self._background.remove(ended.lane)
        self._pending.ended.append(ended)
        self._schedule()
        if self._background:
            self._admit()

    def _words_of(self, running: Running, error: BaseException) -> str:
        """What may be said of an error: its words may hold what a tenant wrote in a grammar."""
        name = type(error).__name__
        if running.request.constraint is not None:
            return f"the engine refused it ({name})"
        return f"the engine refused it ({name}: {str(error)[:_MESSAGE_MAX]})"

    # What is told.

    def _schedule(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """Sends what there is, unless it is to wait for more."""
        self._is_due = False
        pending = self._pending
        self._turns += 1
        if pending.prefilled or pending.ended or self._turns >= self._interval():
            self.flush()
        elif self._late is None:
            self._late = asyncio.get_running_loop().call_later(_PATIENCE_S, self.flush)

    def _interval(self) -> int:
        """Steps between two frames; longer when most places are taken, as each costs the same."""
        limits = self._limits
        is_crowded = self._in_engine >= max(_CROWD, limits.capacity * 3 // 4)
        return limits.interval_under_load if is_crowded else limits.interval

    def flush(self) -> None:
        """Sends what there is."""
        self._turns = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None
        pending, self._pending = self._pending, Pending()
        if pending.lanes or pending.prefilled or pending.ended:
            self._send(pending.report())
