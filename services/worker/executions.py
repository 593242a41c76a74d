"""The executions of one worker: from a gateway's wish to the engine and back, step by step.

    start --refused--------------------------------------------------> Ended(failure)
      |-- preparing (a long prompt, in a thread) --refused-----------> Ended(failure)
      '-> running: tokens through the text layer --------------------> Ended(end)
            '-- stop sequence, abort, deadline, stream gone: ending --> Ended(end | failure)

Lanes of a stream are the gateway's; lanes of the engine are ours, one counter for the process. An
execution counts until the engine says that it ended, whatever its stream was told before: only then
is its place free, and only then does the scheduler hear of it.

Never: writes to a stream, speaks to the scheduler, keeps text of an execution that is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import cast

import structlog
from maas.engine.v1 import engine_pb2

from libs.clock import Clock
from libs.errors import (
    FailedPrecondition,
    FieldRule,
    Internal,
    MaasError,
    Reason,
    ResourceExhausted,
    invalid_field,
)
from services.worker import metrics, runs
from services.worker.admission import Admission, Work
from services.worker.alarm import Alarm
from services.worker.convert import end_to_pb, failure_to_pb, stop_to_pb
from services.worker.engine.base import (
    Ended,
    EndReason,
    Engine,
    EngineDied,
    EngineInfo,
    Lane,
    StepBatch,
)
from services.worker.prompt import is_short
from services.worker.reports import Reports
from services.worker.routes import Route, Routes
from services.worker.runs import UNLIMITED_S, Run, Stream
from services.worker.text import OutputText, TokenPieces

log = structlog.get_logger(__name__)

# Prompts that wait for the tokenising thread.
PREPARING_MAX = 32
# How late a deadline may be noticed.
WATCH_TICK_S = 0.02


class Executions:
    """All executions of the process. Belongs to one event loop.

    Attributes:
        epoch: of the worker's registration; 0 until there was one.
    """

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        *,
        admission: Admission,
        pieces: TokenPieces,
        reports: Reports,
        threads: Executor,
        clock: Clock,
        worker: str,
        max_waiting: int,
        abort_within_s: float,
    ) -> None:
        self.epoch = 0
        self._engine = engine
        self._info = info
        self._admission = admission
        self._pieces = pieces
        self._reports = reports
        self._threads = threads
        self._clock = clock
        self._worker = worker
        self._most = info.max_running + max_waiting
        self._abort_within_s = abort_within_s
        self._streams: set[Stream] = set()
        self._by_id: dict[str, Run] = {}
        # By lane of the engine: those that still speak, and those whose end is only waited for.
        self._running: dict[Lane, Run] = {}
        self._ending: dict[Lane, Run] = {}
        self._routes = Routes()
        self._meter = metrics.StepMeter()
        self._preparing = 0
        self._lanes = 0
        self._earliest_s = UNLIMITED_S
        self._alarm = Alarm(clock, WATCH_TICK_S)
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        # Makes the error that everything new is refused with, once there is one.
        self._refusing: Callable[[str], MaasError] | None = None

    @property
    def preparing(self) -> int:
        """Executions that the engine does not know yet."""
        return self._preparing

    @property
    def count(self) -> int:
        """Executions that are here, in the engine or on their way to it."""
        return len(self._by_id)

    def running_ids(self) -> list[str]:
        """Ids of all executions that hold a place in the engine, or wait for one there."""
        return [run.execution_id for run in self._by_id.values() if run.engine_lane is not None]

    @contextmanager
    def stream(self, tasks: asyncio.TaskGroup) -> Iterator[Stream]:
        """Opens a stream; leaving aborts what it started."""
        stream = Stream(tasks, self._clock)
        self._streams.add(stream)
        if self._refusing is not None:
            stream.outbox.close(self._refusing(self._worker))
        try:
            yield stream
        finally:
            self._streams.discard(stream)
            stream.outbox.detach()
            for run in list(stream.runs.values()):
                run.is_told = True
                self._abort(run, runs.aborted())

    def start(self, stream: Stream, execution: engine_pb2.Execution) -> None:
        """Starts an execution, or refuses it in its stream.

        Raises:
            ResourceExhausted: the gateway starts without reading.
        """
        lane = execution.lane
        if not stream.outbox.open_lane(lane):
            self._poison(stream, lane)
            return
        try:
            self._start(stream, execution)
        except MaasError as error:
            self._refuse(stream, lane, error)

    def abort_lanes(self, stream: Stream, lanes: Iterable[int]) -> None:
        """Stops executions of a stream; lanes that are not in use are ignored."""
        for lane in lanes:
            run = stream.runs.get(lane)
            if run is not None:
                self._abort(run, runs.aborted())

    def abort_ids(self, execution_ids: Iterable[str]) -> tuple[list[str], list[str]]:
        """Stops executions, whoever started them; returns which ran, and which are unknown."""
        stopped: list[str] = []
        unknown: list[str] = []
        for execution_id in execution_ids:
            run = self._by_id.get(execution_id)
            if run is None:
                unknown.append(execution_id)
            else:
                self._abort(run, runs.aborted())
                stopped.append(execution_id)
        return stopped, unknown

    async def pump(self) -> None:
        """Carries every step of the engine to the streams, until the engine dies.

        Raises:
            EngineDied: it is gone; all executions have been told.
        """
        try:
            while True:
                self._deliver(await self._engine.next_step())
        except EngineDied:
            self._die()
            raise

    async def watch(self) -> None:
        """Stops executions whose budget is used up, and watches that what is stopped ends.

        Raises:
            EngineDied: an execution that was stopped did not end: the engine hangs. All executions
                have been told.
        """
        while True:
            await self._alarm.wait()
            now_s = self._clock.monotonic_s()
            if now_s >= self._earliest_s:
                self._expire(now_s)
            oldest = next(iter(self._ending.values()), None)
            if oldest is not None:
                hung_s = oldest.stopped_s + self._abort_within_s
                if now_s >= hung_s:
                    self._die()
                    raise EngineDied(f"an execution did not end within {self._abort_within_s:g} s")
                self._alarm.set_by(hung_s)
            self._alarm.set_by(self._earliest_s)

    async def drain(self) -> None:
        """Refuses what is new and waits for the rest; when cancelled, stops the rest."""
        self._refusing = runs.draining
        try:
            await self._is_idle.wait()
        except asyncio.CancelledError:
            for run in list(self._by_id.values()):
                self._abort(run, runs.draining(self._worker))
            raise
        finally:
            self._close_streams(runs.draining)

    def _start(self, stream: Stream, execution: engine_pb2.Execution) -> None:
        self._require_place(execution)
        self._admission.check(execution)
        run = Run(execution, stream, self._deadline_s(execution))
        if is_short(execution):
            self._submit(run, self._work(execution))
            return
        if self._preparing >= PREPARING_MAX:
            raise ResourceExhausted("too many long prompts wait for the tokenizer")
        self._preparing += 1
        self._add(run)
        stream.tasks.create_task(self._prepare(run, execution), name="prepare")

    def _require_place(self, execution: engine_pb2.Execution) -> None:
        if self._refusing is not None:
            raise self._refusing(self._worker)
        if execution.epoch < self.epoch:
            raise FailedPrecondition(
                "the worker has registered anew",
                reason=Reason.FENCED,
                metadata={"epoch": str(execution.epoch), "currentEpoch": str(self.epoch)},
            )
        if execution.execution_id in self._by_id:
            raise invalid_field("execution_id", FieldRule.CONFLICTING, "runs here already")
        if len(self._by_id) >= self._most:
            raise ResourceExhausted("the worker's queue is full")

    def _deadline_s(self, execution: engine_pb2.Execution) -> float:
        if not execution.HasField("budget"):
            return UNLIMITED_S
        budget_s = execution.budget.ToNanoseconds() / 1e9
        if budget_s <= 0:
            raise runs.expired()
        return self._clock.monotonic_s() + budget_s

    async def _prepare(self, run: Run, execution: engine_pb2.Execution) -> None:
        """Makes a long prompt away from the event loop."""
        loop = asyncio.get_running_loop()
        try:
            made = await loop.run_in_executor(self._threads, self._work, execution)
            if run.failure is None:
                self._submit(run, made)
        except MaasError as error:
            if run.failure is None:
                self._forget(run)
                run.tell_failure(error)
                metrics.EXECUTIONS.labels(error.reason.value).inc()
        finally:
            self._preparing -= 1
            run.outbox.wake_soon()

    def _work(self, execution: engine_pb2.Execution) -> Work:
        """Makes what the engine and the text layer need. May run in a thread.

        A defect on one prompt must not end all others' stream.
        """
        try:
            return self._admission.work(execution)
        except MaasError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a tokenizer does wrong; its text may quote the prompt
            log.error(  # noqa: TRY400 - a traceback's last line may quote the prompt
                "prompt failed", execution=execution.execution_id, error=type(error).__name__
            )
            raise Internal("internal error") from None

    def _submit(self, run: Run, work: Work) -> None:
        """Puts an execution into the engine, unless all of it was released elsewhere."""
        request = work.request
        ended = self._admission.ended_before(request)
        if run.prime(self._pieces, work):
            # Whatever the reason, the text layer says at the end which stop sequence it was.
            ended = EndReason.STOP_TOKEN
        self._lanes += 1
        try:
            if ended is None:
                self._engine.submit(self._lanes, request)
        except EngineDied:
            raise runs.lost(self._worker) from None
        run.engine_lane = self._lanes
        self._add(run)
        self._running[self._lanes] = run
        if run.text is not None and not run.is_matching:
            self._routes.holding.add(run)
        self._reports.started(run.execution_id)
        run.outbox.accept(run.lane, len(request.prompt_ids), run.interval_s)
        metrics.INPUT_TOKENS.inc(len(request.prompt_ids))
        if ended is not None:
            self._end(Ended(self._lanes, ended))
        run.outbox.wake_soon()

    def _deliver(self, batch: StepBatch) -> None:
        """Hands one batch to the streams."""
        route = self._routes.find(batch.lanes, self._running)
        if route is None:
            self._deliver_rows(batch)
        else:
            self._hand_on(route, batch)
        for ended in batch.ended:
            self._end(ended)
        self._meter.add(len(batch.lanes), may_be_last=bool(batch.ended))
        for stream in self._streams:
            stream.outbox.wake()

    def _hand_on(self, route: Route, batch: StepBatch) -> None:
        """Hands on columns; row by row what has stop sequences or is no whole text of its own."""
        for group in route.groups:
            token_ids = group.pick(batch.token_ids)
            texts = [self._pieces.texts[token_id] for token_id in token_ids]
            if None in texts:
                lanes = list(group.pick(batch.lanes))
                self._deliver_rows(StepBatch(lanes=lanes, token_ids=list(token_ids)))
                continue
            outbox = group.outbox
            outbox.lanes += group.lanes
            outbox.token_ids += token_ids
            outbox.texts += cast("list[str]", texts)
        for row, run in route.matching:
            self._push(run, batch.token_ids[row])

    def _deliver_rows(self, batch: StepBatch) -> None:
        """Hands on row by row."""
        running = self._running
        texts = self._pieces.texts
        for lane, token_id in zip(batch.lanes, batch.token_ids, strict=True):
            run = running.get(lane)
            if run is None:
                continue
            text = texts[token_id]
            if text is None or run.text is not None:
                self._push(run, token_id)
                continue
            outbox = run.outbox
            outbox.lanes.append(run.lane)
            outbox.token_ids.append(token_id)
            outbox.texts.append(text)

    def _push(self, run: Run, token_id: int) -> None:
        """Takes a token through the text layer."""
        text = run.text
        if text is None:
            text = run.text = OutputText(self._pieces)
            self._routes.holding.add(run)
        release = text.push(token_id)
        run.show(release)
        if release.stop is not None:
            self._stopped(run, release.stop)
        elif text.is_clear and not run.is_matching:
            run.text = None
            self._routes.holding.discard(run)

    def _stopped(self, run: Run, sequence: str) -> None:
        """A stop sequence ended the output; the engine does not know yet."""
        run.tell_end(stop_to_pb(sequence))
        metrics.EXECUTIONS.labels("OK").inc()
        self._stop(run)

    def _stop(self, run: Run) -> None:
        """Asks the engine to end an execution, which says nothing more."""
        lane = run.engine_lane
        assert lane is not None
        self._ending[lane] = self._running.pop(lane)
        self._routes.leave(run)
        run.stopped_s = self._clock.monotonic_s()
        self._alarm.set_by(run.stopped_s + self._abort_within_s)
        self._engine.abort(lane)

    def _end(self, ended: Ended) -> None:
        """The engine has ended an execution: its place is free."""
        run = self._running.pop(ended.lane, None)
        if run is not None:
            self._routes.leave(run)
            self._conclude(run, ended)
        else:
            run = self._ending.pop(ended.lane, None)
            if run is None:
                # The engine counted as dead, and speaks.
                return
            if run.failure is not None:
                run.tell_failure(run.failure)
        self._forget(run)
        self._reports.ended(run.execution_id)

    def _conclude(self, run: Run, ended: Ended) -> None:
        """Tells the end of an output that nobody stopped."""
        if ended.reason in (EndReason.FAILED, EndReason.ABORTED):
            log.error("engine failed", execution=run.execution_id, cause=ended.message)
            error = runs.engine_failure(self._worker)
            run.tell_failure(error)
            metrics.EXECUTIONS.labels(error.reason.value).inc()
            return
        end = end_to_pb(ended, is_capped=run.is_capped)
        if run.text is not None:
            release = run.text.finish()
            run.show(release)
            if release.stop is not None:
                end = stop_to_pb(release.stop)
        run.tell_end(end)
        metrics.EXECUTIONS.labels("OK").inc()

    def _abort(self, run: Run, error: MaasError) -> None:
        """Stops an execution. May be repeated; the first reason stays."""
        if run.failure is not None:
            return
        if run.engine_lane is None:
            run.failure = error
            run.tell_failure(error)
            self._forget(run)
        elif run.engine_lane in self._running:
            run.failure = error
            self._stop(run)
        else:
            return
        run.outbox.wake_soon()
        metrics.EXECUTIONS.labels(error.reason.value).inc()

    def _refuse(self, stream: Stream, lane: int, error: MaasError) -> None:
        ended = engine_pb2.Ended(lane=lane, failure=failure_to_pb(error))
        stream.outbox.end(ended)
        stream.outbox.wake_soon()
        metrics.EXECUTIONS.labels(error.reason.value).inc()

    def _poison(self, stream: Stream, lane: int) -> None:
        """Two executions share a lane: whatever came next could not be told apart, so both end.

        One Ended ends both; where the first has ended already, its Ended is on the way.
        """
        run = stream.runs.get(lane)
        if run is not None:
            self._abort(run, invalid_field("lane", FieldRule.CONFLICTING, "is in use"))

    def _expire(self, now_s: float) -> None:
        self._earliest_s = UNLIMITED_S
        for run in list(self._by_id.values()):
            if run.deadline_s <= now_s:
                self._abort(run, runs.expired())
            else:
                self._earliest_s = min(self._earliest_s, run.deadline_s)

    def _die(self) -> None:
        """Tells everybody that the engine is gone."""
        self._refusing = runs.lost
        for run in list(self._by_id.values()):
            run.failure = runs.lost(self._worker)
            run.tell_failure(run.failure)
            metrics.EXECUTIONS.labels(run.failure.reason.value).inc()
            self._forget(run)
        self._running.clear()
        self._ending.clear()
        self._routes = Routes()
        self._close_streams(runs.lost)

    def _close_streams(self, error: Callable[[str], MaasError]) -> None:
        for stream in self._streams:
            stream.outbox.close(error(self._worker))

    def _add(self, run: Run) -> None:
        self._by_id[run.execution_id] = run
        run.stream.runs[run.lane] = run
        self._is_idle.clear()
        if run.deadline_s < self._earliest_s:
            self._earliest_s = run.deadline_s
            self._alarm.set_by(run.deadline_s)

    def _forget(self, run: Run) -> None:
        del self._by_id[run.execution_id]
        if not self._by_id:
            self._is_idle.set()
