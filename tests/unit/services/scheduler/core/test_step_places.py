"""Slots of several places, the two classes, and who has to wait for whom."""

from __future__ import annotations

from services.scheduler.core.messages import Priority, Refusal
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

BACKGROUND = Priority.BACKGROUND


def test_a_slot_takes_all_its_places_on_one_worker() -> None:
    core = Core()
    core.register("a", capacity=3)
    core.register("b", capacity=4)

    assert granted(core.ask("wide", places=4)) == {"wide": "b"}

    assert (core.used("a"), core.used("b")) == (0, 4)
    core.report("b", started=("wide",), ended=("wide",))
    assert core.used("b") == 0


def test_places_that_are_free_on_several_workers_do_not_add_up() -> None:
    core = Core()
    for name in ("a", "b"):
        core.register(name, capacity=2, running=(f"{name}1",))

    assert core.ask("wide", places=2) == []

    assert granted(core.report("b", ended=("b1",))) == {"wide": "b"}


def test_more_places_than_any_worker_has_are_refused_at_once() -> None:
    core = Core()
    core.register("a", capacity=3)

    assert refused(core.ask("wide", places=4)) == {"wide": Refusal.NO_READY_WORKER}
    assert granted(core.ask("fits", places=3)) == {"fits": "a"}


def test_who_wants_more_than_what_is_left_of_the_workers_is_refused() -> None:
    core = Core()
    core.register("big", capacity=4, running=("x",))
    core.register("small", capacity=2)
    core.ask("wide", places=4)

    assert refused(core.lose("big")) == {"wide": Refusal.NO_READY_WORKER}


def test_workers_that_are_too_small_are_no_fallbacks() -> None:
    core = Core()
    core.register("a", capacity=4)
    core.register("small", capacity=3)
    core.register("b", capacity=4, running=("x",))

    got = the_grant(core.ask("wide", places=4))

    assert got.target.worker == "workers/a"
    assert [item.worker for item in got.fallbacks] == ["workers/b"]


def test_small_requests_do_not_pass_a_big_one_by() -> None:
    """Each end frees one place; new small requests come faster than that."""
    core = Core(settings(queue_length_max=100))
    core.register("a", capacity=4, running=("r0", "r1", "r2", "r3"))
    core.ask("wide", places=4)

    for number in range(3):
        core.ask(f"small{number}")
        assert granted(core.report("a", ended=(f"r{number}",))) == {}
        assert core.ask(f"late{number}") == []
    assert granted(core.report("a", ended=("r3",))) == {"wide": "a"}

    got = granted(core.report("a", started=("wide",), ended=("wide",)))
    assert list(got) == ["small0", "late0", "small1", "late1"]


def test_who_does_not_wait_is_refused_what_is_saved_up_for_another() -> None:
    core = Core()
    core.register("a", capacity=2, running=("x",))
    core.ask("wide", places=2)

    assert refused(core.ask("small", max_wait_s=0.0)) == {"small": Refusal.QUEUE_TIMEOUT}


def test_those_behind_a_big_request_go_on_when_it_leaves() -> None:
    core = Core()
    core.register("a", capacity=3, running=("x",))
    core.ask("wide", places=3)
    core.ask("small")

    assert granted(core.gone("wide")) == {"small": "a"}


def test_those_behind_a_big_request_go_on_when_its_time_is_over() -> None:
    core = Core()
    core.register("a", capacity=3, running=("x",))
    core.ask("wide", places=3, max_wait_s=2.0)
    core.ask("small")

    commands = core.tick_hearing_all(2.5)

    assert refused(commands) == {"wide": Refusal.QUEUE_TIMEOUT}
    assert granted(commands) == {"small": "a"}


def test_those_behind_a_big_request_go_on_elsewhere() -> None:
    core = Core()
    core.register("a", capacity=3, running=("a1",))
    core.register("b", capacity=3, running=("b1",))
    core.ask("wide", places=3)

    assert granted(core.ask("small", places=2)) == {"small": "a"}
    assert core.ask("next") == []
    assert granted(core.report("b", ended=("b1",))) == {"wide": "b"}


