"""Requests in the core: granted, refused, waiting, gone."""

from __future__ import annotations

from services.scheduler.core.messages import Grant, Refusal
from tests.unit.services.scheduler.core.driver import (
    OTHER_VERSION,
    Core,
    granted,
    refused,
    settings,
    the_grant,
)


def test_a_free_worker_is_granted_at_once_with_fallbacks() -> None:
    core = Core()
    for name in ("a", "b", "c", "d", "e"):
        core.register(name)

    got = the_grant(core.ask("e1"))

    assert got.target.worker == "workers/a"
    assert got.target.endpoint == "a:1"
    assert got.target.epoch == core.epochs["a"]
    assert [item.worker for item in got.fallbacks] == ["workers/b", "workers/c", "workers/d"]
    assert got.queued_s == 0.0


def test_without_a_worker_for_the_version_a_request_is_refused_at_once() -> None:
    core = Core()
    core.register("a", versions=(OTHER_VERSION,))

    assert refused(core.ask("e1")) == {"e1": Refusal.NO_READY_WORKER}


def test_a_request_that_excludes_every_worker_is_refused_at_once() -> None:
    core = Core()
    core.register("a")
    core.register("b")

    assert refused(core.ask("e1", excluded=("a", "b"))) == {"e1": Refusal.NO_READY_WORKER}
    assert granted(core.ask("e2", excluded=("a",))) == {"e2": "b"}


def test_excluded_workers_are_no_fallbacks() -> None:
    core = Core()
    for name in ("a", "b", "c"):
        core.register(name)

    got = the_grant(core.ask("e1", excluded=("b",)))

    assert [item.worker for item in got.fallbacks] == ["workers/c"]


def test_a_request_waits_while_all_are_full_and_gets_the_first_free_slot() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")

    assert core.ask("e2") == []
    core.now_s += 2.0
    got = the_grant(core.report("a", started=("e1",), ended=("e1",)))

    assert got.execution_id == "e2"
    assert got.queued_s == 2.0


def test_slots_are_never_granted_beyond_capacity() -> None:
    core = Core()
    core.register("a", capacity=3)

    for number in range(5):
        core.ask(f"e{number}")

    assert core.used("a") == 3
    assert list(core.state.waiting) == ["e3", "e4"]


def test_a_repeated_request_returns_the_slot_already_given() -> None:
    core = Core()
    core.register("a", capacity=2)
    first = the_grant(core.ask("e1"))

    again = the_grant(core.ask("e1"))
    core.report("a", started=("e1",))
    running = the_grant(core.ask("e1"))

    assert first.slot_id == again.slot_id == running.slot_id
    assert core.used("a") == 1


def test_a_repeated_request_that_waits_keeps_its_place() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")
    core.ask("e2")
    core.ask("e3")

    assert core.ask("e2") == []

    assert granted(core.report("a", ended=("e1",))) == {"e2": "a"}


def test_a_repeated_request_that_excludes_its_worker_is_placed_anew() -> None:
    core = Core()
    core.register("a")
    core.register("b")
    first = the_grant(core.ask("e1"))
    assert first.target.worker == "workers/a"

    second = the_grant(core.ask("e1", excluded=("a",)))

    assert second.target.worker == "workers/b"
    assert second.slot_id != first.slot_id
    assert core.used("a") == 0


def test_a_slot_given_up_by_exclusion_goes_to_who_waits() -> None:
    core = Core()
    core.register("a")
    core.register("b")
    core.ask("e1")
    core.ask("e2")
    core.ask("e3")

    got = core.ask("e1", excluded=("a",))

    assert granted(got) == {"e3": "a"}
    assert list(core.state.waiting) == ["e1"]


def test_a_full_queue_refuses() -> None:
    core = Core(settings(queue_length_max=2))
    core.register("a")
    core.register("b", versions=(OTHER_VERSION,))
    for name in ("e1", "e2", "e3"):
        core.ask(name)

    assert refused(core.ask("e4")) == {"e4": Refusal.QUEUE_FULL}
    # Each version has a queue of its own.
    core.ask("f1", version=OTHER_VERSION)
    assert core.ask("f2", version=OTHER_VERSION) == []


def test_a_request_that_may_not_wait_is_refused_when_all_are_full() -> None:
    core = Core()
    core.register("a")

    assert granted(core.ask("e1", max_wait_s=0.0)) == {"e1": "a"}
    assert refused(core.ask("e2", max_wait_s=0.0)) == {"e2": Refusal.QUEUE_TIMEOUT}


