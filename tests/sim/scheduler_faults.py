"""What goes wrong in the simulated world."""

from __future__ import annotations

from functools import partial

from services.scheduler.core.messages import DrainAsked
from tests.sim.scheduler_parts import RUN_MAX_S, SETTINGS, SimWorker
from tests.sim.scheduler_world import World


class Faults:
    """Does harm to a world, at random, until its faults are over."""

    def __init__(self, world: World) -> None:
        self._world = world
        world.after(0.5, self.happen)

    def happen(self) -> None:
        if not self._world.has_faults:
            return
        worker = self._world.rng.choice(self._world.workers)
        kind = self._world.rng.choice(
            (
                self.kill,
                self.kill,
                self.lose,
                self.lose,
                self.hang,
                self._world.reconnect,
                self.drain,
            )
        )
        if self._world.chance(0.1):
            self.restart_scheduler()
        else:
            self._world.count(kind.__name__)
            kind(worker)
        self._world.after(self._world.rng.expovariate(2.0), self.happen)

    def kill(self, worker: SimWorker) -> None:
        """The process is gone; the scheduler notices at once, or only by the lease."""
        stream = worker.stream
        worker.is_alive = False
        worker.running.clear()
        if stream is not None and stream.is_open:
            if self._world.chance(0.5):
                self._world.break_stream(stream)
            else:
                stream.is_deaf = True
        self._world.after(self._world.rng.uniform(0.1, 4.0), lambda: self.replace(worker))

    def replace(self, worker: SimWorker) -> None:
        """A new process starts, whether or not the old stream was noticed to be over."""
        if not worker.is_alive:
            worker.stream = None
            self._world.start_process(worker)

    def lose(self, worker: SimWorker) -> None:
        """Messages are lost, and a moment later the stream is found broken."""
        stream = worker.stream
        if stream is not None and stream.is_open:
            stream.is_deaf = True
            self._world.after(
                self._world.rng.uniform(0.0, 1.0), lambda: self._world.break_stream(stream)
            )

    def hang(self, worker: SimWorker) -> None:
        """Nothing arrives: the lease has to end it, or keepalive if it never registered."""
        stream = worker.stream
        if stream is not None and stream.is_open:
            stream.is_deaf = True
            self._world.after(2 * SETTINGS.lease_s, lambda: self._world.break_stream(stream))

    def drain(self, worker: SimWorker) -> None:
        """The worker finishes, exits and is replaced."""
        if not worker.is_alive or worker.is_draining:
            return
        worker.is_draining = True
        if worker.stream is not None and worker.stream.is_open:
            drain = DrainAsked(worker=worker.name, epoch=worker.stream.epoch)
            self._world.send(worker.stream, drain)
        self._world.after(self._world.rng.uniform(1.0, RUN_MAX_S + 1.0), lambda: self.kill(worker))

    def restart_scheduler(self) -> None:
        """All that the scheduler knows is gone, and so are all who wait."""
        self._world.count("scheduler restarted")
        for request in self._world.requests.values():
            if request.answers_due:
                request.answers_due = 0
                request.outcome = "gone"
        self._world.state = self._world.new_state()
        for worker in self._world.workers:
            stream = worker.stream
            if stream is not None and stream.is_open:
                stream.is_open = False
                self._world.after(
                    self._world.rng.uniform(0.05, 1.0), partial(self._world.connect, worker)
                )
