"""Requests that wait for a slot: one queue for each model version, with a row for each class.

Pure. The standard class goes before the background class. Within a class projects take turns and
each project's requests go first in, first out:

    project  a  a1 a2 a3     taken: a1 b1 a2 c1 a3   (c came while a2 was taken)
             b  b1
             c  c1

A project whose request was taken goes behind all others that wait, so a project with a thousand
requests delays another's first one by at most one request for each project that waits. Nothing is
weighted: one request counts the same, however long it runs and however many places it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.scheduler.core.messages import PRIORITIES, Priority

# How many requests for several places another one of their project may be taken out before, so that
# a project with a thousand of them does not make each look into the queue a long one.
WIDE_PASSED_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiter:
    """A request in a queue.

    Attributes:
        execution_id: who waits.
        model_version: for what.
        project: on whose behalf.
        excluded: workers that it must not get.
        places: places that it takes on one worker, all at once.
        priority: its class.
        number: grows from waiter to waiter, so that the older one is known.
        asked_s: when it came.
        give_up_s: when it leaves without a slot.
    """

    execution_id: str
    model_version: str
    project: str
    excluded: frozenset[str]
    places: int = 1
    priority: Priority = Priority.STANDARD
    number: int = 0
    asked_s: float
    give_up_s: float

    def may_run_on(self, worker: str, max_running: int) -> bool:
        """Tells whether a worker would do, once it has room."""
        return worker not in self.excluded and self.places <= max_running


class FairQueue:
    """Waiters for one model version.

    Attributes:
        served_turn: when one of them last got a slot, or when the queue began, for workers that
            serve several versions.
    """

    __slots__ = ("_lengths", "_rows", "_sizes", "served_turn")

    def __init__(self, served_turn: int = 0) -> None:
        # Rows by class, then projects and waiters in order of turn. A project is here only while
        # one of its requests is.
        self._rows: tuple[dict[str, dict[str, Waiter]], ...] = tuple({} for _ in PRIORITIES)
        self._lengths = [0 for _ in PRIORITIES]
        # By class: how many waiters want so many places, by that number.
        self._sizes: tuple[dict[int, int], ...] = tuple({} for _ in PRIORITIES)
        self.served_turn = served_turn

    def __len__(self) -> int:
        return sum(self._lengths)

    def __iter__(self) -> Iterator[Waiter]:
        for priority in PRIORITIES:
            yield from self.of(priority)

    def of(self, priority: Priority) -> Iterator[Waiter]:
        """Lists the waiters of a class; the first of each project is in order of turn."""
        for waiters in self._rows[priority].values():
            yield from waiters.values()

    def length_of(self, priority: Priority) -> int:
        """Counts the waiters of a class."""
        return self._lengths[priority]

    def least_places(self, priority: Priority) -> int:
        """Returns the fewest places that a waiter of a class wants; 0 when nobody waits."""
        return min(self._sizes[priority], default=0)

    def put(self, waiter: Waiter) -> None:
        """Adds a waiter behind the others of its class and project."""
        row = self._rows[waiter.priority]
        row.setdefault(waiter.project, {})[waiter.execution_id] = waiter
        self._lengths[waiter.priority] += 1
        sizes = self._sizes[waiter.priority]
        sizes[waiter.places] = sizes.get(waiter.places, 0) + 1

    def remove(self, waiter: Waiter) -> None:
        """Takes out a waiter that is here."""
        row = self._rows[waiter.priority]
        waiters = row[waiter.project]
        del waiters[waiter.execution_id]
        self._lengths[waiter.priority] -= 1
        sizes = self._sizes[waiter.priority]
        sizes[waiter.places] -= 1
        if not sizes[waiter.places]:
            del sizes[waiter.places]
        if not waiters:
            del row[waiter.project]

    def first(
        self,
        priority: Priority,
        is_wanted: Callable[[Waiter], bool],
        *,
        number_max: float = math.inf,
    ) -> Waiter | None:
        """Names the next waiter of a class that is wanted. A step for each before it.

        Args:
            priority: the class.
            is_wanted: tells who is.
            number_max: younger ones than this are not.
        """
        for waiters in self._rows[priority].values():
            passed = 0
            for waiter in waiters.values():
                if waiter.number > number_max or passed >= WIDE_PASSED_MAX:
                    break
                if is_wanted(waiter):
                    return waiter
                passed += waiter.places > 1
        return None

    def take(self, waiter: Waiter) -> None:
        """Takes out a waiter that gets a slot: its project goes behind the others of its class."""
        self.remove(waiter)
        row = self._rows[waiter.priority]
        waiters = row.pop(waiter.project, None)
        if waiters is not None:
            row[waiter.project] = waiters
