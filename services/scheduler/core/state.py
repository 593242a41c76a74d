"""All that the scheduler knows, and the few ways to change it.

Pure, and mutable on purpose: `step` changes it in place, so that a step costs what it changes. A
slot is one execution's place on one worker, from its grant to its end:

    granted ──started──> running ──ended, released, worker lost──> gone
       └──────released, worker lost, start_by passed──────────────> gone

A slot takes one place of its worker or several, all at once. What a worker reports and nobody has
asked for, after a restart of the scheduler above all, counts as one place.

A spare is a granted slot of one place that no request stands behind yet. It is one until it starts,
or until somebody asks for it by its execution id; as long as it is, a request that finds no free
slot takes its place.

Every index here can be recounted from another one; `check_integrity` does so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from services.scheduler.core import messages
from services.scheduler.core.messages import PRIORITIES, Load, Priority, Registration, WorkerState
from services.scheduler.core.queue import FairQueue, Waiter

# How many ended executions are remembered for each worker, so that a "started" that comes behind
# its "ended" counts nothing. Both travel on one ordered stream: a few would do.
ENDED_REMEMBERED_MAX = 1024
# No engine runs so many; a worker that claims to does not fill our memory.
SLOTS_PER_WORKER_MAX = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the core has to know of the configuration.

    Attributes:
        lease_s: without a message for this long a worker is lost.
        start_within_s: an execution that was not reported started by then loses its slot.
        queue_length_max: waiters of one class for one model version.
        gather_s: so long after the start requests wait for workers that are not here yet.
        fallbacks_max: targets that come with a slot beyond the first.
        lost_kept_s: how long a lost worker stays in the listing.
        lost_kept_max: how many lost workers stay in the listing.
    """

    lease_s: float
    start_within_s: float
    queue_length_max: int
    gather_s: float = 0.0
    fallbacks_max: int = 3
    lost_kept_s: float = 600.0
    lost_kept_max: int = 100


@dataclass(slots=True, kw_only=True, eq=False)
class Worker:
    """A registration of a worker, from its Register to its end.

    Attributes:
        registration: what it said; with `info` of the loaded model once there is one.
        epoch: of this registration.
        state: whether it takes work.
        is_draining: it has said that it drains; outlives its being lost.
        registered_s: when it came.
        heard_s: when it last said anything.
        lost_s: when it was lost.
        load: as last reported.
        loading: how far it is with loading, as last reported; None once its model is loaded.
        slots: by execution id.
        spares: those of `slots` that are spares, by execution id, the latest last.
        used: places that the slots take.
        ended: executions that have ended here, the latest last.
        granted_turn: when it last got a slot.
        revision: of the state when what it is last changed.
    """

    registration: Registration
    epoch: int
    state: WorkerState
    is_draining: bool
    registered_s: float
    heard_s: float
    lost_s: float = 0.0
    load: Load | None = None
    loading: bytes | None = None
    slots: dict[str, Slot] = field(default_factory=dict)
    spares: dict[str, Slot] = field(default_factory=dict)
    used: int = 0
    ended: dict[str, None] = field(default_factory=dict)
    granted_turn: int = 0
    revision: int = 0

    @property
    def name(self) -> str:
        """Resource name."""
        return self.registration.worker

    @property
    def free(self) -> int:
        """Places that may still be granted; reports of its own can take a worker below zero."""
        return self.registration.info.max_running - self.used

    @property
    def room(self) -> int:
        """Places that a request may have: the free ones and the spares'."""
        return self.free + len(self.spares)


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
    """A place on a worker.

    Attributes:
        slot_id: made here; stays when the slot moves.
        execution_id: whose it is.
        worker: where.
        start_by_s: when it is lost unless it has started; None once it has.
        places: places that it takes.
        is_spare: no request stands behind it yet.
    """

    slot_id: str
    execution_id: str
    worker: Worker
    start_by_s: float | None
    places: int = 1
    is_spare: bool = False