def test_one_worker_alone_saves_up_for_a_big_request_and_only_so_long_as_it_has_most() -> None:
    core = Core()
    core.register("a", capacity=4, running=("a1", "a2"))
    core.register("b", capacity=4, running=("b1", "b2", "b3"))
    core.ask("wide", places=4)

    # The first has more room and gives nothing away; the other one serves who comes.
    assert granted(core.ask("e1")) == {"e1": "b"}
    assert core.ask("e2") == []
    assert granted(core.report("b", ended=("b1",))) == {"e2": "b"}
    assert core.ask("e3") == []
    assert granted(core.report("b", ended=("b2", "b3", "e1"))) == {"e3": "b"}
    # Now the other one gets more: it saves up, and what the first has saved is for the others.
    assert granted(core.report("b", ended=("e2",))) == {}
    assert granted(core.ask("e4")) == {"e4": "a"}
    assert granted(core.report("b", started=("e3",), ended=("e3",))) == {"wide": "b"}


def test_a_big_request_gets_its_turn_however_many_small_ones_come_on_all_workers() -> None:
    core = Core(settings(queue_length_max=1000))
    running = []
    for name in ("a", "b", "c"):
        first = tuple(f"{name}{number}" for number in range(4))
        core.register(name, capacity=4, running=first)
        running += [(name, execution_id) for execution_id in first]
    core.ask("wide", places=4, project="projects/big")
    ends = 0
    number = 0
    found: dict[str, str] = {}
    while "wide" not in found:
        for _ in range(2):
            number += 1
            core.ask(f"s{number}", project=f"projects/{number % 3}")
        worker, execution_id = running.pop(0)
        ends += 1
        # One worker lets its four go, while each of the twelve running ones ends once at most.
        assert ends <= 12
        found = granted(core.report(worker, started=(execution_id,), ended=(execution_id,)))
        running += [(name, key) for key, name in found.items()]


def test_a_worker_that_a_big_request_may_not_have_serves_the_others() -> None:
    core = Core()
    core.register("a", capacity=2, running=("a1",))
    core.register("b", capacity=2, running=("b1",))
    core.ask("wide", places=2, excluded=("a",))

    assert granted(core.ask("small")) == {"small": "a"}


def test_a_big_request_is_not_starved_by_another_version_of_its_worker() -> None:
    core = Core()
    versions = ("models/m/versions/1", OTHER_VERSION)
    core.register("a", capacity=2, versions=versions, running=("x", "y"))
    core.ask("wide", places=2)
    core.ask("other0", version=OTHER_VERSION)

    assert granted(core.report("a", ended=("x",))) == {}
    assert core.ask("other1", version=OTHER_VERSION) == []
    assert granted(core.report("a", ended=("y",))) == {"wide": "a"}


def test_spares_make_room_for_a_big_request_latest_first() -> None:
    core = Core()
    core.register("a", capacity=8)
    core.ask("e1", spares=("s1", "s2"))
    assert core.used("a") == 2
    core.ask("e2", spares=("s2",))
    core.ask("five", places=4)

    commands = core.ask("wide", places=2)

    assert taken_back(commands) == ["s1"]
    assert granted(commands) == {"wide": "a"}
    assert core.used("a") == 8


def test_spares_that_run_out_with_the_slot_before_them_may_be_taken_back_first() -> None:
    core = Core(settings(start_within_s=5.0))
    core.register("a", capacity=8)
    assert spared(core.ask("e1", spares=("s1",))) == {"s1": "a"}
    core.ask("wide", places=8)

    commands = core.tick_hearing_all(5.0)

    assert taken_back(commands) == ["s1"]
    assert granted(commands) == {"wide": "a"}
    assert core.used("a") == 8


def test_no_spares_are_given_where_somebody_saves_up() -> None:
    core = Core()
    versions = ("models/m/versions/1", OTHER_VERSION)
    core.register("a", capacity=8, versions=versions, running=("x",))
    core.register("b", capacity=8, versions=(OTHER_VERSION,))
    core.ask("wide", places=8)

    commands = core.ask("other", version=OTHER_VERSION, spares=("s1",))

    assert granted(commands) == {"other": "b"}
    assert spared(commands) == {"s1": "b"}


