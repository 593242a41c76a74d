"""The scheduler as the process sees it: facts become steps of the core, its commands answers.

Belongs to one event loop. A step never suspends, so the state needs no lock; a caller is answered
in the same turn of the loop in which its slot becomes free. No database and no task of its own
stand in the way of a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import assert_never

import structlog

from libs.clock import Clock
from libs.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    MaasError,
    Reason,
    ResourceExhausted,
    Unavailable,
    unavailable,
)
from libs.rpc import Hub
from services.scheduler import metrics
from services.scheduler.core.messages import (
    CallerGone,
    Command,
    EndStream,
    Grant,
    Input,
    Refusal,
    Refuse,
    Registration,
    SlotAsked,
    SlotsReleased,
    StreamBroken,
    StreamEnd,
    TakeBack,
    Tick,
    WorkerHeard,
    WorkerRegistered,
    WorkerState,
)
from services.scheduler.core.state import Settings, State, Worker
from services.scheduler.core.step import step

# How late a time-out may be noticed; nothing else waits for it.
TICK_S = 0.1
# The same while nobody waits and every slot has started: only leases can run out.
TICK_IDLE_S = 0.4
OBSERVE_S = 1.0
# A gateway's library may repeat a refusal of this kind by itself; together its attempts bridge the
# second that workers need to come back to a restarted scheduler.
NO_WORKER_RETRY_S = 0.5
QUEUE_FULL_RETRY_S = 1.0

log = structlog.get_logger(__name__)


class Connection:
    """One worker's stream, as long as it is registered."""

    def __init__(self, worker: str, epoch: int, cut: Callable[[], None]) -> None:
        self.worker = worker
        self.epoch = epoch
        self._cut = cut
        self.error: MaasError | None = None

    def end(self, error: MaasError) -> None:
        """Interrupts whoever reads the stream; it finds the cause in `error`."""
        if self.error is None:
            self.error = error
            self._cut()


