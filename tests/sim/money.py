"""Runs the simulation of money for many seeds:

python -m tests.sim.money --seeds 10000

SEED=17 python -m tests.sim.money    # one seed again, exactly as it was
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from tests.sim.money_world import World

# Journals are small and many: in memory where there is one.
_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of its own is made in it
_CHUNK = 20


def folder() -> AbstractContextManager[str]:
    """Makes a folder for journals, for as long as its block runs."""
    return tempfile.TemporaryDirectory(
        prefix="maas-sim-", dir=_MEMORY if _MEMORY.is_dir() else None
    )


def run(seed: int) -> World:
    """Runs one seed.

    Raises:
        AssertionError: something does not hold; says the seed.
    """
    with folder() as journals:
        world = World(seed, Path(journals))
        world.run()
    return world


def _outcome(seed: int) -> tuple[Counter[str], str]:
    try:
        return run(seed).counts, ""
    except AssertionError as error:
        return Counter(), str(error)


def main() -> int:
    """Runs what the command line says; returns 1 when a seed has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--first", type=int, default=0, help="the first one (0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    only = os.environ.get("SEED")  # noqa: TID251 - as every seeded test of the suite takes it
    if only is not None:
        seeds = range(int(only), int(only) + 1)
    else:
        seeds = range(arguments.first, arguments.first + arguments.seeds)
    counts: Counter[str] = Counter()
    failed = 0
    begun_s = time.perf_counter()
    with ProcessPoolExecutor(arguments.processes) as pool:
        for happened, problem in pool.map(_outcome, seeds, chunksize=_CHUNK):
            counts.update(happened)
            if problem:
                failed += 1
                sys.stdout.write(f"{problem}\n")
    lasted_s = time.perf_counter() - begun_s
    for what, count in counts.most_common():
        sys.stdout.write(f"{count:10,} {what}\n")
    sys.stdout.write(
        f"{len(seeds):,} seeds, {failed} failed, {lasted_s:.0f} s, "
        f"{len(seeds) / lasted_s:.0f} seeds/s\n"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
