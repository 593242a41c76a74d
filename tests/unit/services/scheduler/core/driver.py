"""Drives the core in tests: short names for inputs, a recount after each step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from services.scheduler.core.messages import (
    CallerGone,
    Command,
    DrainAsked,
    EndStream,
    EngineInfo,
    ExecutionsReported,
    Grant,
    Input,
    Load,
    Loaded,
    LoadingReported,
    LoadReported,
    Priority,
    Refusal,
    Refuse,
    Registration,
    SlotAsked,
    SlotsReleased,
    StreamBroken,
    TakeBack,
    Tick,
    WorkerHeard,
    WorkerRegistered,
)
from services.scheduler.core.state import Settings, State, Worker
from services.scheduler.core.step import step

VERSION = "models/m/versions/1"
OTHER_VERSION = "models/m/versions/2"


def settings(
    *,
    lease_s: float = 5.0,
    start_within_s: float = 5.0,
    queue_length_max: int = 10,
    gather_s: float = 0.0,
    lost_kept_s: float = 600.0,
    lost_kept_max: int = 100,
) -> Settings:
    return Settings(
        lease_s=lease_s,
        start_within_s=start_within_s,
        queue_length_max=queue_length_max,
        gather_s=gather_s,
        lost_kept_s=lost_kept_s,
        lost_kept_max=lost_kept_max,
    )


def registration(
    worker: str = "a",
    *,
    capacity: int = 1,
    versions: tuple[str, ...] = (VERSION,),
    running: tuple[str, ...] = (),
    incarnation: str = "one",
    loading: bytes | None = None,
) -> Registration:
    return Registration(
        worker=f"workers/{worker}",
        incarnation=incarnation,
        endpoint=f"{worker}:1",
        running=running,
        info=info(capacity=capacity, versions=versions),
        loading=loading,
    )


def info(*, capacity: int = 1, versions: tuple[str, ...] = (VERSION,)) -> EngineInfo:
    return EngineInfo(
        engine="sim",
        engine_version="1",
        model_versions=versions,
        context_length=4096,
        max_running=capacity,
        max_waiting=0,
        vocabulary_size=100,
        digest="",
    )


class Core:
    """The core under test. Workers are named without "workers/"."""

    def __init__(self, chosen: Settings | None = None) -> None:
        self.now_s = 1000.0
        self.state = State(chosen if chosen is not None else settings(), "test", self.now_s)
        self._epochs = itertools.count(1)
        self.epochs: dict[str, int] = {}

    def send(self, event: Input) -> list[Command]:
        commands = step(self.state, self.now_s, event)
        assert self.state.check_integrity() == []
        return commands

    def worker(self, name: str) -> Worker:
        return self.state.workers[f"workers/{name}"]

    def used(self, name: str) -> int:
        """Places in use."""
        return self.worker(name).used

    # Requests.

    def ask(
        self,
        execution_id: str,
        *,
        project: str = "",
        version: str = VERSION,
        excluded: Iterable[str] = (),
        max_wait_s: float = 30.0,
        spares: Iterable[str] = (),
        places: int = 1,
        affinity: bytes = b"",
        priority: Priority = Priority.STANDARD,
    ) -> list[Command]:
        return self.send(
            SlotAsked(
                execution_id=execution_id,
                model_version=version,
                project=project,
                excluded=frozenset(f"workers/{name}" for name in excluded),
                max_wait_s=max_wait_s,
                spare_execution_ids=tuple(spares),
                places=places,
                affinity=affinity,
                priority=priority,
            )
        )

    def gone(self, execution_id: str) -> list[Command]:
        return self.send(CallerGone(execution_id=execution_id))

    def release(self, *slot_ids: str) -> list[Command]:
        return self.send(SlotsReleased(slot_ids=slot_ids))

    # Workers.

    def register(
        self,
        worker: str = "a",
        *,
        capacity: int = 1,
        versions: tuple[str, ...] = (VERSION,),
        running: tuple[str, ...] = (),
        incarnation: str = "one",
        loading: bytes | None = None,
    ) -> list[Command]:
        self.epochs[worker] = next(self._epochs)
        registered = registration(
            worker,
            capacity=capacity,
            versions=versions,
            running=running,
            incarnation=incarnation,
            loading=loading,
        )
        return self.send(WorkerRegistered(registration=registered, epoch=self.epochs[worker]))

    def report(
        self, worker: str, *, started: tuple[str, ...] = (), ended: tuple[str, ...] = ()
    ) -> list[Command]:
        return self.send(
            ExecutionsReported(
                worker=f"workers/{worker}",
                epoch=self.epochs[worker],
                started=started,
                ended=ended,
            )
        )

    def heard(self, worker: str) -> list[Command]:
        return self.send(WorkerHeard(worker=f"workers/{worker}", epoch=self.epochs[worker]))

    def load(self, worker: str, load: Load) -> list[Command]:
        return self.send(
            LoadReported(worker=f"workers/{worker}", epoch=self.epochs[worker], load=load)
        )

    def loading(self, worker: str, loading: bytes) -> list[Command]:
        return self.send(
            LoadingReported(worker=f"workers/{worker}", epoch=self.epochs[worker], loading=loading)
        )

    def loaded(
        self, worker: str, *, capacity: int = 1, versions: tuple[str, ...] = (VERSION,)
    ) -> list[Command]:
        return self.send(
            Loaded(
                worker=f"workers/{worker}",
                epoch=self.epochs[worker],
                info=info(capacity=capacity, versions=versions),
            )
        )

    def drain(self, worker: str) -> list[Command]:
        return self.send(DrainAsked(worker=f"workers/{worker}", epoch=self.epochs[worker]))

    def lose(self, worker: str) -> list[Command]:
        return self.send(StreamBroken(worker=f"workers/{worker}", epoch=self.epochs[worker]))

    # Time.

    def tick(self, after_s: float) -> list[Command]:
        self.now_s += after_s
        return self.send(Tick())

    def tick_hearing_all(self, after_s: float) -> list[Command]:
        """Lets time pass while every worker goes on talking."""
        self.now_s += after_s
        for name in self.epochs:
            self.heard(name)
        return self.send(Tick())


def granted(commands: list[Command]) -> dict[str, str]:
    """Workers by the executions that got them."""
    return {
        item.execution_id: item.target.worker.removeprefix("workers/")
        for item in commands
        if isinstance(item, Grant)
    }


def spared(commands: list[Command]) -> dict[str, str]:
    """Workers by the executions that may come and got a spare there."""
    return {
        spare.execution_id: spare.target.worker.removeprefix("workers/")
        for item in commands
        if isinstance(item, Grant)
        for spare in item.spares
    }


def taken_back(commands: list[Command]) -> list[str]:
    """Executions whose spares went to requests."""
    return [item.execution_id for item in commands if isinstance(item, TakeBack)]


def refused(commands: list[Command]) -> dict[str, Refusal]:
    """Refusals by execution."""
    return {item.execution_id: item.refusal for item in commands if isinstance(item, Refuse)}


def the_grant(commands: list[Command]) -> Grant:
    """The one command, which is a grant."""
    (command,) = commands
    assert isinstance(command, Grant)
    return command


def the_end(commands: list[Command]) -> EndStream:
    """The one command, which ends a stream."""
    (command,) = commands
    assert isinstance(command, EndStream)
    return command