def test_a_request_leaves_the_queue_after_its_longest_wait() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")
    core.report("a", started=("e1",))
    core.ask("e2", max_wait_s=3.0)
    core.ask("e3", max_wait_s=1.0)

    assert core.tick_hearing_all(0.9) == []
    assert refused(core.tick_hearing_all(0.1)) == {"e3": Refusal.QUEUE_TIMEOUT}
    assert refused(core.tick_hearing_all(2.0)) == {"e2": Refusal.QUEUE_TIMEOUT}
    assert core.state.queues == {}


def test_a_caller_that_goes_away_leaves_the_queue() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")
    core.ask("e2")
    core.ask("e3")

    assert core.gone("e2") == []

    assert granted(core.report("a", ended=("e1",))) == {"e3": "a"}


def test_a_caller_that_goes_away_before_its_start_gives_its_slot_to_the_next() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")
    core.ask("e2")

    assert granted(core.gone("e1")) == {"e2": "a"}


def test_a_caller_that_goes_away_after_the_start_changes_nothing() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")
    core.report("a", started=("e1",))

    assert core.gone("e1") == []
    assert core.gone("unknown") == []
    assert core.used("a") == 1


def test_released_slots_go_to_who_waits_and_unknown_ones_are_ignored() -> None:
    core = Core()
    core.register("a", capacity=2)
    first = the_grant(core.ask("e1"))
    second = the_grant(core.ask("e2"))
    core.ask("e3")
    core.ask("e4")

    got = core.release(first.slot_id, "unknown", second.slot_id, first.slot_id)

    assert granted(got) == {"e3": "a", "e4": "a"}


def test_a_late_release_does_not_free_a_later_slot_of_the_same_execution() -> None:
    core = Core()
    core.register("a")
    first = the_grant(core.ask("e1"))
    core.release(first.slot_id)
    core.ask("e1")

    core.release(first.slot_id)

    assert core.used("a") == 1


def test_a_slot_that_never_starts_is_freed_for_the_next() -> None:
    core = Core(settings(start_within_s=2.0))
    core.register("a")
    core.ask("e1")
    core.ask("e2")

    assert core.tick_hearing_all(1.9) == []
    assert granted(core.tick_hearing_all(0.1)) == {"e2": "a"}


def test_a_slot_that_has_started_lives_on() -> None:
    core = Core(settings(start_within_s=2.0))
    core.register("a")
    core.ask("e1")
    core.report("a", started=("e1",))

    core.tick_hearing_all(100.0)

    assert core.used("a") == 1


def test_projects_take_turns_in_the_queue() -> None:
    core = Core()
    core.register("a")
    core.ask("running")
    for name in ("a1", "a2", "a3"):
        core.ask(name, project="projects/a")
    core.ask("b1", project="projects/b")
    order = []

    execution = "running"
    while grants := granted(core.report("a", ended=(execution,))):
        (execution,) = grants
        order.append(execution)

    assert order == ["a1", "b1", "a2", "a3"]


def test_the_versions_of_a_worker_take_turns() -> None:
    """Capacity is the worker's: neither version's queue starves the other's."""
    core = Core()
    core.register("a", versions=("v1", "v2"))
    core.ask("running", version="v1")
    for number in range(3):
        core.ask(f"one{number}", version="v1")
    for number in range(3):
        core.ask(f"two{number}", version="v2")
    order = []

    execution = "running"
    while grants := granted(core.report("a", ended=(execution,))):
        (execution,) = grants
        order.append(execution[:3])

    assert order == ["one", "two", "one", "two", "one", "two"]


def test_who_excludes_a_worker_does_not_hold_up_the_others() -> None:
    core = Core()
    core.register("a")
    core.register("b")
    core.ask("e1")
    core.ask("e2")
    core.ask("shy", excluded=("a",))
    core.ask("e3")

    assert granted(core.report("a", ended=("e1",))) == {"e3": "a"}
    assert granted(core.report("b", ended=("e2",))) == {"shy": "b"}


def test_a_slot_that_nobody_in_the_queue_may_have_stays_free() -> None:
    core = Core()
    core.register("a")
    core.register("b")
    core.ask("e1")
    core.ask("e2")
    core.ask("shy", excluded=("a",))

    assert core.report("a", ended=("e1",)) == []
    assert granted(core.ask("e3")) == {"e3": "a"}


def test_one_report_can_free_several_slots_in_order() -> None:
    core = Core()
    core.register("a", capacity=2)
    for name in ("e1", "e2", "e3", "e4", "e5"):
        core.ask(name)

    got = core.report("a", ended=("e2", "e1"))

    assert [item.execution_id for item in got if isinstance(item, Grant)] == ["e3", "e4"]
