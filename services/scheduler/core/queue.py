"""Requests that wait for a slot: one queue for each model version.

Pure. Projects take turns and each project's requests go first in, first out:

    project  a  a1 a2 a3     taken: a1 b1 a2 c1 a3   (c came while a2 was taken)
             b  b1
             c  c1

A project whose request was taken goes behind all others that wait, so a project with a thousand
requests delays another's first one by at most one request for each project that waits. Nothing is
weighted: one request counts the same, however long it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiter:
    """A request in a queue.

    Attributes:
        execution_id: who waits.
        model_version: for what.
        project: on whose behalf.
        excluded: workers that it must not get.
        asked_s: when it came.
        give_up_s: when it leaves without a slot.
    """

    execution_id: str
    model_version: str
    project: str
    excluded: frozenset[str]
    asked_s: float
    give_up_s: float


class FairQueue:
    """Waiters for one model version.

    Attributes:
        served_turn: when one of them last got a slot, for workers that serve several versions.
    """

    __slots__ = ("_length", "_projects", "served_turn")

    def __init__(self) -> None:
        # Both levels in order of turn. A project is here only while one of its requests is.
        self._projects: dict[str, dict[str, Waiter]] = {}
        self._length = 0
        self.served_turn = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Waiter]:
        for waiters in self._projects.values():
            yield from waiters.values()

    def put(self, waiter: Waiter) -> None:
        """Adds a waiter behind the others of its project."""
        self._projects.setdefault(waiter.project, {})[waiter.execution_id] = waiter
        self._length += 1

    def remove(self, waiter: Waiter) -> None:
        """Takes out a waiter that is here."""
        waiters = self._projects[waiter.project]
        del waiters[waiter.execution_id]
        self._length -= 1
        if not waiters:
            del self._projects[waiter.project]

    def take(self, worker: str) -> Waiter | None:
        """Takes out the next waiter that may run on a worker.

        One step, unless waiters exclude this worker: then one for each of those before it.
        """
        for waiter in self:
            if worker not in waiter.excluded:
                self.remove(waiter)
                self._pass_turn(waiter.project)
                return waiter
        return None

    def _pass_turn(self, project: str) -> None:
        waiters = self._projects.pop(project, None)
        if waiters is not None:
            self._projects[project] = waiters