def test_a_spare_is_too_small_for_who_asks_for_several_places_under_its_id() -> None:
    core = Core()
    core.register("a", capacity=8)
    core.ask("e1", spares=("s1",))

    assert granted(core.ask("s1", places=3)) == {"s1": "a"}

    assert core.worker("a").spares == {}
    assert core.used("a") == 4


def test_asking_ahead_is_for_one_place() -> None:
    """Who asks for several means it: the slot is no spare that another request may take."""
    core = Core()
    core.register("a", capacity=8)

    core.ask("wide", places=2, max_wait_s=0.0, spares=("s1",))

    assert list(core.worker("a").spares) == ["s1"]
    assert core.used("a") == 3


def test_a_slot_moves_with_all_its_places() -> None:
    core = Core()
    core.register("a", capacity=4)
    core.register("b", capacity=4)
    assert granted(core.ask("wide", places=3)) == {"wide": "a"}

    core.report("b", started=("wide",))

    assert (core.used("a"), core.used("b")) == (0, 3)


def test_what_a_worker_names_after_a_restart_counts_as_one_place() -> None:
    core = Core()
    core.register("a", capacity=4, running=("wide", "small"))

    assert core.used("a") == 2
    assert the_grant(core.ask("wide", places=3)).target.worker == "workers/a"
    assert core.used("a") == 2


def test_what_starts_while_it_waits_counts_all_its_places() -> None:
    core = Core()
    core.register("a", capacity=4, running=("x", "y"))
    core.ask("wide", places=3)

    core.report("a", started=("wide",))

    assert core.used("a") == 5
    assert core.worker("a").free == -1


def test_the_standard_class_goes_before_the_background_class() -> None:
    core = Core()
    core.register("a")
    core.ask("running")
    core.ask("background0", priority=BACKGROUND)
    core.ask("background1", priority=BACKGROUND)
    core.ask("standard")

    got = [
        list(granted(core.report("a", started=(name,), ended=(name,))))
        for name in ("running", "standard", "background0")
    ]

    assert got == [["standard"], ["background0"], ["background1"]]


def test_the_background_class_starts_at_once_where_nothing_waits() -> None:
    core = Core()
    core.register("a")

    assert granted(core.ask("background", priority=BACKGROUND)) == {"background": "a"}


def test_standard_requests_pass_a_big_background_one_by() -> None:
    core = Core()
    core.register("a", capacity=2, running=("x",))
    core.ask("wide", places=2, priority=BACKGROUND)

    assert core.ask("background", priority=BACKGROUND) == []
    assert granted(core.ask("standard")) == {"standard": "a"}


def test_a_full_background_queue_refuses_no_standard_request() -> None:
    core = Core(settings(queue_length_max=2))
    core.register("a")
    core.ask("running")
    for number in range(2):
        core.ask(f"background{number}", priority=BACKGROUND)

    assert refused(core.ask("more", priority=BACKGROUND)) == {"more": Refusal.QUEUE_FULL}
    assert core.ask("standard") == []


def test_the_wait_of_the_background_class_has_its_bound() -> None:
    core = Core()
    core.register("a")
    core.ask("running")
    core.ask("background", priority=BACKGROUND, max_wait_s=2.0)
    core.ask("standard")

    assert refused(core.tick_hearing_all(2.5)) == {"background": Refusal.QUEUE_TIMEOUT}


def test_background_requests_of_a_shared_worker_wait_for_the_other_version_too() -> None:
    core = Core()
    versions = ("models/m/versions/1", OTHER_VERSION)
    core.register("a", versions=versions)
    core.ask("running")
    core.ask("background", priority=BACKGROUND)
    core.ask("standard", version=OTHER_VERSION)

    got = granted(core.report("a", started=("running",), ended=("running",)))

    assert got == {"standard": "a"}
