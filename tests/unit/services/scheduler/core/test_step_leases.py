"""How workers come and go in the core: drain, lease, loss, replacement, gathering."""

from __future__ import annotations

import pytest

from services.scheduler.core.messages import (
    Load,
    Refusal,
    StreamBroken,
    StreamEnd,
    WorkerRegistered,
    WorkerState,
)
from tests.unit.services.scheduler.core.driver import (
    OTHER_VERSION,
    VERSION,
    Core,
    granted,
    refused,
    registration,
    settings,
    the_end,
)


def test_a_draining_worker_gets_nothing_new_and_finishes() -> None:
    core = Core()
    core.register("a", capacity=2)
    core.ask("e1")

    core.drain("a")

    assert core.worker("a").state is WorkerState.DRAINING
    assert refused(core.ask("e2")) == {"e2": Refusal.NO_READY_WORKER}
    core.report("a", started=("e1",), ended=("e1",))
    assert core.used("a") == 0


def test_those_who_wait_are_refused_when_the_last_worker_drains() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")
    core.ask("e2")

    assert refused(core.drain("a")) == {"e2": Refusal.NO_READY_WORKER}


def test_a_worker_that_drains_and_reconnects_still_drains() -> None:
    core = Core()
    core.register("a")
    core.drain("a")
    core.lose("a")

    core.register("a")
    assert core.worker("a").state is WorkerState.DRAINING

    core.lose("a")
    core.register("a", incarnation="two")
    assert core.worker("a").state is WorkerState.READY


def test_a_lost_stream_frees_the_slots_and_takes_the_worker_out_at_once() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")
    core.report("a", started=("e1",))

    assert core.lose("a") == []

    assert core.worker("a").state is WorkerState.LOST
    assert core.state.slots == {}
    assert refused(core.ask("e2")) == {"e2": Refusal.NO_READY_WORKER}


def test_those_who_wait_are_refused_when_the_last_worker_is_lost() -> None:
    core = Core()
    core.register("a")
    core.register("b")
    core.ask("e1")
    core.ask("e2")
    core.ask("picky", excluded=("b",))
    core.ask("e3")

    assert refused(core.lose("a")) == {"picky": Refusal.NO_READY_WORKER}
    assert refused(core.lose("b")) == {"e3": Refusal.NO_READY_WORKER}


def test_a_silent_worker_is_lost_when_its_lease_is_over() -> None:
    core = Core(settings(lease_s=5.0))
    core.register("a")

    assert core.tick(4.9) == []
    got = the_end(core.tick(0.1))

    assert (got.worker, got.epoch, got.cause) == ("workers/a", 1, StreamEnd.LEASE_OVER)
    assert core.worker("a").state is WorkerState.LOST
    assert core.tick(100.0) == []


@pytest.mark.parametrize("kind", ["heard", "load", "report", "drain"])
def test_any_message_renews_the_lease(kind: str) -> None:
    core = Core(settings(lease_s=5.0))
    core.register("a")
    core.now_s += 4.0

    match kind:
        case "heard":
            core.heard("a")
        case "load":
            core.load("a", Load(running=1))
        case "report":
            core.report("a")
        case _:
            core.drain("a")

    assert core.tick(4.0) == []


def test_load_is_kept_and_steers_placement() -> None:
    core = Core()
    core.register("a", capacity=2)
    core.register("b", capacity=2)

    core.load("a", Load(kv_used_tokens=90, kv_total_tokens=100))

    assert granted(core.ask("e1")) == {"e1": "b"}


def test_a_newer_registration_replaces_the_older() -> None:
    core = Core()
    core.register("a", capacity=2)
    core.ask("e1")
    core.report("a", started=("e1",))

    got = the_end(core.register("a", incarnation="two"))

    assert (got.epoch, got.cause, got.current_epoch) == (1, StreamEnd.REPLACED, 2)
    assert core.used("a") == 0
    assert core.worker("a").epoch == 2


def test_an_older_registration_that_comes_late_is_turned_away() -> None:
    core = Core()
    older = WorkerRegistered(registration=registration("a", capacity=7), epoch=1)
    core.send(WorkerRegistered(registration=registration("a"), epoch=2))

    got = the_end(core.send(older))

    assert (got.epoch, got.current_epoch) == (1, 2)
    assert core.worker("a").epoch == 2
    assert core.worker("a").registration.info.max_running == 1


