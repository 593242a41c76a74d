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


def _ranked(core: Core, *excluded: str) -> list[str]:
    names = frozenset(f"workers/{name}" for name in excluded)
    found = placement.ranked(core.state, VERSION, names)
    return [item.name.removeprefix("workers/") for item in found]


def _occupied(core: Core, name: str, *, capacity: int, used: int) -> None:
    running = tuple(f"{name}{number}" for number in range(used))
    core.register(name, capacity=capacity, running=running)


def test_only_ready_workers_of_the_version_that_are_not_excluded_are_ranked() -> None:
    core = Core()
    core.register("ready")
    core.register("full", running=("x",))
    core.register("draining")
    core.drain("draining")
    core.register("lost")
    core.lose("lost")
    core.register("other", versions=(OTHER_VERSION,))
    core.register("excluded")

    assert _ranked(core, "excluded") == ["ready", "full"]
    assert placement.ranked(core.state, "models/none/versions/1", frozenset()) == []


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
    core = Core()
    _occupied(core, "a", capacity=4, used=2)
    worker = core.worker("a")
    worker.load = load

    assert placement.score(worker) == want


def test_free_workers_come_first_then_the_least_loaded() -> None:
    core = Core()
    _occupied(core, "fuller", capacity=1, used=2)
    _occupied(core, "full", capacity=1, used=1)
    _occupied(core, "busy", capacity=4, used=3)
    _occupied(core, "idle", capacity=2, used=1)
    # Its slots make it look worse than the full one, but it has a free one.
    core.load("busy", Load(kv_used_tokens=100, kv_total_tokens=100))
    core.load("idle", Load(kv_used_tokens=50, kv_total_tokens=100))

    assert placement.score(core.worker("busy")) == placement.score(core.worker("full"))
    assert _ranked(core) == ["idle", "busy", "full", "fuller"]


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


def test_fallbacks_are_the_next_three() -> None:
    core = Core()
    for number, name in enumerate(("e", "d", "c", "b", "a")):
        _occupied(core, name, capacity=10, used=5 - number)

    got = the_grant(core.ask("new"))

    assert got.target.worker == "workers/a"
    assert [item.worker for item in got.fallbacks] == ["workers/b", "workers/c", "workers/d"]


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