class Scheduler:
    """The core, its clock, and those who wait for its answers.

    Attributes:
        hub: poked when a worker is new or what it is has changed.
    """

    def __init__(self, settings: Settings, clock: Clock, *, instance: str) -> None:
        """Starts empty; `instance` is random per process."""
        self.hub = Hub()
        self._clock = clock
        self._state = State(settings, instance, clock.monotonic_s())
        self._callers: dict[str, list[asyncio.Future[Grant]]] = {}
        self._connections: dict[tuple[str, int], Connection] = {}
        self._is_idle = False

    async def acquire(self, ask: SlotAsked) -> Grant:
        """Waits for a slot. Suspends only when all workers are full; cancelling leaves the queue.

        Raises:
            Unavailable: no worker serves the version; or the scheduler stops.
            ResourceExhausted: the queue is full.
            DeadlineExceeded: the longest wait has passed.
        """
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._callers.setdefault(ask.execution_id, []).append(answer)
        self._take(ask)
        try:
            return await answer
        except asyncio.CancelledError:
            self._caller_gone(ask.execution_id, answer)
            raise

    def release(self, slot_ids: tuple[str, ...]) -> None:
        """Frees slots; unknown ids are ignored."""
        self._take(SlotsReleased(slot_ids=slot_ids))

    @contextmanager
    def connect(
        self, registration: Registration, epoch: int, cut: Callable[[], None]
    ) -> Iterator[Connection]:
        """Has a worker registered for the length of the block, or until it is lost or replaced.

        Args:
            registration: who it is.
            epoch: from the store.
            cut: called at most once, when the scheduler ends the stream.
        """
        connection = Connection(registration.worker, epoch, cut)
        self._connections[connection.worker, epoch] = connection
        try:
            log.info(
                "worker registered",
                worker=registration.worker,
                epoch=epoch,
                endpoint=registration.endpoint,
                running=len(registration.running),
                is_loading=registration.loading is not None,
            )
            self._take(WorkerRegistered(registration=registration, epoch=epoch))
            yield connection
        finally:
            del self._connections[connection.worker, epoch]
            if connection.error is None:
                metrics.WORKERS_LOST.labels("stream closed").inc()
                log.warning("worker stream closed", worker=connection.worker, epoch=epoch)
                self._take(StreamBroken(worker=connection.worker, epoch=epoch))

    def hear(self, event: WorkerHeard) -> None:
        """Takes in what a worker says."""
        self._take(event)

    def workers(self) -> list[Worker]:
        """Lists all workers by name; to be read before the next suspension, not to be changed."""
        return sorted(self._state.workers.values(), key=lambda worker: worker.name)

    def workers_after(self, revision: int, count: int) -> list[Worker]:
        """Lists workers that have changed after a revision, lowest first; as `workers` does."""
        changed = [item for item in self._state.workers.values() if item.revision > revision]
        return sorted(changed, key=lambda worker: worker.revision)[:count]

    async def run(self) -> None:
        """Lets time pass, for ever: time-outs, leases, gauges, and recounts when idle."""
        observed_s = self._clock.monotonic_s()
        while True:
            self._is_idle = True
            is_awaited = self._state.waiting or self._state.unstarted
            await self._clock.sleep_s(TICK_S if is_awaited else TICK_IDLE_S)
            is_idle = self._is_idle
            self._take(Tick())
            if self._clock.monotonic_s() - observed_s >= OBSERVE_S:
                observed_s = self._clock.monotonic_s()
                self._observe(recounts=is_idle)

    async def close(self) -> None:
        """Sends those who wait elsewhere: this process stops."""
        for execution_id, answers in list(self._callers.items()):
            self._take(CallerGone(execution_id=execution_id))
            self._answer(execution_id, unavailable("scheduler"))
            log.debug("waiter sent away", callers=len(answers))

    def _take(self, event: Input) -> None:
        self._is_idle = False
        revision = self._state.revision
        for command in step(self._state, self._clock.monotonic_s(), event):
            self._obey(command)
        if self._state.revision != revision:
            self.hub.poke()

    def _obey(self, command: Command) -> None:
        match command:
            case Grant():
                metrics.GRANTS.inc()
                metrics.SPARES_GRANTED.inc(len(command.spares))
                if command.queued_s > 0:
                    metrics.QUEUE_WAIT.observe(command.queued_s)
                self._answer(command.execution_id, command)
            case Refuse():
                metrics.REFUSALS.labels(command.refusal.value).inc()
                self._answer(command.execution_id, _error_of(command))
            case TakeBack():
                metrics.SPARES_TAKEN_BACK.inc()
            case EndStream():
                self._end_stream(command)
            case _:
                assert_never(command)

    def _answer(self, execution_id: str, answer: Grant | MaasError) -> None:
        # A caller that was cancelled in this turn of the loop is not there any more.
        callers = [item for item in self._callers.pop(execution_id, ()) if not item.done()]
        for caller in callers:
            if isinstance(answer, MaasError):
                caller.set_exception(answer)
            else:
                caller.set_result(answer)
        if not callers and isinstance(answer, Grant):
            self._take(CallerGone(execution_id=execution_id))

    def _caller_gone(self, execution_id: str, answer: asyncio.Future[Grant]) -> None:
        others = self._callers.get(execution_id)
        if others is not None and answer in others:
            others.remove(answer)
            if others:
                return
            del self._callers[execution_id]
        elif answer.cancelled() or answer.exception() is not None:
            return
        # Else the slot came just before the caller left. Should another call for the same
        # execution have got it as well, the worker's report brings it back. Spares only come with
        # answers that nobody had to wait for.
        self._take(CallerGone(execution_id=execution_id))

    def _end_stream(self, command: EndStream) -> None:
        log.warning(
            "worker stream ended",
            worker=command.worker,
            epoch=command.epoch,
            cause=command.cause.value,
            current_epoch=command.current_epoch,
        )
        if command.cause is not StreamEnd.OLDER_SERVES:
            metrics.WORKERS_LOST.labels(command.cause.value).inc()
        connection = self._connections.get((command.worker, command.epoch))
        if connection is not None:
            connection.end(_stream_error(command))

    def _observe(self, *, recounts: bool) -> None:
        state = self._state
        metrics.GAUGES.latest = metrics.Snapshot(
            queued={key: len(state.queues.get(key, ())) for key in {*state.ready, *state.queues}},
            slots_in_use={item.name: item.used for item in state.workers.values()},
            workers={
                kind.value: sum(item.state is kind for item in state.workers.values())
                for kind in WorkerState
            },
        )
        if recounts:
            for problem in state.check_integrity():
                metrics.INTEGRITY_FAILURES.inc()
                log.error("state is inconsistent", problem=problem)


def _error_of(command: Refuse) -> MaasError:
    match command.refusal:
        case Refusal.NO_READY_WORKER:
            return Unavailable(
                "no worker serves the model version now",
                reason=Reason.NO_READY_WORKER,
                metadata={"modelVersion": command.model_version},
                retry_after_s=NO_WORKER_RETRY_S,
            )
        case Refusal.QUEUE_FULL:
            return ResourceExhausted(
                "the queue for the model version is full", retry_after_s=QUEUE_FULL_RETRY_S
            )
        case Refusal.QUEUE_TIMEOUT:
            return DeadlineExceeded(
                "no slot became free within the longest wait", reason=Reason.QUEUE_TIMEOUT
            )


def _stream_error(command: EndStream) -> MaasError:
    match command.cause:
        case StreamEnd.REPLACED:
            return FailedPrecondition(
                "a newer registration of this worker has taken its place",
                reason=Reason.FENCED,
                metadata={
                    "epoch": str(command.epoch),
                    "currentEpoch": str(command.current_epoch),
                },
            )
        case StreamEnd.OLDER_SERVES:
            return FailedPrecondition(
                "another process of this worker still serves: come again when it has ended, or"
                " when the model is loaded",
                reason=Reason.FENCED,
                metadata={
                    "epoch": str(command.epoch),
                    "currentEpoch": str(command.current_epoch),
                },
            )
        case StreamEnd.LEASE_OVER:
            return Unavailable(
                "nothing was heard of the worker for the length of its lease",
                reason=Reason.WORKER_LOST,
                metadata={"worker": command.worker},
            )
