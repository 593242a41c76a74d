"""The executions of one worker: from a gateway's wish to the engine, and what becomes of them.

    start --refused--------------------------------------------------> Ended(failure)
      |-- preparing (long, constrained, with an adapter) --refused---> Ended(failure)
      '-> running: tokens through delivery.py -----------------------> Ended(end)
            |-- stop sequence, time limit: ending -------------------> Ended(end)
            '-- abort, deadline, stream gone: ending ----------------> Ended(failure)

An execution takes one place and has one or more outputs, each with a lane of its own. Lanes of a
stream are the gateway's; lanes of the engine are ours, one counter for the process. A place counts
until the engine says that the last output ended, whatever its stream was told before: only then is
it free, and only then does the scheduler hear of it.

Never: writes to a stream, speaks to the scheduler, keeps text of an execution that is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import structlog
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from libs.clock import Clock
from libs.errors import (
    FieldRule,
    MaasError,
    invalid_field,
)
from services.worker import metrics, runs
from services.worker.adapters import Adapters
from services.worker.admission import Admission
from services.worker.alarm import Alarm
from services.worker.convert import failure_to_pb, time_limit_to_pb
from services.worker.delivery import Delivery
from services.worker.engine.base import Ended, EndReason, Engine, EngineDied, EngineInfo, Lane
from services.worker.engine_time import EngineTime
from services.worker.kv_watch import KvLog
from services.worker.places import Places
from services.worker.preparation import Preparation, guarded
from services.worker.prompt import is_short, work_of
from services.worker.reports import Reports
from services.worker.requests import count_of
from services.worker.runs import UNLIMITED_S, Place, Run, Stream
from services.worker.text import TokenPieces
from services.worker.work import Work

log = structlog.get_logger(__name__)

# How late a deadline may be noticed.
WATCH_TICK_S = 0.02


class Executions:
    """All executions of the process. Belongs to one event loop.

    Attributes:
        engine_time: shares of everything that the engine works on.
    """

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        *,
        admission: Admission,
        adapters: Adapters,
        pieces: TokenPieces,
        reports: Reports,
        preparation: Preparation,
        kv_log: KvLog,
        clock: Clock,
        worker: str,
        max_waiting: int,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._adapters = adapters
        self._pieces = pieces
        self._preparation = preparation
        self._kv_log = kv_log
        self._clock = clock
        self._worker = worker
        self._streams: set[Stream] = set()
        self.engine_time = EngineTime(clock, info.max_running)
        self._delivery = Delivery(
            pieces,
            engine_time=self.engine_time,
            on_stopped=self._stopped,
            on_ended=self._end,
        )
        # By lane of the engine: outputs whose end is only waited for.
        self._ending: dict[Lane, Run] = {}
        self._preparing = 0
        self._lanes = 0
        self._alarm = Alarm(clock, WATCH_TICK_S)
        most = info.max_running + max_waiting
        self._places = Places(reports, self._alarm, worker=worker, most=most)

    @property
    def epoch(self) -> int:
        """Of the worker's registration; 0 until there was one."""
        return self._places.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._places.epoch = epoch

    @property
    def preparing(self) -> int:
        """Executions that the engine does not know yet."""
        return self._preparing

    @property
    def count(self) -> int:
        """Executions that are here, in the engine or on their way to it."""
        return len(self._places)

    def running_ids(self) -> list[str]:
        """Ids of all executions that hold a place in the engine, or wait for one there."""
        return self._places.running_ids()

    @contextmanager
    def stream(self, tasks: asyncio.TaskGroup) -> Iterator[Stream]:
        """Opens a stream; leaving aborts what it started."""
        stream = Stream(tasks, self._clock)
        self._streams.add(stream)
        if self._places.refusing is not None:
            stream.outbox.close(self._places.refusing(self._worker))
        try:
            yield stream
        finally:
            self._streams.discard(stream)
            stream.outbox.detach()
            for run in list(stream.runs.values()):
                run.is_told = True
                self._abort(run.place, runs.aborted())

    def start(self, stream: Stream, execution: engine_pb2.Execution) -> None:
        """Starts an execution, or refuses all of it in its stream.

        Raises:
            ResourceExhausted: the gateway starts without reading.
        """
        lanes = [execution.lane, *execution.more_lanes]
        opened = [lane for lane in lanes if stream.outbox.open_lane(lane)]
        if len(opened) < len(lanes):
            error = invalid_field("lane", FieldRule.CONFLICTING, "is in use")
            for lane in set(lanes):
                self._poison(stream, lane, error)
            if len(lanes) > 1:
                self._refuse(stream, opened, error)
            return
        try:
            self._start(stream, execution, lanes)
        except MaasError as error:
            self._refuse(stream, lanes, error)

    def abort_lanes(self, stream: Stream, lanes: Iterable[int]) -> None:
        """Stops the executions of lanes of a stream; lanes that are not in use are ignored."""
        for lane in lanes:
            run = stream.runs.get(lane)
            if run is not None:
                self._abort(run.place, runs.aborted())

    def abort_ids(self, execution_ids: Iterable[str]) -> tuple[list[str], list[str]]:
        """Stops executions, whoever started them; returns which ran, and which are unknown."""
        stopped: list[str] = []
        unknown: list[str] = []
        for execution_id in execution_ids:
            place = self._places.find(execution_id)
            if place is None:
                unknown.append(execution_id)
            else:
                self._abort(place, runs.aborted())
                stopped.append(execution_id)
        return stopped, unknown

    @contextmanager
    def occupy(self, execution_id: str, epoch: int, stop: Callable[[], object]) -> Iterator[Place]:
        """Takes a place for what is no execution; leaving frees it.

        Args:
            execution_id: what the scheduler knows it by.
            epoch: from the slot.
            stop: called when it is aborted; the place then says why.

        Raises:
            FailedPrecondition: the epoch is older than ours.
            InvalidArgument: the id is in use.
            ResourceExhausted: everything is full.
            Unavailable: the worker is draining, or its engine is gone.
        """
        self._places.require(execution_id, epoch, 1)
        place = Place(execution_id)
        place.stop = stop
        place.open = 1
        self._places.start(place)
        try:
            yield place
        finally:
            self._places.release(place)

    async def pump(self) -> None:
        """Carries every step of the engine to the streams, until the engine dies.

        Raises:
            EngineDied: it is gone; all executions have been told.
        """
        try:
            while True:
                batch = await self._engine.next_step()
                self._delivery.deliver(batch)
                if batch.kv_events:
                    self._kv_log.add(batch.kv_events)
                for stream in self._streams:
                    stream.outbox.wake()
        except EngineDied:
            self.die()
            raise

    async def watch(self) -> None:
        """Ends executions whose time is up, for ever."""
        while True:
            await self._alarm.wait()
            now_s = self._clock.monotonic_s()
            if now_s >= self._places.earliest_s:
                self._expire(now_s)
            self._alarm.set_by(self._places.earliest_s)

    def die(self) -> None:
        """Tells everybody that the engine is gone, or hangs. May be repeated."""
        if self._places.refusing is runs.lost:
            return
        self._places.refusing = runs.lost
        self._delivery.clear()
        for place in self._places:
            place.failure = runs.lost(self._worker)
            for run in place.runs:
                run.tell_failure(place.failure)
            metrics.EXECUTIONS.labels(place.failure.reason.value).inc()
            if place.stop is not None:
                place.stop()
            else:
                self._places.forget(place)
        self._ending.clear()
        self._close_streams(runs.lost)

    async def drain(self) -> None:
        """Refuses what is new and waits for the rest; when cancelled, stops the rest."""
        self._places.refusing = runs.draining
        try:
            await self._places.is_idle.wait()
        except asyncio.CancelledError:
            for place in self._places:
                self._abort(place, runs.draining(self._worker))
            raise
        finally:
            self._close_streams(runs.draining)

    def _start(self, stream: Stream, execution: engine_pb2.Execution, lanes: Sequence[int]) -> None:
        self._places.require(execution.execution_id, execution.epoch, len(lanes))
        self._admission.check(execution)
        if count_of(execution) != len(lanes):
            raise invalid_field(
                "more_lanes", FieldRule.CONFLICTING, "must be one less than spec.output.count"
            )
        place = self._new_place(execution)
        interval_s = execution.output_interval.ToNanoseconds() / 1e9
        for lane in lanes:
            Run(place, stream, lane, interval_s)
        place.open = len(lanes)
        if _is_quick(execution):
            self._submit(place, guarded(place.execution_id, self._admission.work, execution))
            return
        self._preparation.require_room(self._preparing)
        self._preparing += 1
        self._places.add(place)
        place.preparing = stream.tasks.create_task(self._prepare(place, execution), name="prepare")
        # Not in the task: one that is cancelled before its first step does nothing at all.
        place.preparing.add_done_callback(self._prepared)

    def _new_place(self, execution: engine_pb2.Execution) -> Place:
        deadline_s = limit_s = UNLIMITED_S
        if execution.HasField("budget"):
            budget_s = execution.budget.ToNanoseconds() / 1e9
            if budget_s <= 0:
                raise runs.expired()
            deadline_s = self._clock.monotonic_s() + budget_s
        if execution.HasField("time_limit"):
            limit_s = self._clock.monotonic_s() + execution.time_limit.ToNanoseconds() / 1e9
        return Place(execution.execution_id, deadline_s, limit_s)

    async def _prepare(self, place: Place, execution: engine_pb2.Execution) -> None:
        """Makes away from the event loop what takes its time."""
        outbox = place.runs[0].outbox
        try:
            made = await self._preparation.run(
                place.execution_id, work_of(execution), self._admission.work, execution
            )
            if execution.HasField("adapter") and place.failure is None:
                made = made.with_adapter(await self._adapters.ready(execution.adapter))
            if place.failure is None:
                self._submit(place, made)
        except EngineDied:
            self._give_up(place, runs.lost(self._worker))
        except MaasError as error:
            self._give_up(place, error)
        finally:
            outbox.wake_soon()

    def _prepared(self, _: asyncio.Task[None]) -> None:
        self._preparing -= 1

    def _give_up(self, place: Place, error: MaasError) -> None:
        """Tells an execution that could not be prepared, unless it has been stopped."""
        if place.failure is not None:
            return
        self._places.forget(place)
        for run in place.runs:
            run.tell_failure(error)
        metrics.EXECUTIONS.labels(error.reason.value).inc()

    def _submit(self, place: Place, work: Work) -> None:
        """Puts the outputs of an execution into the engine, unless all was released elsewhere."""
        is_late = place.limit_s <= self._clock.monotonic_s()
        ends = [self._enter(run, work, is_late=is_late) for run in place.runs]
        self._places.start(place)
        first = place.runs[0]
        first.outbox.accept(first.lane, work.input_tokens, first.interval_s)
        for run in place.runs[1:]:
            run.outbox.follow(run.lane, run.interval_s)
        metrics.INPUT_TOKENS.inc(work.input_tokens)
        for run, ended in zip(place.runs, ends, strict=True):
            lane = run.engine_lane
            assert lane is not None
            if ended is not None:
                self._end(Ended(lane, ended))
            elif is_late:
                self._delivery.pop(lane)
                self._tell_end(run, time_limit_to_pb())
                self._places.release(place)
        first.outbox.wake_soon()

    def _enter(self, run: Run, work: Work, *, is_late: bool) -> EndReason | None:
        """Submits one output; returns how it has ended, if it has.

        Raises:
            Unavailable: the engine is gone.
        """
        request = work.requests[run.place.runs.index(run)]
        ended = self._admission.ended_before(request)
        if run.prime(self._pieces, work):
            # Whatever the reason, the text layer says at the end which stop sequence it was.
            ended = EndReason.STOP_TOKEN
        self._lanes += 1
        try:
            if ended is None and not is_late:
                self._engine.submit(self._lanes, request)
        except EngineDied:
            raise runs.lost(self._worker) from None
        self._delivery.add(run, self._lanes)
        return ended

    def _stopped(self, run: Run, end: generation_pb2.OutputEnd) -> None:
        """An output is to end well; the engine does not know yet."""
        self._stop(run)
        self._tell_end(run, end)

    def _stop(self, run: Run) -> None:
        """Asks the engine to end an output, which says nothing more."""
        lane = run.engine_lane
        assert lane is not None
        self._delivery.pop(lane)
        self._ending[lane] = run
        self._engine.abort(lane)

    def _end(self, ended: Ended) -> None:
        """The engine has ended an output."""
        run = self._delivery.pop(ended.lane)
        if run is not None:
            self._conclude(run, ended)
        else:
            run = self._ending.pop(ended.lane, None)
            if run is None:
                # The engine counted as dead, and speaks.
                return
            if run.place.failure is not None:
                run.tell_failure(run.place.failure)
        self._places.release(run.place)

    def _conclude(self, run: Run, ended: Ended) -> None:
        """Tells the end of an output that nobody stopped."""
        if ended.reason in (EndReason.FAILED, EndReason.ABORTED):
            log.error("engine failed", execution=run.place.execution_id, cause=ended.message)
            error = runs.engine_failure(self._worker)
            run.tell_failure(error)
            metrics.EXECUTIONS.labels(error.reason.value).inc()
            return
        self._tell_end(run, self._delivery.conclude(run, ended))

    def _tell_end(self, run: Run, end: generation_pb2.OutputEnd) -> None:
        run.tell_end(end)
        metrics.EXECUTIONS.labels("OK").inc()

    def _abort(self, place: Place, error: MaasError) -> None:
        """Stops all outputs of an execution. May be repeated; the first reason stays."""
        if place.failure is not None:
            return
        if place.stop is not None:
            place.failure = error
            place.stop()
        elif not place.is_started:
            place.failure = error
            for run in place.runs:
                run.tell_failure(error)
            self._places.forget(place)
            if place.preparing is not None:
                # What nobody waits for is not made: the thread has others to serve.
                place.preparing.cancel()
        else:
            speaking = [run for run in place.runs if run.engine_lane in self._delivery.running]
            if not speaking:
                return
            place.failure = error
            for run in speaking:
                self._stop(run)
        for run in place.runs[:1]:
            run.outbox.wake_soon()
        metrics.EXECUTIONS.labels(error.reason.value).inc()

    def _refuse(self, stream: Stream, lanes: Iterable[int], error: MaasError) -> None:
        for lane in lanes:
            stream.outbox.end(engine_pb2.Ended(lane=lane, failure=failure_to_pb(error)))
        stream.outbox.wake_soon()
        metrics.EXECUTIONS.labels(error.reason.value).inc()

    def _poison(self, stream: Stream, lane: int, error: MaasError) -> None:
        """Two executions share a lane: whatever came next could not be told apart, so both end.

        One Ended ends both; where the first has ended already, its Ended is on the way.
        """
        run = stream.runs.get(lane)
        if run is not None:
            self._abort(run.place, error)

    def _expire(self, now_s: float) -> None:
        places = self._places
        places.earliest_s = UNLIMITED_S
        for place in places:
            if place.deadline_s <= now_s:
                self._abort(place, runs.expired())
                continue
            if place.limit_s <= now_s and place.is_started:
                self._end_in_time(place)
            places.earliest_s = min(places.earliest_s, place.due_s)

    def _end_in_time(self, place: Place) -> None:
        """The time of an execution's outputs is up; what has been shown of them stays."""
        place.limit_s = UNLIMITED_S
        for run in place.runs:
            if run.engine_lane in self._delivery.running:
                self._stopped(run, time_limit_to_pb())
                run.outbox.wake_soon()

    def _close_streams(self, error: Callable[[str], MaasError]) -> None:
        for stream in self._streams:
            stream.outbox.close(error(self._worker))
        self._kv_log.close(error)


def _is_quick(execution: engine_pb2.Execution) -> bool:
    """Tells whether an execution is made so fast that it may happen on the event loop."""
    return not execution.HasField("adapter") and is_short(execution)
