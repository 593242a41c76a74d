"""Spares in the core: given where there is ample room, used, and taken back for requests."""

from __future__ import annotations

from services.scheduler.core.messages import Load, Refusal
from tests.unit.services.scheduler.core.driver import (
    OTHER_VERSION,
    Core,
    granted,
    refused,
    settings,
    spared,
    taken_back,
    the_grant,
)

MANY = tuple(f"s{number}" for number in range(64))


def test_a_grant_brings_a_quarter_of_the_room_that_is_left_as_spares() -> None:
    core = Core()
    core.register("a", capacity=9)

    got = core.ask("e1", spares=MANY)

    assert spared(got) == {"s0": "a", "s1": "a"}
    assert core.used("a") == 3


def test_further_requests_get_no_spares_beyond_the_quarter() -> None:
    core = Core()
    core.register("a", capacity=17)
    core.ask("e1", spares=MANY)

    got = core.ask("e2", spares=("t0", "t1"))

    assert len(core.worker("a").spares) == 4
    assert spared(got) == {}


def test_no_more_spares_are_given_than_asked_for() -> None:
    core = Core()
    core.register("a", capacity=100)

    assert list(spared(core.ask("e1", spares=("s0", "s1")))) == ["s0", "s1"]
    assert spared(core.ask("e2")) == {}


def test_workers_of_few_slots_never_give_spares() -> None:
    core = Core()
    core.register("a", capacity=1)
    core.register("b", capacity=3)

    assert spared(core.ask("e1", spares=MANY)) == {}
    assert refused(core.ask("ahead", max_wait_s=0.0, spares=MANY)) == {
        "ahead": Refusal.QUEUE_TIMEOUT
    }


def test_spares_go_to_the_least_loaded_one_by_one() -> None:
    core = Core()
    core.register("a", capacity=8)
    core.register("b", capacity=8)
    core.load("b", Load(kv_used_tokens=60, kv_total_tokens=100))

    # With one slot in use a is still the less loaded one, and has room for one spare.
    got = core.ask("e1", spares=MANY)

    assert granted(got) == {"e1": "a"}
    assert spared(got) == {"s0": "a", "s1": "b", "s2": "b"}


def test_excluded_and_draining_workers_and_those_of_other_versions_give_no_spares() -> None:
    core = Core()
    core.register("a", capacity=4)
    core.register("excluded", capacity=40)
    core.register("draining", capacity=40)
    core.drain("draining")
    core.register("other", capacity=40, versions=(OTHER_VERSION,))

    assert spared(core.ask("e1", excluded=("excluded",), spares=MANY)) == {}


def test_nobody_gets_spares_while_somebody_waits_for_the_version() -> None:
    core = Core()
    core.register("a", capacity=1)
    core.register("b", capacity=40)
    core.ask("e1", excluded=("b",))
    assert core.ask("shy", excluded=("b",)) == []

    got = core.ask("e2", spares=MANY)

    assert granted(got) == {"e2": "b"}
    assert spared(got) == {}
    assert refused(core.ask("ahead", max_wait_s=0.0, spares=MANY)) == {
        "ahead": Refusal.QUEUE_TIMEOUT
    }


def test_a_request_that_finds_no_free_slot_takes_the_latest_spare_back() -> None:
    core = Core()
    core.register("a", capacity=9)
    core.ask("e1", spares=MANY)
    for number in range(6):
        assert taken_back(core.ask(f"f{number}")) == []

    got = core.ask("e2")

    assert taken_back(got) == ["s1"]
    assert granted(got) == {"e2": "a"}
    assert core.worker("a").free == 0
    # A request that may not wait is a request like any other.
    last = core.ask("e3", max_wait_s=0.0)
    assert (taken_back(last), granted(last)) == (["s0"], {"e3": "a"})
    assert core.ask("e4") == []


def test_a_spare_of_another_version_is_taken_back_too() -> None:
    core = Core()
    core.register("a", capacity=5, versions=("v1", "v2"))
    core.ask("e1", version="v1", spares=MANY)
    for number in range(3):
        core.ask(f"f{number}", version="v1")

    got = core.ask("e2", version="v2")

    assert (taken_back(got), granted(got)) == (["s0"], {"e2": "a"})


def test_a_free_slot_elsewhere_comes_before_a_spare() -> None:
    core = Core()
    core.register("a", capacity=5)
    core.ask("e1", spares=MANY)
    for number in range(3):
        core.ask(f"f{number}")
    core.register("b", capacity=1)
    core.load("b", Load(kv_used_tokens=100, kv_total_tokens=100))

    got = core.ask("e2")

    assert (taken_back(got), granted(got)) == ([], {"e2": "b"})