class State:
    """Workers, slots and queues.

    Attributes:
        settings: the configuration.
        workers: by name; the lost ones too, for a while.
        ready: for each model version the workers that take work for it, by name.
        slots: by execution id.
        slots_by_id: by slot id.
        unstarted: slots that have not started, in order of start_by_s, by execution id.
        queues: by model version; only while somebody waits.
        waiting: waiters of all queues, by execution id.
        wide: those of them that want more than one place, by model version and class, oldest first.
        revision: grows whenever a worker is new or what it is has changed; not with its load.
        gathers_until_s: end of the time in which workers that an earlier scheduler knew come
            back, and "no worker" is not believed yet; None when it is over.
    """

    def __init__(self, settings: Settings, instance: str, now_s: float) -> None:
        """Starts empty; `instance` sets the slot ids of this process apart from all others."""
        self.settings = settings
        self.gathers_until_s = now_s + settings.gather_s if settings.gather_s > 0 else None
        self.workers: dict[str, Worker] = {}
        self.ready: dict[str, dict[str, Worker]] = {}
        self.slots: dict[str, Slot] = {}
        self.slots_by_id: dict[str, Slot] = {}
        self.unstarted: dict[str, Slot] = {}
        self.queues: dict[str, FairQueue] = {}
        self.waiting: dict[str, Waiter] = {}
        self.wide: dict[tuple[str, Priority], dict[str, Waiter]] = {}
        self.revision = 0
        self._instance = instance
        self._slots_made = 0
        self._room_changes = 0
        self._roomiest_known: dict[str, tuple[int, Worker | None]] = {}
        self._turn = 0

    def next_turn(self) -> int:
        """Counts grants, so that the one whose turn was longest ago can be found."""
        self._turn += 1
        return self._turn

    # Workers.

    def add_worker(self, worker: Worker) -> None:
        """Takes in a registration in place of an older one under its name, which is lost."""
        self.workers.pop(worker.name, None)
        self.workers[worker.name] = worker
        self._index_ready(worker)
        self._touch(worker)

    def finish_loading(self, worker: Worker, info: messages.EngineInfo) -> None:
        """Notes what a worker is now that its model is loaded; it takes work unless it drains."""
        worker.registration = replace(worker.registration, info=info, loading=None)
        worker.loading = None
        if worker.state is WorkerState.LOADING:
            worker.state = WorkerState.READY
        self._index_ready(worker)
        self._touch(worker)

    def withdraw(self, worker: Worker, state: WorkerState) -> None:
        """Makes a worker take no new work."""
        for version in worker.registration.info.model_versions:
            ready = self.ready.get(version, {})
            ready.pop(worker.name, None)
            if not ready:
                self.ready.pop(version, None)
        worker.state = state
        self._touch(worker)

    def forget_lost(self, before_s: float) -> None:
        """Drops workers lost up to a time, and the longest lost beyond the number kept."""
        lost = [item for item in self.workers.values() if item.state is WorkerState.LOST]
        lost.sort(key=lambda item: item.lost_s)
        excess = len(lost) - self.settings.lost_kept_max
        for index, worker in enumerate(lost):
            if index < excess or worker.lost_s <= before_s:
                del self.workers[worker.name]

    def _index_ready(self, worker: Worker) -> None:
        if worker.state is WorkerState.READY:
            for version in worker.registration.info.model_versions:
                self.ready.setdefault(version, {})[worker.name] = worker

    def _touch(self, worker: Worker) -> None:
        self._room_changes += 1
        self.revision += 1
        worker.revision = self.revision

    # Slots.

    def add_slot(
        self, worker: Worker, execution_id: str, start_by_s: float | None, *, places: int = 1
    ) -> Slot:
        """Makes a slot for an execution that has none."""
        self._slots_made += 1
        self._room_changes += 1
        slot = Slot(
            slot_id=f"{self._instance}-{self._slots_made}",
            execution_id=execution_id,
            worker=worker,
            start_by_s=start_by_s,
            places=places,
        )
        self.slots[execution_id] = slot
        self.slots_by_id[slot.slot_id] = slot
        worker.slots[execution_id] = slot
        worker.used += places
        if start_by_s is not None:
            self.unstarted[execution_id] = slot
        return slot

    def mark_spare(self, slot: Slot) -> None:
        """Notes that no request stands behind a slot that has not started."""
        self._room_changes += 1
        slot.is_spare = True
        slot.worker.spares[slot.execution_id] = slot

    def unmark_spare(self, slot: Slot) -> None:
        """Notes that somebody stands behind a slot, whether or not it was a spare."""
        self._room_changes += 1
        slot.is_spare = False
        slot.worker.spares.pop(slot.execution_id, None)

    def start_slot(self, slot: Slot, worker: Worker) -> None:
        """Notes that the execution runs, and where: the slot moves there."""
        self.unmark_spare(slot)
        slot.start_by_s = None
        self.unstarted.pop(slot.execution_id, None)
        if slot.worker is not worker:
            del slot.worker.slots[slot.execution_id]
            slot.worker.used -= slot.places
            worker.slots[slot.execution_id] = slot
            worker.used += slot.places
            slot.worker = worker

    def remove_slot(self, slot: Slot) -> None:
        """Frees a slot."""
        self._room_changes += 1
        del self.slots[slot.execution_id]
        del self.slots_by_id[slot.slot_id]
        del slot.worker.slots[slot.execution_id]
        slot.worker.used -= slot.places
        slot.worker.spares.pop(slot.execution_id, None)
        self.unstarted.pop(slot.execution_id, None)

    # Queues.

    def put_waiter(self, waiter: Waiter) -> bool:
        """Adds a waiter; False when the queue has no more room for its class."""
        queue = self.queues.get(waiter.model_version)
        if queue is None:
            queue = self.queues[waiter.model_version] = FairQueue(self._turn)
        if queue.length_of(waiter.priority) >= self.settings.queue_length_max:
            return False
        queue.put(waiter)
        self.waiting[waiter.execution_id] = waiter
        if waiter.places > 1:
            key = (waiter.model_version, waiter.priority)
            self.wide.setdefault(key, {})[waiter.execution_id] = waiter
        return True

    def remove_waiter(self, waiter: Waiter) -> None:
        """Takes a waiter out."""
        self.queues[waiter.model_version].remove(waiter)
        self._left(waiter)

    def next_waiter(self, worker: Worker, lowest: Priority = Priority.BACKGROUND) -> Waiter | None:
        """Names whoever is next on a worker; one that does not fit there now has to wait for it.

        A higher class goes first; within a class the versions that the worker serves take turns.
        Who wants more places than are free is passed over, but not where it saves up: there only
        older ones of its class go before it.

        Args:
            worker: that they wait for.
            lowest: classes below it are not asked.
        """
        versions = worker.registration.info.model_versions
        queues = [self.queues[item] for item in versions if item in self.queues]
        if len(queues) > 1:
            queues.sort(key=lambda item: item.served_turn)
        fits = partial(_fits, worker)
        most_places = max(worker.room, 1)
        for priority in PRIORITIES:
            saver = self.saver_at(worker, priority) if self.wide else None
            number_max = math.inf if saver is None else saver.number
            for queue in queues:
                # Nearly always, where all who wait want several places: nobody has to be looked at.
                if queue.least_places(priority) > most_places:
                    continue
                waiter = queue.first(priority, fits, number_max=number_max)
                if waiter is not None:
                    return waiter
            if saver is not None or priority is lowest:
                return saver
        return None

    def saver_at(self, worker: Worker, priority: Priority) -> Waiter | None:
        """Names the request of a class that a worker saves up for: its places go to no younger one.

        For each version the oldest that wants several places has one worker save up, the one with
        the most room. So it does not starve behind small ones, and they go on elsewhere: where the
        most room is it only grows until it is enough, for others cannot have it.
        """
        savers = [
            next(iter(self.wide[version, priority].values()))
            for version in worker.registration.info.model_versions
            if (version, priority) in self.wide
        ]
        found = [item for item in savers if self._roomiest(item) is worker]
        return min(found, key=lambda item: item.number, default=None)

    def _roomiest(self, waiter: Waiter) -> Worker | None:
        """Returns the ready worker with the most room of those that would do for a waiter.

        O(workers) after a change of anybody's room, else O(1).
        """
        known = self._roomiest_known.get(waiter.execution_id)
        if known is not None and known[0] == self._room_changes:
            return known[1]
        able = [
            worker
            for name, worker in self.ready.get(waiter.model_version, {}).items()
            if waiter.may_run_on(name, worker.registration.info.max_running)
        ]
        found = max(able, key=lambda item: (item.room, item.name), default=None)
        self._roomiest_known[waiter.execution_id] = self._room_changes, found
        return found

    def take_waiter(self, worker: Worker) -> Waiter | None:
        """Takes out whoever is next on a worker, if it fits.

        If it does not, nobody gets the places before it.
        """
        waiter = self.next_waiter(worker)
        if waiter is None or waiter.places > worker.room:
            return None
        queue = self.queues[waiter.model_version]
        queue.take(waiter)
        queue.served_turn = self.next_turn()
        self._left(waiter)
        return waiter

    def is_hopeless(self, waiter: Waiter) -> bool:
        """Tells whether no ready worker would do for a waiter, however long it waits."""
        ready = self.ready.get(waiter.model_version, {})
        return not any(
            waiter.may_run_on(name, worker.registration.info.max_running)
            for name, worker in ready.items()
        )

    def _left(self, waiter: Waiter) -> None:
        del self.waiting[waiter.execution_id]
        if waiter.places > 1:
            key = (waiter.model_version, waiter.priority)
            del self.wide[key][waiter.execution_id]
            self._roomiest_known.pop(waiter.execution_id, None)
            if not self.wide[key]:
                del self.wide[key]
        if not self.queues[waiter.model_version]:
            del self.queues[waiter.model_version]

    # Recount.

    def check_integrity(self) -> list[str]:
        """Recounts everything; returns what does not agree, which is always a defect. O(all)."""
        return [
            *self._check_slots(),
            *self._check_places(),
            *self._check_spares(),
            *self._check_ready(),
            *self._check_queues(),
        ]

    def _check_slots(self) -> Iterable[str]:
        on_workers = {
            key: slot for worker in self.workers.values() for key, slot in worker.slots.items()
        }
        by_id = {slot.execution_id: slot for slot in self.slots_by_id.values()}
        unstarted = {key for key, slot in self.slots.items() if slot.start_by_s is not None}
        if on_workers != self.slots or by_id != self.slots:
            yield "slots differ between their indexes"
        if unstarted != self.unstarted.keys():
            yield "unstarted slots are miscounted"
        for slot in self.slots.values():
            if self.workers.get(slot.worker.name) is not slot.worker:
                yield f"slot {slot.slot_id} is on a replaced worker"
            if slot.worker.state is WorkerState.LOST:
                yield f"slot {slot.slot_id} is on a lost worker"
            if slot.execution_id in self.waiting:
                yield f"slot {slot.slot_id} is given and waited for"

    def _check_places(self) -> Iterable[str]:
        for worker in self.workers.values():
            if worker.used != sum(slot.places for slot in worker.slots.values()):
                yield f"the places of {worker.name} are miscounted"
            if any(slot.places != 1 for slot in worker.spares.values()):
                yield f"a spare of {worker.name} has several places"

    def _check_spares(self) -> Iterable[str]:
        for worker in self.workers.values():
            if worker.spares != {key: slot for key, slot in worker.slots.items() if slot.is_spare}:
                yield f"the spares of {worker.name} are miscounted"
            if any(slot.start_by_s is None for slot in worker.spares.values()):
                yield f"a spare of {worker.name} has started"

    def _check_ready(self) -> Iterable[str]:
        want = {
            (version, worker.name, worker.epoch)
            for worker in self.workers.values()
            if worker.state is WorkerState.READY
            for version in worker.registration.info.model_versions
        }
        got = {
            (version, worker.name, worker.epoch)
            for version, workers in self.ready.items()
            for worker in workers.values()
        }
        if got != want:
            yield "the index of ready workers is wrong"

    def _check_queues(self) -> Iterable[str]:
        queued = {item.execution_id: item for queue in self.queues.values() for item in queue}
        if queued != self.waiting:
            yield "waiters differ between their indexes"
        wide = {
            item.execution_id: (item.model_version, item.priority)
            for item in self.waiting.values()
            if item.places > 1
        }
        if wide != {key: row for row, waiters in self.wide.items() for key in waiters}:
            yield "waiters for several places are miscounted"
        for version, queue in self.queues.items():
            if not queue:
                yield f"the queue of {version} is empty"
            yield from self._check_queue(version, queue)
        for worker in self.workers.values():
            waiter = self.next_waiter(worker)
            is_ready = worker.state is WorkerState.READY
            if is_ready and waiter is not None and waiter.places <= worker.room:
                yield f"{waiter.execution_id} waits beside a worker with room"

    def _check_queue(self, version: str, queue: FairQueue) -> Iterable[str]:
        for priority in PRIORITIES:
            length = queue.length_of(priority)
            if length > self.settings.queue_length_max:
                yield f"the queue of {version} has {length} waiters of one class"
            if length != sum(1 for _ in queue.of(priority)):
                yield f"the queue of {version} is miscounted"
            least = min((waiter.places for waiter in queue.of(priority)), default=0)
            if queue.least_places(priority) != least:
                yield f"the places that the queue of {version} waits for are miscounted"
        for waiter in queue:
            if self.gathers_until_s is None and self.is_hopeless(waiter):
                yield f"{waiter.execution_id} waits for nobody"


def _fits(worker: Worker, waiter: Waiter) -> bool:
    """Tells whether a waiter may run on a worker, now or as soon as one place is free."""
    is_small = waiter.places == 1 or waiter.places <= worker.room
    return is_small and waiter.may_run_on(worker.name, worker.registration.info.max_running)
