"""All that the scheduler knows, and the few ways to change it.

Pure, and mutable on purpose: `step` changes it in place, so that a step costs what it changes. A
slot is one execution's place on one worker, from its grant to its end:

    granted ──started──> running ──ended, released, worker lost──> gone
       └──────released, worker lost, start_by passed──────────────> gone

A spare is a granted slot that no request stands behind yet. It is one until it starts, or until
somebody asks for it by its execution id; as long as it is, a request that finds no free slot takes
its place.

Every index here can be recounted from another one; `check_integrity` does so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.scheduler.core.messages import Load, Registration, WorkerState
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
        queue_length_max: waiters for one model version.
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
        registration: what it said.
        epoch: of this registration.
        state: whether it takes work.
        is_draining: it has said that it drains; outlives its being lost.
        registered_s: when it came.
        heard_s: when it last said anything.
        lost_s: when it was lost.
        load: as last reported.
        slots: by execution id.
        spares: those of `slots` that are spares, by execution id, the latest last.
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
    slots: dict[str, Slot] = field(default_factory=dict)
    spares: dict[str, Slot] = field(default_factory=dict)
    ended: dict[str, None] = field(default_factory=dict)
    granted_turn: int = 0
    revision: int = 0

    @property
    def name(self) -> str:
        """Resource name."""
        return self.registration.worker

    @property
    def free(self) -> int:
        """Slots that may still be granted; reports of its own can take a worker below zero."""
        return self.registration.info.max_running - len(self.slots)

    @property
    def room(self) -> int:
        """Slots that a request may have: the free ones and the spares."""
        return self.free + len(self.spares)


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
    """A place on a worker.

    Attributes:
        slot_id: made here; stays when the slot moves.
        execution_id: whose it is.
        worker: where.
        start_by_s: when it is lost unless it has started; None once it has.
        is_spare: no request stands behind it yet.
    """

    slot_id: str
    execution_id: str
    worker: Worker
    start_by_s: float | None
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
        self.revision = 0
        self._instance = instance
        self._slots_made = 0
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
        if worker.state is WorkerState.READY:
            for version in worker.registration.info.model_versions:
                self.ready.setdefault(version, {})[worker.name] = worker
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

    def _touch(self, worker: Worker) -> None:
        self.revision += 1
        worker.revision = self.revision

    # Slots.

    def add_slot(self, worker: Worker, execution_id: str, start_by_s: float | None) -> Slot:
        """Makes a slot for an execution that has none."""
        self._slots_made += 1
        slot = Slot(
            slot_id=f"{self._instance}-{self._slots_made}",
            execution_id=execution_id,
            worker=worker,
            start_by_s=start_by_s,
        )
        self.slots[execution_id] = slot
        self.slots_by_id[slot.slot_id] = slot
        worker.slots[execution_id] = slot
        if start_by_s is not None:
            self.unstarted[execution_id] = slot
        return slot

    def mark_spare(self, slot: Slot) -> None:
        """Notes that no request stands behind a slot that has not started."""
        slot.is_spare = True
        slot.worker.spares[slot.execution_id] = slot

    def unmark_spare(self, slot: Slot) -> None:
        """Notes that somebody stands behind a slot, whether or not it was a spare."""
        slot.is_spare = False
        slot.worker.spares.pop(slot.execution_id, None)

    def start_slot(self, slot: Slot, worker: Worker) -> None:
        """Notes that the execution runs, and where: the slot moves there."""
        self.unmark_spare(slot)
        slot.start_by_s = None
        self.unstarted.pop(slot.execution_id, None)
        if slot.worker is not worker:
            del slot.worker.slots[slot.execution_id]
            worker.slots[slot.execution_id] = slot
            slot.worker = worker

    def remove_slot(self, slot: Slot) -> None:
        """Frees a slot."""
        del self.slots[slot.execution_id]
        del self.slots_by_id[slot.slot_id]
        del slot.worker.slots[slot.execution_id]
        slot.worker.spares.pop(slot.execution_id, None)
        self.unstarted.pop(slot.execution_id, None)

    # Queues.

    def put_waiter(self, waiter: Waiter) -> bool:
        """Adds a waiter; False when the queue is full."""
        queue = self.queues.setdefault(waiter.model_version, FairQueue())
        if len(queue) >= self.settings.queue_length_max:
            return False
        queue.put(waiter)
        self.waiting[waiter.execution_id] = waiter
        return True

    def remove_waiter(self, waiter: Waiter) -> None:
        """Takes a waiter out."""
        self.queues[waiter.model_version].remove(waiter)
        self._left(waiter)

    def take_waiter(self, worker: Worker) -> Waiter | None:
        """Takes out whoever is next on a worker; the versions that it serves take turns."""
        versions = worker.registration.info.model_versions
        queues = [self.queues[version] for version in versions if version in self.queues]
        for queue in sorted(queues, key=lambda item: item.served_turn):
            waiter = queue.take(worker.name)
            if waiter is not None:
                queue.served_turn = self.next_turn()
                self._left(waiter)
                return waiter
        return None

    def _left(self, waiter: Waiter) -> None:
        del self.waiting[waiter.execution_id]
        if not self.queues[waiter.model_version]:
            del self.queues[waiter.model_version]

    # Recount.

    def check_integrity(self) -> list[str]:
        """Recounts everything; returns what does not agree, which is always a defect. O(all)."""
        return [
            *self._check_slots(),
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
        for version, queue in self.queues.items():
            if not 0 < len(queue) <= self.settings.queue_length_max:
                yield f"the queue of {version} has {len(queue)} waiters"
            if len(queue) != sum(1 for _ in queue):
                yield f"the queue of {version} is miscounted"
            ready = self.ready.get(version, {}).values()
            for waiter in queue:
                able = [item for item in ready if item.name not in waiter.excluded]
                if not able and self.gathers_until_s is None:
                    yield f"{waiter.execution_id} waits for nobody"
                if any(item.room > 0 for item in able):
                    yield f"{waiter.execution_id} waits beside a worker with room"
