"""Workers that load their model: listed, kept by their lease, and given no work."""

from __future__ import annotations

import pytest

from services.scheduler.core.messages import Refusal, StreamEnd, WorkerState
from tests.unit.services.scheduler.core.driver import (
    OTHER_VERSION,
    VERSION,
    Core,
    granted,
    refused,
    settings,
    the_end,
)

FIRST, LATER = b"first", b"later"


def test_a_loading_worker_takes_no_work() -> None:
    core = Core()
    core.register("a", capacity=0, loading=FIRST)

    assert core.worker("a").state is WorkerState.LOADING
    assert refused(core.ask("e1")) == {"e1": Refusal.NO_READY_WORKER}


def test_it_takes_work_once_it_has_loaded() -> None:
    core = Core()
    core.register("a", capacity=0, loading=FIRST)

    core.loaded("a", capacity=2)

    assert core.worker("a").state is WorkerState.READY
    assert core.worker("a").loading is None
    assert granted(core.ask("e1")) == {"e1": "a"}
    assert core.worker("a").free == 1


def test_those_who_wait_get_the_places_of_a_loaded_worker() -> None:
    core = Core()
    core.register("a")
    core.register("b", loading=FIRST)
    for name in ("e1", "e2", "e3"):
        core.ask(name)

    assert granted(core.loaded("b")) == {"e2": "b"}


def test_those_who_wait_after_a_restart_get_a_worker_that_loads_meanwhile() -> None:
    core = Core(settings(gather_s=3.0))
    core.register("a", loading=FIRST)
    core.ask("e1")

    assert granted(core.loaded("a")) == {"e1": "a"}


def test_what_it_serves_is_what_it_has_loaded() -> None:
    core = Core()
    core.register("a", versions=(VERSION,), loading=FIRST)

    core.loaded("a", versions=(OTHER_VERSION,))

    assert granted(core.ask("e1", version=OTHER_VERSION)) == {"e1": "a"}
    assert refused(core.ask("e2")) == {"e2": Refusal.NO_READY_WORKER}


def test_progress_is_kept_and_is_no_change_of_what_it_is() -> None:
    core = Core()
    core.register("a", loading=FIRST)
    revision = core.state.revision

    core.loading("a", LATER)

    assert core.worker("a").loading == LATER
    assert core.state.revision == revision


def test_progress_renews_the_lease_and_silence_ends_it() -> None:
    core = Core(settings(lease_s=5.0))
    core.register("a", loading=FIRST)
    core.tick(4.0)
    core.loading("a", LATER)
    assert core.tick(4.0) == []

    end = the_end(core.tick(1.0))

    assert end.cause is StreamEnd.LEASE_OVER
    assert core.worker("a").state is WorkerState.LOST


def test_one_whose_stream_ends_is_lost() -> None:
    core = Core()
    core.register("a", loading=FIRST)

    core.lose("a")

    assert core.worker("a").state is WorkerState.LOST
    core.loaded("a")
    assert core.worker("a").state is WorkerState.LOST, "an old story told late"


def test_one_that_drains_while_it_loads_never_takes_work() -> None:
    core = Core()
    core.register("a", loading=FIRST)
    core.drain("a")

    core.loaded("a")

    assert core.worker("a").state is WorkerState.DRAINING
    assert refused(core.ask("e1")) == {"e1": Refusal.NO_READY_WORKER}


def test_one_that_was_loaded_when_it_came_says_so_in_vain() -> None:
    core = Core()
    core.register("a", capacity=1)

    core.loading("a", LATER)
    core.loaded("a", capacity=5)

    assert core.worker("a").loading is None
    assert core.worker("a").free == 1


def test_it_comes_again_in_the_same_state_after_a_lost_stream() -> None:
    core = Core()
    core.register("a", loading=FIRST)
    core.lose("a")

    core.register("a", loading=LATER)

    assert (core.worker("a").state, core.worker("a").loading) == (WorkerState.LOADING, LATER)


@pytest.mark.parametrize("drains", [False, True])
def test_a_newer_process_that_loads_leaves_the_name_to_the_one_that_works(*, drains: bool) -> None:
    """A rolling restart under one name: the older serves until the newer can."""
    core = Core()
    core.register("a", incarnation="one")
    if drains:
        core.drain("a")
    older = core.epochs["a"]

    end = the_end(core.register("a", incarnation="two", loading=FIRST))

    assert (end.cause, end.epoch, end.current_epoch) == (
        StreamEnd.OLDER_SERVES,
        core.epochs["a"],
        older,
    )
    assert core.worker("a").epoch == older
    if not drains:
        assert granted(core.ask("e1")) == {"e1": "a"}


def test_a_newer_process_replaces_the_older_when_it_has_loaded() -> None:
    core = Core()
    core.register("a", incarnation="one")

    end = the_end(core.register("a", incarnation="two"))

    assert end.cause is StreamEnd.REPLACED
    assert core.worker("a").registration.incarnation == "two"


@pytest.mark.parametrize("is_same_process", [False, True])
def test_a_loading_process_replaces_one_that_serves_nobody(*, is_same_process: bool) -> None:
    """Itself, come again before its lost stream was noticed; or another one that was loading."""
    core = Core()
    core.register("a", incarnation="one", loading=None if is_same_process else FIRST)

    incarnation = "one" if is_same_process else "two"
    end = the_end(core.register("a", incarnation=incarnation, loading=LATER))

    assert end.cause is StreamEnd.REPLACED
    assert core.worker("a").state is WorkerState.LOADING


def test_a_loading_process_takes_the_name_of_a_lost_one() -> None:
    core = Core()
    core.register("a", incarnation="one")
    core.lose("a")

    assert core.register("a", incarnation="two", loading=FIRST) == []
    assert core.worker("a").state is WorkerState.LOADING