def test_what_an_older_stream_says_is_ignored() -> None:
    core = Core()
    core.register("a")
    core.register("a", incarnation="two")
    core.ask("e1")

    core.send(StreamBroken(worker="workers/a", epoch=1))
    core.send(StreamBroken(worker="workers/unknown", epoch=1))

    assert core.worker("a").state is WorkerState.READY
    assert core.used("a") == 1


def test_what_a_lost_worker_says_is_ignored() -> None:
    core = Core()
    core.register("a")
    core.lose("a")

    core.report("a", started=("e1",))

    assert core.state.slots == {}


def test_a_replacement_that_serves_less_refuses_those_it_cannot_serve() -> None:
    core = Core()
    core.register("a", versions=(VERSION, OTHER_VERSION))
    core.ask("e1")
    core.ask("e2")
    core.ask("f1", version=OTHER_VERSION)

    got = core.register("a", incarnation="two", versions=(OTHER_VERSION,))

    assert granted(got) == {"f1": "a"}
    assert refused(got) == {"e2": Refusal.NO_READY_WORKER}


def test_a_worker_that_reconnects_brings_its_executions_back() -> None:
    core = Core()
    core.register("a", capacity=2)
    core.ask("e1")
    core.report("a", started=("e1",))
    core.lose("a")

    core.register("a", capacity=2, running=("e1",))

    assert core.used("a") == 1


def test_an_execution_found_on_a_reconnecting_worker_leaves_its_new_slot() -> None:
    core = Core()
    core.register("a")
    core.ask("e1")
    core.report("a", started=("e1",))
    core.lose("a")
    core.register("b")
    core.ask("e1")

    core.register("a", running=("e1",))

    assert (core.used("a"), core.used("b")) == (1, 0)


def test_after_a_start_requests_wait_for_workers_to_come_back() -> None:
    core = Core(settings(gather_s=3.0))
    core.ask("e1")
    core.ask("f1", version=OTHER_VERSION)
    assert list(core.state.waiting) == ["e1", "f1"]

    assert granted(core.register("a")) == {"e1": "a"}

    core.tick_hearing_all(2.9)
    assert list(core.state.waiting) == ["f1"]
    assert refused(core.tick_hearing_all(0.1)) == {"f1": Refusal.NO_READY_WORKER}
    assert refused(core.ask("f2", version=OTHER_VERSION)) == {"f2": Refusal.NO_READY_WORKER}


def test_after_a_start_a_worker_that_is_lost_again_refuses_nobody_yet() -> None:
    core = Core(settings(gather_s=3.0))
    core.register("a")
    core.ask("e1")
    core.ask("e2")

    assert core.lose("a") == []

    assert granted(core.register("b")) == {"e2": "b"}


def test_after_a_start_who_may_not_wait_is_refused_at_once() -> None:
    core = Core(settings(gather_s=3.0))

    assert refused(core.ask("e1", max_wait_s=0.0)) == {"e1": Refusal.NO_READY_WORKER}
    core.register("a")
    core.ask("e2")
    assert refused(core.ask("e3", max_wait_s=0.0)) == {"e3": Refusal.QUEUE_TIMEOUT}


def test_lost_workers_are_listed_for_a_while() -> None:
    core = Core(settings(lost_kept_s=60.0))
    core.register("a")
    core.lose("a")

    core.tick(59.0)
    assert "workers/a" in core.state.workers
    core.tick(1.0)
    assert "workers/a" not in core.state.workers


def test_the_longest_lost_of_too_many_are_forgotten() -> None:
    core = Core(settings(lost_kept_max=2))
    for name in ("a", "b", "c", "d"):
        core.register(name)
    for name in ("c", "a", "b"):
        core.now_s += 1.0
        core.lose(name)

    assert sorted(core.state.workers) == ["workers/a", "workers/b", "workers/d"]


def test_the_revision_grows_with_what_a_worker_is_and_not_with_its_load() -> None:
    core = Core()
    core.register("a")
    core.register("b")
    assert (core.worker("a").revision, core.worker("b").revision) == (1, 2)

    core.load("a", Load(running=1))
    core.ask("e1")
    assert core.state.revision == 2

    core.drain("a")
    assert core.worker("a").revision == 3
    core.lose("a")
    assert core.worker("a").revision == core.state.revision == 4
