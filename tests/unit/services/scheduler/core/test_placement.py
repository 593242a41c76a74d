"""The policy least_load: who may run it, who is least loaded, who comes next."""

from __future__ import annotations

import pytest

from services.scheduler.core import placement
from services.scheduler.core.messages import Load, WorkerState
from services.scheduler.core.state import Worker
from tests.unit.services.scheduler.core.driver import (
    OTHER_VERSION,
    VERSION,
    Core,
    granted,
    registration,
    the_grant,
)


def _worker(name: str, *, capacity: int = 4, used: int = 0, turn: int = 0) -> Worker:
    core = Core()
    core.register(name, capacity=capacity, running=tuple(f"{name}{n}" for n in range(used)))
    worker = core.worker(name)
    worker.granted_turn = turn
    return worker


def test_only_ready_workers_of_the_version_that_are_not_excluded_are_eligible() -> None:
    core = Core()
    core.register("ready")
    core.register("full", running=("x",))
    core.register("draining")
    core.drain("draining")
    core.register("lost")
    core.lose("lost")
    core.register("other", versions=(OTHER_VERSION,))
    core.register("excluded")

    got = placement.eligible(core.state, VERSION, frozenset({"workers/excluded"}))

    assert [item.name for item in got] == ["workers/ready", "workers/full"]
    assert placement.eligible(core.state, "models/none/versions/1", frozenset()) == []


@pytest.mark.parametrize(
    ("load", "want"),
    [
        (None, 0.5),
        (Load(running=2), 0.5),
        (Load(kv_used_tokens=50), 0.5),
        (Load(kv_used_tokens=0, kv_total_tokens=0), 0.5),
        (Load(kv_used_tokens=50, kv_total_tokens=100), 0.625),
    ],
)
def test_the_score_is_the_share_of_slots_and_a_quarter_of_the_share_of_cache(
    load: Load | None, want: float
) -> None:
    worker = _worker("a", used=2)
    worker.load = load

    assert placement.score(worker) == want


def test_the_least_loaded_worker_with_a_free_slot_is_picked() -> None:
    full = _worker("full", capacity=1, used=1)
    busy = _worker("busy", capacity=4, used=3)
    idle = _worker("idle", capacity=2, used=1)

    assert placement.pick([full, busy, idle]) is idle
    assert placement.pick([full, busy]) is busy
    assert placement.pick([full]) is None
    assert placement.pick([]) is None


def test_a_big_worker_gets_its_share() -> None:
    core = Core()
    core.register("big", capacity=6)
    core.register("small", capacity=2)

    got = [granted(core.ask(f"e{n}"))[f"e{n}"] for n in range(4)]

    assert got.count("big") == 3


def test_idle_workers_take_turns() -> None:
    core = Core()
    for name in ("a", "b", "c"):
        core.register(name, capacity=2)
    got = []

    for number in range(6):
        grant = the_grant(core.ask(f"e{number}"))
        got.append(grant.target.worker)
        core.release(grant.slot_id)

    assert got == [f"workers/{name}" for name in "abcabc"]


def test_fallbacks_are_the_others_free_ones_first_then_the_least_loaded() -> None:
    chosen = _worker("chosen")
    full = _worker("full", capacity=1, used=1)
    fuller = _worker("fuller", capacity=1, used=2)
    busy = _worker("busy", used=3)
    idle = _worker("idle")
    workers = [full, fuller, busy, chosen, idle]

    got = placement.fallbacks(workers, chosen, 3)

    assert [item.endpoint for item in got] == ["idle:1", "busy:1", "full:1"]


def test_a_target_says_how_to_reach_the_worker() -> None:
    worker = Worker(
        registration=registration("a"),
        epoch=7,
        state=WorkerState.READY,
        is_draining=False,
        registered_s=0.0,
        heard_s=0.0,
    )

    got = placement.target_of(worker)

    assert (got.worker, got.endpoint, got.epoch) == ("workers/a", "a:1", 7)
