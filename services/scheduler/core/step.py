"""One step of the scheduler: a fact goes in, the state changes, commands come out.

Pure: no gRPC, SQL, clock, chance or asyncio; equal inputs in equal order give equal commands. A
request that was asked for ends exactly once: granted, refused, or gone with its caller.

Between steps no worker has room, free places or spares, for the request that is next on it. So
whoever comes finds either a worker with room that nobody of its class waits for, or a queue to
join: nobody is overtaken within a class, and no request waits for a slot that is only kept for one
that may come. A request that wants more places than are free is passed over, but one worker saves
up for the oldest such request of each version and class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from services.scheduler.core import placement
from services.scheduler.core.messages import (
    CallerGone,
    Command,
    DrainAsked,
    EndStream,
    ExecutionsReported,
    Grant,
    Input,
    Loaded,
    LoadingReported,
    LoadReported,
    Priority,
    Refusal,
    Refuse,
    Registration,
    SlotAsked,
    SlotsReleased,
    Spare,
    StreamBroken,
    StreamEnd,
    TakeBack,
    Tick,
    WorkerHeard,
    WorkerRegistered,
    WorkerState,
)
from services.scheduler.core.queue import Waiter
from services.scheduler.core.state import (
    ENDED_REMEMBERED_MAX,
    SLOTS_PER_WORKER_MAX,
    Slot,
    State,
    Worker,
)


def step(state: State, now_s: float, event: Input) -> list[Command]:
    """Takes in one fact.

    Args:
        state: changed in place.
        now_s: monotonic; never before that of an earlier step.
        event: what has happened.

    Returns:
        What to tell whom, in order.
    """
    return _Step(state, now_s).take(event)


class _Step:
    """The state, the time and the commands of one step."""

    __slots__ = ("_commands", "_now_s", "_state")

    def __init__(self, state: State, now_s: float) -> None:
        self._state = state
        self._now_s = now_s
        self._commands: list[Command] = []

    def take(self, event: Input) -> list[Command]:
        was_wide = bool(self._state.wide)
        self._take_in(event)
        if (was_wide or self._state.wide) and not isinstance(event, LoadReported):
            self._fill_all()
        return self._commands

    def _take_in(self, event: Input) -> None:
        match event:
            case SlotAsked():
                self._ask(event)
            case WorkerHeard():
                self._hear(event)
            case SlotsReleased():
                self._release(event)
            case CallerGone():
                self._leave(event)
            case WorkerRegistered():
                self._register(event)
            case Tick():
                self._tick()
            case _:
                assert_never(event)

    @property
    def _is_gathering(self) -> bool:
        return self._state.gathers_until_s is not None

    # Requests.

    def _ask(self, ask: SlotAsked) -> None:
        slot = self._state.slots.get(ask.execution_id)
        if slot is not None and _is_of_use(slot, ask):
            if not ask.is_ahead:
                self._state.unmark_spare(slot)
            self._say_leased(slot, ask, self._ranked(ask))
            return
        if slot is not None:
            self._free(slot)
        if ask.execution_id in self._state.waiting:
            return
        workers = self._ranked(ask)
        can_wait = ask.max_wait_s > 0
        if ask.is_ahead and workers:
            self._ask_ahead(ask, workers)
            return
        worker = self._worker_for(ask, workers)
        if worker is not None:
            slot = self._grant(worker, ask.execution_id, ask.places)
            self._say_leased(slot, ask, workers)
        elif not workers and not (can_wait and self._is_gathering):
            self._refuse(ask, Refusal.NO_READY_WORKER)
        elif not can_wait:
            self._refuse(ask, Refusal.QUEUE_TIMEOUT)
        elif not self._state.put_waiter(_waiter_of(ask, self._now_s, self._state.next_turn())):
            self._refuse(ask, Refusal.QUEUE_FULL)

    def _worker_for(self, ask: SlotAsked, workers: list[Worker]) -> Worker | None:
        """Picks the best worker with room that nobody of the request's class waits for."""
        if not workers or workers[0].room < ask.places:
            return None
        if ask.affinity:
            workers = placement.preferred_first(workers, ask.affinity, ask.places)
        for worker in workers:
            if worker.room >= ask.places and not self._is_awaited(worker, ask.priority):
                return worker
        return None

    def _is_awaited(self, worker: Worker, lowest: Priority) -> bool:
        # Of what is free, the next on it may be saving up for more.
        is_any = bool(self._state.waiting)
        return is_any and self._state.next_waiter(worker, lowest) is not None

    def _ask_ahead(self, ask: SlotAsked, workers: list[Worker]) -> None:
        """Grants spares only, the execution's own slot among them."""
        worker = next(self._workers_for_spares(ask, workers), None)
        if worker is None:
            self._refuse(ask, Refusal.QUEUE_TIMEOUT)
            return
        slot = self._grant(worker, ask.execution_id)
        self._state.mark_spare(slot)
        self._say_leased(slot, ask, workers)

    def _leave(self, gone: CallerGone) -> None:
        waiter = self._state.waiting.get(gone.execution_id)
        if waiter is not None:
            self._state.remove_waiter(waiter)
            return
        # Granted, but nobody was there to hear it.
        slot = self._state.unstarted.get(gone.execution_id)
        if slot is not None:
            self._free(slot)

    def _release(self, released: SlotsReleased) -> None:
        for slot_id in released.slot_ids:
            slot = self._state.slots_by_id.get(slot_id)
            if slot is not None:
                self._free(slot)

    def _ranked(self, who: SlotAsked | Waiter) -> list[Worker]:
        return placement.ranked(self._state, who.model_version, who.excluded, who.places)

    def _grant(self, worker: Worker, execution_id: str, places: int = 1) -> Slot:
        """Gives places on a worker with room; where they are not free spares make it, latest first.

        The latest because gateways use the oldest first: it is the least likely to start now.
        """
        while worker.free < places and worker.spares:
            spare = next(reversed(worker.spares.values()))
            self._state.remove_slot(spare)
            self._commands.append(TakeBack(execution_id=spare.execution_id, slot_id=spare.slot_id))
        start_by_s = self._now_s + self._state.settings.start_within_s
        slot = self._state.add_slot(worker, execution_id, start_by_s, places=places)
        worker.granted_turn = self._state.next_turn()
        return slot

    def _say_leased(self, slot: Slot, ask: SlotAsked, workers: list[Worker]) -> None:
        """Answers at once, with spares."""
        self._say_granted(slot, workers, queued_s=0.0, spares=self._lease(ask, workers))

    def _lease(self, ask: SlotAsked, workers: list[Worker]) -> tuple[Spare, ...]:
        """Grants spares to the first executions that may come, as far as there is ample room."""
        if not ask.spare_execution_ids:
            return ()
        found: list[Spare] = []
        choice = self._workers_for_spares(ask, workers)
        for execution_id in ask.spare_execution_ids:
            slot = self._state.slots.get(execution_id)
            if slot is None and execution_id not in self._state.waiting:
                worker = next(choice, None)
                if worker is None:
                    break
                slot = self._grant(worker, execution_id)
                self._state.mark_spare(slot)
            # One that was given before, to a call that is repeated, is said again.
            if slot is not None and slot.is_spare and slot.worker in workers:
                target = placement.target_of(slot.worker)
                found.append(Spare(execution_id=execution_id, slot_id=slot.slot_id, target=target))
        return tuple(found)

    def _workers_for_spares(self, ask: SlotAsked, workers: list[Worker]) -> Iterator[Worker]:
        """Names workers with ample room that nobody waits for; none if the version has a queue."""
        if ask.model_version in self._state.queues:
            return iter(())
        if self._state.waiting:
            lowest = Priority.BACKGROUND
            workers = [item for item in workers if not self._is_awaited(item, lowest)]
        return placement.least_loaded_with_ample_room(workers)

    def _say_granted(
        self,
        slot: Slot,
        workers: list[Worker],
        *,
        queued_s: float,
        spares: tuple[Spare, ...] = (),
    ) -> None:
        others = [worker for worker in workers if worker is not slot.worker]
        most = self._state.settings.fallbacks_max
        self._commands.append(
            Grant(
                execution_id=slot.execution_id,
                slot_id=slot.slot_id,
                target=placement.target_of(slot.worker),
                fallbacks=tuple(placement.target_of(worker) for worker in others[:most]),
                queued_s=queued_s,
                spares=spares,
            )
        )

    def _refuse(self, who: SlotAsked | Waiter, refusal: Refusal) -> None:
        self._commands.append(
            Refuse(execution_id=who.execution_id, model_version=who.model_version, refusal=refusal)
        )

    def _free(self, slot: Slot) -> None:
        self._state.remove_slot(slot)
        self._fill(slot.worker)

    def _fill(self, worker: Worker) -> None:
        """Gives a worker's room to those who wait."""
        while worker.state is WorkerState.READY and worker.room > 0:
            waiter = self._state.take_waiter(worker)
            if waiter is None:
                return
            workers = self._ranked(waiter)
            slot = self._grant(worker, waiter.execution_id, waiter.places)
            self._say_granted(slot, workers, queued_s=self._now_s - waiter.asked_s)

    def _fill_all(self) -> None:
        """Gives room to those who wait, wherever there is any.

        Only for steps in which somebody waits for several places: whoever goes, or gets a slot,
        may have been next on other workers too, and they have room for those behind it.
        """
        waiting = -1
        while waiting != len(self._state.waiting):
            waiting = len(self._state.waiting)
            for worker in list(self._state.workers.values()):
                self._fill(worker)

    def _refuse_hopeless(self, model_versions: tuple[str, ...]) -> None:
        """Refuses those whom no worker is left for."""
        if self._is_gathering:
            return
        for version in model_versions:
            queue = self._state.queues.get(version, ())
            hopeless = [item for item in queue if self._state.is_hopeless(item)]
            for waiter in hopeless:
                self._state.remove_waiter(waiter)
                self._refuse(waiter, Refusal.NO_READY_WORKER)

    # Workers.

    def _register(self, event: WorkerRegistered) -> None:
        registration = event.registration
        older = self._state.workers.get(registration.worker)
        if older is not None and older.epoch >= event.epoch:
            self._end_stream(registration.worker, event.epoch, StreamEnd.REPLACED, older.epoch)
            return
        if older is not None and _must_wait_for(older, event):
            self._end_stream(registration.worker, event.epoch, StreamEnd.OLDER_SERVES, older.epoch)
            return
        is_draining = False
        if older is not None:
            # A process that drains never stops doing so; that it does is lost with its stream.
            is_draining = older.is_draining and _is_same_process(older, event)
            if older.state is not WorkerState.LOST:
                self._end_stream(older.name, older.epoch, StreamEnd.REPLACED, event.epoch)
                self._drop(older)
        worker = Worker(
            registration=registration,
            epoch=event.epoch,
            state=_state_of(registration, is_draining=is_draining),
            is_draining=is_draining,
            registered_s=self._now_s,
            heard_s=self._now_s,
            loading=registration.loading,
        )
        self._state.add_worker(worker)
        for execution_id in registration.running:
            self._start(worker, execution_id)
        self._fill(worker)
        if older is not None:
            self._refuse_hopeless(older.registration.info.model_versions)

    def _hear(self, event: WorkerHeard) -> None:
        worker = self._state.workers.get(event.worker)
        if worker is None or worker.epoch != event.epoch or worker.state is WorkerState.LOST:
            return
        worker.heard_s = self._now_s
        match event:
            case ExecutionsReported():
                for execution_id in event.started:
                    self._start(worker, execution_id)
                for execution_id in event.ended:
                    self._end(worker, execution_id)
            case LoadReported():
                worker.load = event.load
            case LoadingReported() | Loaded():
                self._load(worker, event)
            case DrainAsked():
                worker.is_draining = True
                self._state.withdraw(worker, WorkerState.DRAINING)
                self._refuse_hopeless(worker.registration.info.model_versions)
            case StreamBroken():
                self._lose(worker)
            case _:
                pass  # A sign of life and nothing else.

    def _load(self, worker: Worker, event: LoadingReported | Loaded) -> None:
        # One that is loaded has nothing more to say about it.
        if worker.loading is None:
            return
        if isinstance(event, LoadingReported):
            worker.loading = event.loading
            return
        self._state.finish_loading(worker, event.info)
        self._fill(worker)

    def _start(self, worker: Worker, execution_id: str) -> None:
        if execution_id in worker.ended:
            # Ids are unique per attempt: this is an old story told late.
            return
        slot = self._state.slots.get(execution_id)
        if slot is not None:
            left = slot.worker
            self._state.start_slot(slot, worker)
            self._fill(left)
            return
        if len(worker.slots) >= SLOTS_PER_WORKER_MAX:
            return
        # A gateway has placed it by itself, or an earlier scheduler has. How many places it takes
        # is known only of one that waits here.
        waiter = self._state.waiting.get(execution_id)
        places = waiter.places if waiter is not None else 1
        slot = self._state.add_slot(worker, execution_id, None, places=places)
        if waiter is not None:
            self._state.remove_waiter(waiter)
            queued_s = self._now_s - waiter.asked_s
            self._say_granted(slot, self._ranked(waiter), queued_s=queued_s)

    def _end(self, worker: Worker, execution_id: str) -> None:
        worker.ended[execution_id] = None
        if len(worker.ended) > ENDED_REMEMBERED_MAX:
            del worker.ended[next(iter(worker.ended))]
        slot = self._state.slots.get(execution_id)
        # Elsewhere it may still run: a worker that refused it says no more than that.
        if slot is not None and slot.worker is worker:
            self._free(slot)

    def _lose(self, worker: Worker) -> None:
        self._drop(worker)
        self._refuse_hopeless(worker.registration.info.model_versions)
        self._state.forget_lost(self._now_s - self._state.settings.lost_kept_s)

    def _drop(self, worker: Worker) -> None:
        self._state.withdraw(worker, WorkerState.LOST)
        worker.lost_s = self._now_s
        for slot in list(worker.slots.values()):
            self._state.remove_slot(slot)

    def _end_stream(self, worker: str, epoch: int, cause: StreamEnd, current_epoch: int) -> None:
        self._commands.append(
            EndStream(worker=worker, epoch=epoch, cause=cause, current_epoch=current_epoch)
        )

    # Time.

    def _tick(self) -> None:
        settings = self._state.settings
        gathers_until_s = self._state.gathers_until_s
        if gathers_until_s is not None and gathers_until_s <= self._now_s:
            self._state.gathers_until_s = None
            self._refuse_hopeless(tuple(self._state.queues))
        for worker in list(self._state.workers.values()):
            is_silent = self._now_s - worker.heard_s >= settings.lease_s
            if is_silent and worker.state is not WorkerState.LOST:
                self._end_stream(worker.name, worker.epoch, StreamEnd.LEASE_OVER, worker.epoch)
                self._lose(worker)
        self._state.forget_lost(self._now_s - settings.lost_kept_s)
        for slot in list(self._state.unstarted.values()):
            if slot.start_by_s is None or slot.start_by_s > self._now_s:
                break
            # One that was freed before it in this loop may have had it taken back, as a spare.
            if self._state.slots.get(slot.execution_id) is slot:
                self._free(slot)
        late = [item for item in self._state.waiting.values() if item.give_up_s <= self._now_s]
        for waiter in late:
            self._state.remove_waiter(waiter)
            self._refuse(waiter, Refusal.QUEUE_TIMEOUT)