def test_a_spare_on_a_worker_that_is_fuller_than_full_waits_for_one_end() -> None:
    """Executions that gateways placed by themselves take the place that the spare stood for."""
    core = Core()
    core.register("a", capacity=5)
    core.ask("e1", spares=MANY)
    core.report("a", started=("own0", "own1", "own2", "own3"))
    assert core.worker("a").room == 0
    assert core.ask("e2") == []

    got = core.report("a", ended=("own0",))

    assert (taken_back(got), granted(got)) == (["s0"], {"e2": "a"})


def test_a_spare_that_starts_is_a_slot_like_any_other() -> None:
    core = Core(settings(start_within_s=2.0))
    core.register("a", capacity=5)
    core.ask("e1", spares=MANY)

    core.report("a", started=("e1", "s0"))
    core.tick_hearing_all(10.0)

    assert core.used("a") == 2
    assert core.worker("a").spares == {}
    core.report("a", ended=("e1", "s0"))
    assert core.used("a") == 0


def test_a_spare_that_starts_elsewhere_moves_there() -> None:
    core = Core()
    core.register("a", capacity=5)
    core.register("b", capacity=1)
    core.ask("e1", spares=MANY)
    assert list(core.worker("a").spares) == ["s0"]

    core.report("b", started=("s0",))

    assert core.worker("a").spares == {}
    assert list(core.worker("b").slots) == ["s0"]


def test_a_spare_that_was_taken_back_and_starts_all_the_same_is_counted() -> None:
    core = Core()
    core.register("a", capacity=5)
    core.ask("e1", spares=MANY)
    for number in range(4):
        core.ask(f"f{number}")

    core.report("a", started=("s0",))

    assert core.worker("a").free == -1
    core.report("a", ended=("s0",))
    assert core.worker("a").free == 0


def test_a_spare_that_never_starts_runs_out() -> None:
    core = Core(settings(start_within_s=2.0))
    core.register("a", capacity=9)
    core.ask("e1", spares=MANY)
    core.report("a", started=("e1",))

    core.tick_hearing_all(2.0)

    assert core.used("a") == 1


def test_released_spares_are_free_and_late_releases_change_nothing() -> None:
    core = Core()
    core.register("a", capacity=9)
    spares = the_grant(core.ask("e1", spares=MANY)).spares

    core.release(*(spare.slot_id for spare in spares))
    core.release(*(spare.slot_id for spare in spares))

    assert core.used("a") == 1


def test_the_spares_of_a_lost_worker_are_gone() -> None:
    core = Core()
    core.register("a", capacity=9)
    core.ask("e1", spares=MANY)

    core.lose("a")

    assert core.state.slots == {}


def test_a_repeated_request_returns_the_spares_already_given() -> None:
    core = Core()
    core.register("a", capacity=9)
    first = the_grant(core.ask("e1", spares=MANY))

    again = the_grant(core.ask("e1", spares=MANY))

    assert again.spares == first.spares
    assert core.used("a") == 3


def test_ids_that_run_or_wait_are_no_spares() -> None:
    core = Core()
    core.register("a", capacity=1)
    core.ask("e1")
    core.ask("e2")
    core.register("b", capacity=40, versions=(OTHER_VERSION,))

    got = core.ask("f1", version=OTHER_VERSION, spares=("e1", "e2", "f1", "s0"))

    assert spared(got) == {"s0": "b"}


def test_who_asks_ahead_gets_spares_only() -> None:
    core = Core()
    core.register("a", capacity=12)

    got = core.ask("s0", max_wait_s=0.0, spares=("s1", "s2", "s3"))

    assert granted(got) == {"s0": "a"}
    assert spared(got) == {"s1": "a", "s2": "a"}
    assert list(core.worker("a").spares) == ["s0", "s1", "s2"]
    assert refused(core.ask("t0", max_wait_s=0.0, spares=("t1",))) == {"t0": Refusal.QUEUE_TIMEOUT}
    assert refused(core.ask("t0", max_wait_s=0.0, version="other", spares=("t1",))) == {
        "t0": Refusal.NO_READY_WORKER
    }


def test_who_asks_ahead_takes_nobodys_spares() -> None:
    core = Core()
    core.register("a", capacity=5)
    core.ask("e1", spares=MANY)
    for number in range(3):
        core.ask(f"f{number}")

    got = core.ask("t0", max_wait_s=0.0, spares=("t1",))

    assert taken_back(got) == []
    assert list(refused(got)) == ["t0"]


def test_a_spare_that_is_asked_for_by_its_id_stays_for_whoever_asked() -> None:
    core = Core()
    core.register("a", capacity=5)
    core.ask("e1", spares=MANY)
    assert granted(core.ask("s0", max_wait_s=0.0, spares=("s1",))) == {"s0": "a"}
    assert list(core.worker("a").spares) == ["s0"]

    assert granted(core.ask("s0")) == {"s0": "a"}

    assert core.worker("a").spares == {}
    for number in range(3):
        core.ask(f"f{number}")
    assert core.ask("e2") == []
