"""Queues: order inside a project, turns between projects, exclusions."""

from __future__ import annotations

from services.scheduler.core.queue import FairQueue, Waiter


def _waiter(name: str, *, excluded: frozenset[str] = frozenset()) -> Waiter:
    """The project is the first letter of the name."""
    return Waiter(
        execution_id=name,
        model_version="v",
        project=name[0],
        excluded=excluded,
        asked_s=0.0,
        give_up_s=1.0,
    )


def _queue(*waiters: Waiter) -> FairQueue:
    queue = FairQueue()
    for waiter in waiters:
        queue.put(waiter)
    return queue


def _take_all(queue: FairQueue) -> list[str]:
    taken = []
    while (waiter := queue.take("w")) is not None:
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

    assert queue.take("w") == _waiter("a1")
    queue.put(_waiter("c1"))

    assert _take_all(queue) == ["b1", "a2", "c1", "a3"]


def test_a_waiter_that_excludes_the_worker_is_passed_over_and_stays() -> None:
    shy = _waiter("a1", excluded=frozenset({"w"}))
    queue = _queue(shy, _waiter("a2"), _waiter("b1"))

    assert _take_all(queue) == ["a2", "b1"]
    assert list(queue) == [shy]
    assert queue.take("other") == shy


def test_nobody_is_taken_from_an_empty_queue() -> None:
    assert FairQueue().take("w") is None


def test_removing_keeps_the_length_and_the_others() -> None:
    first, second, third = _waiter("a1"), _waiter("a2"), _waiter("b1")
    queue = _queue(first, second, third)

    queue.remove(first)
    queue.remove(third)

    assert len(queue) == 1
    assert list(queue) == [second]
