"""What workers say in the core: registrations, starts and ends, in and out of order."""

from __future__ import annotations

import pytest

from services.scheduler.core import state as state_module
from services.scheduler.core import step as step_module
from tests.unit.services.scheduler.core.driver import (
    Core,
    granted,
    the_grant,
)


def test_a_new_worker_takes_those_who_wait() -> None:
    core = Core()
    core.register("a")
    for name in ("e1", "e2", "e3", "e4"):
        core.ask(name)

    assert granted(core.register("b", capacity=2)) == {"e2": "b", "e3": "b"}


def test_running_executions_at_registration_rebuild_the_slots() -> None:
    """After a restart of the scheduler: nothing is granted beyond what really is free."""
    core = Core()
    core.register("a", capacity=2, running=("e1", "e2"))

    assert core.ask("e3") == []
    assert granted(core.report("a", ended=("e1",))) == {"e3": "a"}
    assert the_grant(core.ask("e2")).target.worker == "workers/a"


def test_a_rebuilt_slot_needs_no_start() -> None:
    core = Core()
    core.register("a", running=("e1",))

    core.tick_hearing_all(100.0)

    assert core.used("a") == 1


def test_an_execution_that_nobody_asked_for_is_counted_and_freed() -> None:
    """A gateway has placed it by itself while the scheduler was away."""
    core = Core()
    core.register("a")

    core.report("a", started=("own",))

    assert core.ask("e1") == []
    assert granted(core.report("a", ended=("own",))) == {"e1": "a"}


def test_reports_can_take_a_worker_beyond_its_capacity() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")

    core.report("a", started=("own1", "own2"))
    core.ask("e2")

    assert core.used("a") == 3
    assert core.report("a", ended=("own1", "own2")) == []
    assert granted(core.report("a", ended=("e1",))) == {"e2": "a"}


def test_an_execution_that_starts_elsewhere_takes_its_slot_along() -> None:
    core = Core()
    core.register("a")
    core.register("b")
    grant = the_grant(core.ask("e1"))
    core.ask("e2")
    core.ask("e3")

    got = core.report("b", started=("e1",))

    assert granted(got) == {"e3": "a"}
    assert set(core.worker("b").slots) == {"e1", "e2"}
    # It keeps the slot id by which the gateway knows it.
    core.release(grant.slot_id)
    assert set(core.worker("b").slots) == {"e2"}


def test_an_execution_that_starts_while_its_request_waits_answers_the_request() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")
    core.ask("e2")
    core.now_s += 1.0

    got = the_grant(core.report("a", started=("e2",)))

    assert (got.execution_id, got.target.worker, got.queued_s) == ("e2", "workers/a", 1.0)
    assert core.state.waiting == {}


def test_an_end_before_its_start_does_not_leak() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")

    core.report("a", ended=("e1",))
    core.report("a", started=("e1",))

    assert core.used("a") == 0


def test_an_end_before_its_start_does_not_leak_when_the_request_is_repeated_between() -> None:
    """Found by the simulation: a repeat once made the fallback forget the end."""
    core = Core()
    core.register("a")
    core.register("b")
    core.ask("e1")
    core.report("b", ended=("e1",))

    core.ask("e1")
    core.report("b", started=("e1",))

    assert core.used("b") == 0


def test_one_report_with_start_and_end_counts_both() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")
    core.ask("e2")

    assert granted(core.report("a", started=("e1",), ended=("e1",))) == {"e2": "a"}


def test_repeated_reports_change_nothing() -> None:
    core = Core()
    core.register("a", capacity=2)
    core.ask("e1")

    for _ in range(2):
        core.report("a", started=("e1",))
    assert core.used("a") == 1
    for _ in range(2):
        core.report("a", ended=("e1",))
    core.report("a", started=("e1",))

    assert core.used("a") == 0


def test_a_refusal_by_one_worker_does_not_free_the_slot_on_another() -> None:
    """The gateway tried the fallback first, or the worker reports what it refused."""
    core = Core()
    core.register("a")
    core.register("b")
    core.ask("e1")

    core.report("b", ended=("e1",))

    assert core.used("a") == 1


def test_what_is_remembered_of_ended_executions_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_module, "ENDED_REMEMBERED_MAX", 2)
    core = Core()
    core.register("a")

    core.report("a", ended=("e1", "e2", "e3"))

    assert list(core.worker("a").ended) == ["e2", "e3"]


def test_what_a_worker_claims_to_run_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "SLOTS_PER_WORKER_MAX", 2)
    core = Core()

    core.register("a", capacity=5, running=("e1", "e2", "e3"))

    assert core.used("a") == 2
    assert state_module.SLOTS_PER_WORKER_MAX >= 65_536
