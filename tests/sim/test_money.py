"""The money of gateways and billing among random faults. One seed reproduces everything:

SEED=17 python -m tests.sim.money
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.sim.money import run
from tests.sim.money_mutations import MUTATIONS, Mutation
from tests.sim.money_races import Race
from tests.sim.money_themes import THEMES, seeds_of

# python -m tests.sim.money runs as many as there is time for.
SEEDS = 60
BATCH = 12
# A defect of the list is found by so many seeds that are about such things.
MUTATION_SEEDS = 200


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_whatever_happens_bills_are_what_was_received_and_nothing_stays_held(first: int) -> None:
    """Claims at every moment are in money_billing.py, those at the end in money_checks.py."""
    for seed in range(first, first + BATCH):
        run(seed)


def test_the_world_is_worth_the_name() -> None:
    """What the claims are about does happen, in a few seeds already."""
    counts: Counter[str] = Counter()
    for seed in range(len(THEMES) * 3):
        counts.update(run(seed).counts)

    wanted = {
        "clean",
        "cut and charged",
        "free",
        "receipt",
        "repeated by the client",
        "request lost",
        "request late",
        "answer lost",
        "retry",
        "kill",
        "kill at a point",
        "died again",
        "stop",
        "halt",
        "cut off",
    }
    assert {name for name in wanted if not counts[name]} == set()


def test_one_seed_gives_one_course() -> None:
    first, second = run(1), run(1)

    assert first.rng.getstate() == second.rng.getstate()
    assert first.counts == second.counts
    assert first.billing.records == second.billing.records


@pytest.mark.parametrize("affordable", [1, 7, 40, 100])
@pytest.mark.parametrize("seed", range(3))
def test_of_256_racers_as_many_are_admitted_as_there_is_credit_for(
    affordable: int, seed: int, tmp_path: Path
) -> None:
    race = Race(seed, tmp_path, affordable)
    race.run()

    assert race.admitted == affordable


@pytest.mark.parametrize(("theme", "mutation"), MUTATIONS.values(), ids=MUTATIONS)
def test_the_simulation_finds(theme: str, mutation: Mutation) -> None:
    def run_all() -> None:
        for seed in seeds_of(theme, MUTATION_SEEDS):
            run(seed)

    with mutation(), pytest.raises(AssertionError, match="SEED="):
        run_all()
