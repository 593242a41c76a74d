"""Queues: order inside a project, turns between projects, exclusions."""

from __future__ import annotations

from services.scheduler.core.messages import Priority
from services.scheduler.core.queue import WIDE_PASSED_MAX, FairQueue, Waiter


def _waiter(
    name: str,
    *,
    excluded: frozenset[str] = frozenset(),
    places: int = 1,
    priority: Priority = Priority.STANDARD,
    number: int = 0,
) -> Waiter:
    """The project is the first letter of the name."""
    return Waiter(
        execution_id=name,
        model_version="v",
        project=name[0],
        excluded=excluded,
        places=places,
        priority=priority,
        number=number,
        asked_s=0.0,
        give_up_s=1.0,
    )


def _queue(*waiters: Waiter) -> FairQueue:
    queue = FairQueue()
    for waiter in waiters:
        queue.put(waiter)
    return queue


def _take(queue: FairQueue, worker: str = "w", *, max_running: int = 8) -> Waiter | None:
    """Takes the next of the highest class that has one."""
    for priority in Priority:
        waiter = queue.first(priority, lambda item: item.may_run_on(worker, max_running))
        if waiter is not None:
            queue.take(waiter)
            return waiter
    return None


def _take_all(queue: FairQueue) -> list[str]:
    taken = []
    while (waiter := _take(queue)) is not None:
        taken.append(waiter.execution_id)
    return taken


def test_one_project_is_served_in_order() -> None:
    queue = _queue(_waiter("a1"), _waiter("a2"), _waiter("a3"))

    assert _take_all(queue) == ["a1", "a2", "a3"]


def test_projects_take_turns() -> None:
    queue = _queue(*(_waiter(name) for name in ("a1", "a2", "a3", "b1", "c1", "c2")))

    assert _take_all(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_a_project_that_comes_later_waits_one_round_at_most() -> None:
    queue = _queue(_waiter("a1"), _waiter("a2"), _waiter("a3"), _waiter("b1"))

    assert _take(queue) == _waiter("a1")
    queue.put(_waiter("c1"))

    assert _take_all(queue) == ["b1", "a2", "c1", "a3"]


def test_a_waiter_that_excludes_the_worker_is_passed_over_and_stays() -> None:
    shy = _waiter("a1", excluded=frozenset({"w"}))
    queue = _queue(shy, _waiter("a2"), _waiter("b1"))

    assert _take_all(queue) == ["a2", "b1"]
    assert list(queue) == [shy]
    assert _take(queue, "other") == shy


def test_nobody_is_taken_from_an_empty_queue() -> None:
    assert _take(FairQueue()) is None


def test_removing_keeps_the_length_and_the_others() -> None:
    first, second, third = _waiter("a1"), _waiter("a2"), _waiter("b1")
    queue = _queue(first, second, third)

    queue.remove(first)
    queue.remove(third)

    assert len(queue) == 1
    assert list(queue) == [second]


def test_the_standard_class_goes_first_and_each_class_has_turns_of_its_own() -> None:
    queue = _queue(
        _waiter("a1", priority=Priority.BACKGROUND),
        _waiter("a2", priority=Priority.BACKGROUND),
        _waiter("b1", priority=Priority.BACKGROUND),
        _waiter("a3"),
        _waiter("a4"),
        _waiter("c1"),
    )

    assert [queue.length_of(item) for item in Priority] == [3, 3]
    assert _take_all(queue) == ["a3", "c1", "a4", "a1", "b1", "a2"]
    assert len(queue) == 0


def test_a_waiter_for_more_places_than_a_worker_has_is_passed_over_there() -> None:
    wide = _waiter("a1", places=3)
    queue = _queue(wide, _waiter("a2"))

    assert _take(queue, max_running=2) == _waiter("a2")
    assert _take(queue, max_running=2) is None
    assert _take(queue, max_running=3) == wide


def test_the_first_is_named_and_stays() -> None:
    queue = _queue(_waiter("a1", places=3), _waiter("a2"))

    first = queue.first(Priority.STANDARD, lambda item: item.may_run_on("w", 8))

    assert first == _waiter("a1", places=3)
    assert len(queue) == 2


def test_a_project_with_many_wide_waiters_hides_its_own_small_ones_and_no_others() -> None:
    queue = _queue(*(_waiter(f"a{number}", places=4) for number in range(WIDE_PASSED_MAX)))
    queue.put(_waiter("a-small"))

    assert _take(queue, max_running=2) is None
    queue.put(_waiter("b-small"))
    assert _take(queue, max_running=2) == _waiter("b-small")

    queue.remove(_waiter("a0", places=4))
    assert _take(queue, max_running=2) == _waiter("a-small")


def test_only_older_ones_are_named_when_it_is_said_so() -> None:
    queue = _queue(_waiter("a2", number=2), _waiter("b1", number=1))

    def anybody(_: Waiter) -> bool:
        return True

    assert queue.first(Priority.STANDARD, anybody, number_max=1) == _waiter("b1", number=1)
    assert queue.first(Priority.STANDARD, anybody, number_max=0) is None


def test_fewest_places_that_a_class_waits_for_follow_who_comes_and_goes() -> None:
    wide, wider = _waiter("a1", places=4), _waiter("b1", places=8)
    queue = _queue(wider, wide, _waiter("c1", priority=Priority.BACKGROUND))

    assert queue.least_places(Priority.STANDARD) == 4
    assert queue.least_places(Priority.BACKGROUND) == 1
    queue.remove(wide)
    assert queue.least_places(Priority.STANDARD) == 8
    queue.take(wider)
    assert queue.least_places(Priority.STANDARD) == 0
