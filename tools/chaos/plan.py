"""What is done to a suite and when: all of it follows from a seed. Pure.

A round strikes several processes within a moment, so that deaths meet recoveries and each other.
Then all is left alone until it is well, and for a while longer: there has to be work to lose.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from libs.failpoints import Action, Point, Rule

BACKEND = "backend"
"""One of PostgreSQL's processes for a connection: its death ends all sessions."""
TARGETS = {
    "gateway": 3,
    "worker-1": 3,
    "worker-2": 3,
    "billing": 3,
    "scheduler": 2,
    "auth": 1,
    "catalog": 1,
    "postgres": 2,
    BACKEND: 3,
}
"""Who is struck, and how often in relation to the others."""
SPREAD_S = 1.0
"""From the first strike of a round to its last."""
STOP_SHARE = 0.12
STOP_S = (1.0, 5.0)
"""How long a process stands still."""
GATEWAY_POINTS = (
    Point.SLICE_NOTED,
    Point.SLICE_ANSWERED,
    Point.JOURNAL_OPENED,
    Point.RELEASE_COUNTED,
    Point.JOURNAL_CLOSED,
    Point.SETTLE_ANSWERED,
    Point.SLICES_CLOSING,
    Point.SLICES_CLOSED,
    Point.REPLAY_READ,
    Point.REPLAY_SETTLED,
)
BILLING_POINTS = (
    Point.GRANT_WRITTEN,
    Point.SETTLE_WRITTEN,
    Point.SETTLE_COMMITTED,
    Point.CLOSE_WRITTEN,
    Point.CLOSE_COMMITTED,
)
_ONCE_A_LIFE = {Point.REPLAY_READ, Point.REPLAY_SETTLED}
_OFTEN = {Point.RELEASE_COUNTED, Point.JOURNAL_OPENED, Point.JOURNAL_CLOSED}
_PASSAGES_OFTEN = 60
_PASSAGES_SELDOM = 6


class Means(enum.Enum):
    """How a process is struck."""

    KILL = "kill"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Strike:
    """What happens to one process.

    Attributes:
        target: one of TARGETS.
        means: how.
        stop_s: seconds until it goes on; 0 for a kill.
        pick: number that chooses among several processes of the target.
        after_s: seconds since the strike before it.
    """

    target: str
    means: Means
    stop_s: float
    pick: int
    after_s: float


@dataclass(frozen=True, slots=True)
class Round:
    """Strikes of one moment.

    Attributes:
        strikes: at different targets, in order.
        pause_s: seconds of work until the next round, once all is well.
    """

    strikes: tuple[Strike, ...]
    pause_s: float


def rounds(seed: int, strikes_max: int, pause_s: float) -> Iterator[Round]:
    """Draws rounds, without end.

    Args:
        seed: the same one gives the same rounds.
        strikes_max: of a round; three quarters of it at least.
        pause_s: seconds of work between two rounds, on the average.
    """
    chance = random.Random(f"rounds {seed}")  # noqa: S311 - no secret
    while True:
        yield _round(chance, strikes_max, pause_s)


def _round(chance: random.Random, strikes_max: int, pause_s: float) -> Round:
    count = chance.randint(-(-3 * strikes_max // 4), strikes_max)
    # Each target draws its turn; the larger its weight, the earlier that tends to be.
    turns = {name: chance.expovariate(weight) for name, weight in TARGETS.items()}
    chosen = sorted(turns, key=turns.__getitem__)[:count]
    chance.shuffle(chosen)
    return Round(
        strikes=tuple(_strike(chance, name, SPREAD_S / count) for name in chosen),
        pause_s=chance.uniform(0.5, 1.5) * pause_s,
    )


def _strike(chance: random.Random, target: str, gap_s: float) -> Strike:
    means = Means.STOP if chance.random() < STOP_SHARE else Means.KILL
    return Strike(
        target=target,
        means=means,
        stop_s=chance.uniform(*STOP_S) if means is Means.STOP else 0.0,
        pick=chance.randrange(1 << 16),
        after_s=chance.uniform(0.0, 2 * gap_s),
    )


def rules(seed: int, points: Sequence[Point]) -> list[Rule]:
    """Draws at which passage a process kills itself at each point."""
    chance = random.Random(f"rules {seed}")  # noqa: S311 - no secret
    return [Rule(point, Action.KILL, _passage(chance, point)) for point in points]


def _passage(chance: random.Random, point: Point) -> int:
    if point in _ONCE_A_LIFE:
        return 1
    return chance.randint(1, _PASSAGES_OFTEN if point in _OFTEN else _PASSAGES_SELDOM)
