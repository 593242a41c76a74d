"""The scheduler's core among random faults. One seed reproduces everything:

python -m pytest tests/sim -k 'seed-17'
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.sim.scheduler_faults import Faults
from tests.sim.scheduler_world import World

SEEDS = 50


def _run(seed: int) -> World:
    world = World(seed)
    Faults(world)
    world.run()
    return world


@pytest.mark.parametrize("seed", range(SEEDS), ids=lambda seed: f"seed-{seed}-")
def test_whatever_happens_each_request_ends_once_and_every_slot_is_freed(seed: int) -> None:
    """Claims after every step and at the end are in scheduler_world.py."""
    _run(seed)


def test_the_world_is_worth_the_name() -> None:
    """What the claims are about does happen, in a few seeds already."""
    counts: Counter[str] = Counter()
    for seed in range(10):
        counts.update(_run(seed).counts)

    wanted = {
        "Grant",
        "no ready worker",
        "queue full",
        "queue timeout",
        "replaced",
        "lease over",
        "older serves",
        "loading",
        "loaded",
        "cancelled",
        "repeated",
        "never started",
        "end before start",
        "asked anew",
        "placed alone",
        "agreed",
        "scheduler restarted",
        "kill",
        "lose",
        "hang",
        "reconnect",
        "drain",
        "spare granted",
        "spare said again",
        "spare used",
        "spare used that was gone",
        "spare returned",
        "spare forgotten",
        "TakeBack",
        "several places",
        "several places queued",
        "background queued",
    }
    assert {name for name in wanted if counts[name] < 5} == set()


def test_one_seed_gives_one_course() -> None:
    first, second = _run(3), _run(3)

    assert (first.steps, first.counts) == (second.steps, second.counts)
