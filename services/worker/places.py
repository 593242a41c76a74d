"""The books of a worker: which executions are here, and which of them the scheduler knows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from libs.errors import (
    FailedPrecondition,
    FieldRule,
    MaasError,
    Reason,
    ResourceExhausted,
    invalid_field,
)
from services.worker.alarm import Alarm
from services.worker.reports import Reports
from services.worker.runs import UNLIMITED_S, Place


class Places:
    """All that takes a place. Belongs to one event loop.

    Attributes:
        epoch: of the worker's registration; 0 until there was one.
        refusing: makes the error that everything new is refused with, once there is one.
        is_idle: set while nothing is here.
        earliest_s: monotonic time at which the first of them is due.
    """

    def __init__(self, reports: Reports, alarm: Alarm, *, worker: str, most: int) -> None:
        """Keeps what it needs.

        Args:
            reports: what the scheduler hears.
            alarm: goes off when one of them is due.
            worker: name of this worker.
            most: outputs that may be here.
        """
        self.epoch = 0
        self.refusing: Callable[[str], MaasError] | None = None
        self.is_idle = asyncio.Event()
        self.is_idle.set()
        self.earliest_s = UNLIMITED_S
        self._reports = reports
        self._alarm = alarm
        self._worker = worker
        self._most = most
        self._by_id: dict[str, Place] = {}
        self._outputs = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Place]:
        """Goes over those that are here now; they may leave meanwhile."""
        return iter(list(self._by_id.values()))

    def find(self, execution_id: str) -> Place | None:
        """Finds one by its id."""
        return self._by_id.get(execution_id)

    def running_ids(self) -> list[str]:
        """Ids of all that hold a place in the engine, or wait for one there."""
        return [place.execution_id for place in self._by_id.values() if place.is_started]

    def require(self, execution_id: str, epoch: int, outputs: int) -> None:
        """Sees that there is room for one more.

        Raises:
            FailedPrecondition: the epoch is older than ours.
            InvalidArgument: the id is in use.
            ResourceExhausted: everything is full.
            Unavailable: the worker is draining, or its engine is gone.
        """
        if self.refusing is not None:
            raise self.refusing(self._worker)
        if epoch < self.epoch:
            raise FailedPrecondition(
                "the worker has registered anew",
                reason=Reason.FENCED,
                metadata={"epoch": str(epoch), "currentEpoch": str(self.epoch)},
            )
        if execution_id in self._by_id:
            raise invalid_field("execution_id", FieldRule.CONFLICTING, "runs here already")
        if self._outputs + outputs > self._most:
            raise ResourceExhausted("the worker's queue is full")

    def add(self, place: Place) -> None:
        """Enters a place, if it is not there yet, and what is due about it."""
        if place.execution_id not in self._by_id:
            self._by_id[place.execution_id] = place
            self._outputs += place.open
            self.is_idle.clear()
        for run in place.runs:
            if not run.is_told:
                run.stream.runs[run.lane] = run
        if place.due_s < self.earliest_s:
            self.earliest_s = place.due_s
            self._alarm.set_by(place.due_s)

    def start(self, place: Place) -> None:
        """Enters a place whose outputs are in the engine; the scheduler is told."""
        place.is_started = True
        self.add(place)
        self._reports.started(place.execution_id)

    def release(self, place: Place) -> None:
        """One output of a place is over; with the last one the place is free."""
        if place.open > 1:
            place.open -= 1
            self._outputs -= 1
            return
        self.forget(place)
        self._reports.ended(place.execution_id)

    def forget(self, place: Place) -> None:
        """Takes a place off the books, with all outputs that it has."""
        del self._by_id[place.execution_id]
        self._outputs -= place.open
        place.open = 0
        if not self._by_id:
            self.is_idle.set()
