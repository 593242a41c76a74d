"""A small world around the scheduler's core, driven by one seed.

Gateways ask, cancel, repeat, start executions where they were told or on a fallback, or forget;
they take spares with their slots or ask for them ahead, and use, keep, return or forget them.
Workers run them and report over streams that delay, double and lose messages; what else goes wrong
is in scheduler_faults.py. Streams are as gRPC's: in order, and a loss ends the stream, though
neither side may notice for a while. No clock, no I/O, no asyncio.

After each step the state is recounted and what the step said is held against what was asked.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from functools import partial

from services.scheduler.core.messages import (
    CallerGone,
    Command,
    DrainAsked,
    EndStream,
    ExecutionsReported,
    Grant,
    Input,
    Load,
    Loaded,
    LoadReported,
    Priority,
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
from services.scheduler.core.state import State
from services.scheduler.core.step import step
from tests.sim.scheduler_orders import Orders
from tests.sim.scheduler_parts import (
    FAULTS_S,
    HEARTBEAT_S,
    LOAD_MAX_S,
    RUN_MAX_S,
    SETTINGS,
    SETTLE_S,
    TICK_S,
    VERSIONS,
    WAIT_MAX_S,
    WAITING_MAX,
    Request,
    SimWorker,
    Stream,
    info_of,
)
from tests.sim.scheduler_spares import SpareGateways


class World:
    """Everything, and the time."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)  # noqa: S311 - no secret
        self.now_s = 0.0
        self.steps = 0
        self.counts: dict[str, int] = {}
        self.requests: dict[str, Request] = {}
        self.executions_started = 0
        self.reported_refused: set[str] = set()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._instances = itertools.count(1)
        self._epochs: dict[str, int] = {}
        self.state = self.new_state()
        self.spares = SpareGateways(self)
        self.orders = Orders(self)
        self.workers = [
            SimWorker("workers/a", 2, VERSIONS[:1]),
            SimWorker("workers/b", 1, VERSIONS[:1]),
            SimWorker("workers/c", 3, VERSIONS[1:]),
            SimWorker("workers/d", 2, VERSIONS),
            # Only these two have room for spares.
            SimWorker("workers/e", 8, VERSIONS[:1]),
            SimWorker("workers/f", 16, VERSIONS),
        ]

    # The course of the world.

    def run(self) -> None:
        """Lets faults happen, then none, and checks that everything has drained."""
        for worker in self.workers:
            self.after(self.rng.uniform(0.0, 2.0), partial(self.start_process, worker))
        self.after(0.0, self.tick)
        self.after(0.0, self.arrive)
        self._run_until(FAULTS_S + SETTLE_S)
        self._check_drained()

    @property
    def has_faults(self) -> bool:
        return self.now_s < FAULTS_S

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Does something later."""
        heapq.heappush(self._agenda, (self.now_s + delay_s, next(self._order), action))

    def _run_until(self, end_s: float) -> None:
        while self._agenda and self._agenda[0][0] <= end_s:
            self.now_s, _, action = heapq.heappop(self._agenda)
            action()
        self.now_s = end_s

    def feed(self, event: Input) -> list[Command]:
        """Takes one step of the core, checks it, and does what it says."""
        self.steps += 1
        commands = step(self.state, self.now_s, event)
        problems = self.state.check_integrity()
        self.claim(not problems, f"after {event}: {problems}")
        self.spares.check()
        for command in commands:
            self.count(type(command).__name__)
            if isinstance(command, Grant):
                self._granted(command)
            elif isinstance(command, Refuse):
                self.count(command.refusal.value)
                self._answer(command.execution_id, "refused")
            elif isinstance(command, TakeBack):
                self.spares.taken_back(command)
            else:
                self._ended_by_core(command)
        return commands

    def claim(self, holds: bool, text: str) -> None:  # noqa: FBT001 - reads as an assertion
        """Fails with what is needed to see it again."""
        assert holds, f"seed={self.seed} at {self.now_s:.3f}s step {self.steps}: {text}"

    def count(self, what: str) -> None:
        """Notes that something has happened, to see that the world is no idle one."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def chance(self, share: float) -> bool:
        """Throws a coin."""
        return self.rng.random() < share

    def new_state(self) -> State:
        return State(SETTINGS, f"s{next(self._instances)}", self.now_s)

    def tick(self) -> None:
        self.feed(Tick())
        self.after(TICK_S, self.tick)

    # Gateways.

    def arrive(self) -> None:
        if not self.has_faults:
            return
        rng = self.rng
        names = [worker.name for worker in self.workers]
        ask = SlotAsked(
            execution_id=f"e{len(self.requests)}",
            model_version=rng.choice(VERSIONS),
            project=rng.choice(("projects/p", "projects/q", "projects/r")),
            excluded=frozenset(rng.sample(names, rng.choice((0, 0, 0, 1, 2)))),
            max_wait_s=rng.choice((0.0, rng.uniform(0.0, WAIT_MAX_S), WAIT_MAX_S)),
            places=rng.choice((1, 1, 1, 1, 2, 3, 8)),
            affinity=rng.choice((b"", b"", b"left", b"right")),
            priority=rng.choice((Priority.STANDARD, Priority.STANDARD, Priority.BACKGROUND)),
            spare_execution_ids=tuple(
                f"e{len(self.requests)}s{number}" for number in range(rng.choice((0, 0, 1, 2, 5)))
            ),
        )
        self.requests[ask.execution_id] = Request(ask)
        self.ask(ask)
        if self.chance(0.15):
            self.after(rng.uniform(0.0, 2.0), lambda: self.cancel(ask.execution_id))
        if self.chance(0.15):
            # Soon or late: the spares that came with the slot may still be there or not.
            delay_s = rng.uniform(0.0, rng.choice((0.1, 2.0)))
            self.after(delay_s, lambda: self.repeat(ask))
        if self.chance(0.05):
            self.after(self.rng.uniform(0.0, 1.0), self.place_alone)
        # Waves: sometimes more than there is room for, sometimes less.
        rate = 30.0 if int(self.now_s) % 5 < 3 else 2.0
        self.after(rng.expovariate(rate), self.arrive)

    def ask(self, ask: SlotAsked) -> None:
        self.requests[ask.execution_id].answers_due += 1
        self.feed(ask)
        request = self.requests[ask.execution_id]
        is_waiting = ask.execution_id in self.state.waiting
        self.claim(
            is_waiting == (request.answers_due > 0), f"{ask} is neither answered nor waiting"
        )

    def repeat(self, ask: SlotAsked) -> None:
        """Asks again under the same id, as a library that has lost the connection does."""
        request = self.requests[ask.execution_id]
        if request.outcome in {"", "granted"} and ask.execution_id in {
            *self.state.slots,
            *self.state.waiting,
        }:
            self.count("repeated")
            self.ask(ask)

    def cancel(self, execution_id: str) -> None:
        request = self.requests[execution_id]
        if request.outcome in {"", "granted"}:
            self.count("cancelled")
            is_waiting = execution_id in self.state.waiting
            self.feed(CallerGone(execution_id=execution_id))
            if is_waiting:
                request.answers_due = 0
                request.outcome = "gone"

    def _answer(self, execution_id: str, outcome: str) -> Request:
        request = self.requests[execution_id]
        self.claim(request.answers_due > 0, f"{execution_id} is answered but did not ask")
        self.claim(
            request.outcome in {"", outcome}, f"{execution_id} was {request.outcome}, is {outcome}"
        )
        request.answers_due = 0
        request.outcome = outcome
        return request

    def _granted(self, grant: Grant) -> None:
        is_first = not self.requests[grant.execution_id].outcome
        request = self._answer(grant.execution_id, "granted")
        self.spares.granted(grant, request)
        slot = self.state.slots[grant.execution_id]
        worker = slot.worker
        self.claim(slot.slot_id == grant.slot_id, f"{grant} names another slot")
        self.claim(worker.state is not WorkerState.LOST, f"{grant} is on a lost worker")
        if not is_first:
            return
        request.slot_id = grant.slot_id
        self.orders.granted(grant, request, worker)
        if slot.start_by_s is not None:
            self.claim(worker.free >= 0, f"{grant} is beyond the capacity of {worker.name}")
            self.claim(worker.state is WorkerState.READY, f"{grant} is on a draining worker")
            self.claim(worker.name not in request.ask.excluded, f"{grant} is excluded")
            self.claim(slot.is_spare == request.ask.is_ahead, f"{grant} is marked wrongly")
            self.after(self.rng.expovariate(20.0), lambda: self.use(grant))

    def use(self, grant: Grant) -> None:
        """Does what gateways do with a slot."""
        if self.requests[grant.execution_id].is_placed_alone:
            return
        targets = [grant.target, *grant.fallbacks]
        if self.chance(0.1):
            self.count("never started")
            return
        if self.chance(0.1):
            # It cannot reach the first.
            targets = targets[1:]
        for target in targets:
            worker = next(item for item in self.workers if item.name == target.worker)
            if self.start_execution(worker, grant.execution_id, target.epoch):
                return
        self.feed(SlotsReleased(slot_ids=(grant.slot_id,)))
        request = self.requests[grant.execution_id]
        # From the start, under the same id: only where no worker has said that it is over.
        if self.has_faults and grant.execution_id not in {
            *self.state.slots,
            *self.reported_refused,
        }:
            self.count("asked anew")
            request.outcome = ""
            self.ask(request.ask)

    def place_alone(self) -> None:
        """A gateway that cannot reach the scheduler starts what waits there, or something new."""
        waiting = [key for key in self.state.waiting if not self.requests[key].is_placed_alone]
        execution_id = f"own{next(self._order)}"
        workers = self.workers
        if waiting and self.chance(0.5):
            execution_id = self.rng.choice(waiting)
            request = self.requests[execution_id]
            request.is_placed_alone = True
            workers = [item for item in workers if item.name not in request.ask.excluded]
        self.count("placed alone")
        self.start_execution(self.rng.choice(workers), execution_id, 2**60)

    # Workers.

    def start_process(self, worker: SimWorker) -> None:
        if worker.is_alive:
            return
        worker.is_alive = True
        worker.is_draining = False
        worker.incarnation = incarnation = f"i{next(self._order)}"
        worker.running.clear()
        worker.is_loading = self.chance(0.5)
        if worker.is_loading:
            self.count("loading")
            load_s = self.rng.uniform(0.0, LOAD_MAX_S)
            self.after(load_s, lambda: self.finish_loading(worker, incarnation))
        self.connect(worker)

    def finish_loading(self, worker: SimWorker, incarnation: str) -> None:
        """The worker has loaded its model and says so, to a scheduler that knows it as loading."""
        if not worker.is_alive or worker.incarnation != incarnation:
            return
        worker.is_loading = False
        stream = worker.stream
        if stream is not None and stream.is_open:
            self.count("loaded")
            info = info_of(worker)
            self.send(stream, Loaded(worker=worker.name, epoch=stream.epoch, info=info))

    def connect(self, worker: SimWorker) -> None:
        """Registers: the epoch comes from the database, the registration a little later."""
        if not worker.is_alive or (worker.stream is not None and worker.stream.is_open):
            return
        epoch = self._epochs.get(worker.name, 0) + 1
        self._epochs[worker.name] = epoch
        stream = Stream(worker, worker.incarnation, epoch)
        worker.stream = stream
        delay_s = self.rng.expovariate(1.0 if self.chance(0.1) else 10.0)
        stream.delivered_s = self.now_s + delay_s
        running = tuple(worker.running)
        registration = Registration(
            worker=worker.name,
            incarnation=worker.incarnation,
            endpoint="host:1",
            info=info_of(worker),
            running=running,
            loading=b"" if worker.is_loading else None,
        )
        self.after(delay_s, lambda: self.registered(stream, registration))
        if self.has_faults and self.chance(0.1):
            # The worker loses patience: its next registration may arrive before this one.
            self.after(self.rng.uniform(0.0, delay_s), lambda: self.reconnect(worker))
        self.after(HEARTBEAT_S, lambda: self.heartbeat(stream))
        if worker.is_draining:
            self.send(stream, DrainAsked(worker=worker.name, epoch=epoch))

    def registered(self, stream: Stream, registration: Registration) -> None:
        if not stream.is_open or stream.is_deaf:
            return
        before = self.state.workers.get(registration.worker)
        commands = self.feed(WorkerRegistered(registration=registration, epoch=stream.epoch))
        known = self.state.workers[registration.worker]
        ends = [item for item in commands if isinstance(item, EndStream)]
        if any(item.cause is StreamEnd.OLDER_SERVES for item in ends):
            self.claim(known is before, f"{known.name} was replaced while it serves")
            return
        epochs = [stream.epoch, *([before.epoch] if before is not None else [])]
        self.claim(known.epoch == max(epochs), f"{known.name} has not its highest epoch")
        # Welcome: the worker refuses older epochs from now on.
        if stream.is_open:
            stream.worker.epoch = stream.epoch
            stream.is_registered = True

    def send(self, stream: Stream, event: WorkerHeard) -> None:
        """Delivers in order, late, perhaps twice, or not at all once the stream is deaf."""
        delay_s = self.rng.expovariate(20.0)
        stream.delivered_s = max(stream.delivered_s, self.now_s + delay_s)
        wait_s = stream.delivered_s - self.now_s
        for _ in range(2 if self.has_faults and self.chance(0.05) else 1):
            stream.in_flight += 1
            self.after(wait_s, lambda: self.deliver(stream, event))

    def deliver(self, stream: Stream, event: WorkerHeard) -> None:
        stream.in_flight -= 1
        if stream.is_open and not stream.is_deaf:
            self.feed(event)
            self._check_agreement(stream)

    def _check_agreement(self, stream: Stream) -> None:
        """Once all is said, the core knows exactly what runs on the worker."""
        worker = stream.worker
        if (
            stream.in_flight
            or not (stream.is_open and stream.is_registered and worker.is_alive)
            or worker.stream is not stream
        ):
            return
        slots = self.state.workers[worker.name].slots
        known = {key for key, slot in slots.items() if slot.start_by_s is None}
        self.count("agreed")
        self.claim(
            known == worker.running, f"{worker.name} runs {worker.running}, the core says {known}"
        )

    def heartbeat(self, stream: Stream) -> None:
        worker = stream.worker
        if not stream.is_open or not worker.is_alive or worker.stream is not stream:
            return
        used = self.rng.randrange(100)
        load = Load(running=len(worker.running), kv_used_tokens=used, kv_total_tokens=100)
        self.send(stream, LoadReported(worker=worker.name, epoch=stream.epoch, load=load))
        self.after(HEARTBEAT_S, lambda: self.heartbeat(stream))

    def start_execution(self, worker: SimWorker, execution_id: str, epoch: int) -> bool:
        """A gateway starts an execution; False when the worker refuses or cannot be reached."""
        is_full = len(worker.running) >= worker.capacity + WAITING_MAX
        refuses = worker.is_draining or worker.is_loading or is_full or epoch < worker.epoch
        if not worker.is_alive or refuses:
            if worker.is_alive and self.chance(0.5):
                self.reported_refused.add(execution_id)
                self.report(worker, ended=execution_id)
            return False
        self.executions_started += 1
        if self.chance(0.1):
            # So short that a worker without care reports it the wrong way round.
            self.count("end before start")
            self.report(worker, ended=execution_id)
            self.report(worker, started=execution_id)
            return True
        worker.running.add(execution_id)
        incarnation = worker.incarnation
        self.report(worker, started=execution_id)
        run_s = 0.0 if self.chance(0.2) else self.rng.uniform(0.0, RUN_MAX_S)
        self.after(run_s, lambda: self.end_execution(worker, incarnation, execution_id))
        return True

    def end_execution(self, worker: SimWorker, incarnation: str, execution_id: str) -> None:
        if worker.is_alive and worker.incarnation == incarnation:
            worker.running.discard(execution_id)
            self.report(worker, ended=execution_id)

    def report(self, worker: SimWorker, *, started: str = "", ended: str = "") -> None:
        stream = worker.stream
        if stream is None or not stream.is_open:
            return
        event = ExecutionsReported(
            worker=worker.name,
            epoch=stream.epoch,
            started=(started,) if started else (),
            ended=(ended,) if ended else (),
        )
        self.send(stream, event)

    def break_stream(self, stream: Stream) -> None:
        """Both sides notice that a stream is over; the worker comes again if it lives."""
        if not stream.is_open:
            return
        stream.is_open = False
        self.feed(StreamBroken(worker=stream.worker.name, epoch=stream.epoch))
        self.after(self.rng.uniform(0.05, 1.0), lambda: self.connect(stream.worker))

    def reconnect(self, worker: SimWorker) -> None:
        """The worker gives the stream up and comes again before the scheduler has noticed."""
        stream = worker.stream
        if worker.is_alive and stream is not None:
            worker.stream = None
            self.after(self.rng.uniform(0.0, 1.0), lambda: self.break_stream(stream))
            self.connect(worker)

    def _ended_by_core(self, command: EndStream) -> None:
        self.count(command.cause.value)
        for worker in self.workers:
            stream = worker.stream
            if stream is not None and (worker.name, stream.epoch) == (
                command.worker,
                command.epoch,
            ):
                stream.is_open = False
                self.after(self.rng.uniform(0.05, 1.0), partial(self.connect, worker))

    # The end.

    def _check_drained(self) -> None:
        self.claim(not self.state.waiting, f"still waiting: {list(self.state.waiting)}")
        self.claim(not self.state.slots, f"still in use: {list(self.state.slots)}")
        self.claim(not self.state.unstarted, "still to start")
        for request in self.requests.values():
            self.claim(bool(request.outcome), f"{request.ask} has not ended")
            self.claim(request.answers_due == 0, f"{request.ask} was not answered")
        for worker in self.workers:
            known = self.state.workers.get(worker.name)
            self.claim(
                known is not None and known.state is WorkerState.READY,
                f"{worker.name} is not ready again",
            )