def _waiter_of(ask: SlotAsked, now_s: float, number: int) -> Waiter:
    return Waiter(
        execution_id=ask.execution_id,
        model_version=ask.model_version,
        project=ask.project,
        excluded=ask.excluded,
        places=ask.places,
        priority=ask.priority,
        number=number,
        asked_s=now_s,
        give_up_s=now_s + ask.max_wait_s,
    )


def _is_of_use(slot: Slot, ask: SlotAsked) -> bool:
    """Tells whether a slot is what a request under its id wants.

    Not where it has failed, nor with too few places, as a spare may have; what runs has enough.
    """
    is_enough = slot.start_by_s is None or slot.places >= ask.places
    return is_enough and slot.worker.name not in ask.excluded


def _state_of(registration: Registration, *, is_draining: bool) -> WorkerState:
    if is_draining:
        return WorkerState.DRAINING
    return WorkerState.READY if registration.loading is None else WorkerState.LOADING


def _must_wait_for(older: Worker, event: WorkerRegistered) -> bool:
    """Tells whether a process that is loading finds another one at work under its name.

    In a rolling restart the older one serves until the newer one can: that comes again until the
    older one is gone, or replaces it once it is loaded.
    """
    is_at_work = older.state in (WorkerState.READY, WorkerState.DRAINING)
    is_loading = event.registration.loading is not None
    return is_loading and is_at_work and not _is_same_process(older, event)


def _is_same_process(older: Worker, event: WorkerRegistered) -> bool:
    return older.registration.incarnation == event.registration.incarnation
