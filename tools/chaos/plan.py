"""What is done to a suite and when: all of it follows from a seed. Pure.

A round strikes several processes and links within a moment, so that deaths meet recoveries and each
other. Then all is left alone until the work can be done again, and for a while longer: there has to
be work to lose.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from libs.failpoints import Action, Point, Rule
from tools.chaos.network import LASTING, Jam, Trouble

BACKEND = "backend"
"""One of PostgreSQL's processes for a connection: its death ends all sessions."""
GATEWAYS_WEIGHT = 5.0
_TARGETS = {
    "worker-1": 3.0,
    "worker-2": 3.0,
    "billing": 3.0,
    "scheduler": 2.0,
    "auth": 1.0,
    "catalog": 1.0,
    "postgres": 2.0,
    BACKEND: 3.0,
}
SPREAD_S = 1.0
"""From the first strike of a round to its last."""
STOP_SHARE = 0.12
STOP_S = (1.0, 5.0)
"""How long a process stands still."""
LONG_STOP_SHARE = 0.15
"""Of stops: longer than a lease and its grace."""
LONG_STOP_S = (9.0, 11.0)
LEASE_S, GRACE_S = 5.0, 3.0
"""Of slices in a campaign: a halt that outlasts both need not be long."""
JAMS_MAX = 4
"""Links in trouble, of a round, at most."""
JAM_S = (0.5, 4.0)
_AMOUNTS = {
    Trouble.DELAY: (10, 250),
    Trouble.HALF_CLOSE: (0, 1),
    Trouble.CUT: (0, 20_000),
    Trouble.NARROW: (2_000, 40_000),
}
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
_OFTEN = {Point.RELEASE_COUNTED}
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
        target: a process, or BACKEND.
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
        jams: of different links, all at its beginning.
        pause_s: seconds of work until the next round, once the work can be done.
    """

    strikes: tuple[Strike, ...]
    jams: tuple[Jam, ...]
    pause_s: float


def gateways(count: int) -> list[str]:
    """Names of the gateway processes."""
    return ["gateway", *(f"gateway-{number}" for number in range(2, count + 1))]


def workers() -> list[str]:
    """Names of the worker processes."""
    return [name for name in _TARGETS if name.startswith("worker")]


def targets(gateway_count: int) -> dict[str, float]:
    """Who is struck, and how often in relation to the others."""
    names = gateways(gateway_count)
    return {name: GATEWAYS_WEIGHT / len(names) for name in names} | _TARGETS


def links(gateway_count: int) -> dict[str, str]:
    """Every link that may fail, by its name, and the process that it leads to."""
    found = {f"gateways>{name}": name for name in workers()}
    found |= {f"{name}>scheduler": "scheduler" for name in workers()}
    for name in gateways(gateway_count):
        found[f"clients>{name}"] = name
        for service in ("billing", "scheduler"):
            found[f"{name}>{service}"] = service
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What there is to strike, and how hard.

    Attributes:
        targets: processes with their weights.
        links: names of links; none for a network without trouble.
        strikes_max: processes that are struck in a round; three quarters of it at least.
        pause_s: seconds of work between two rounds, on the average.
    """

    targets: Mapping[str, float]
    links: Sequence[str]
    strikes_max: int
    pause_s: float


def rounds(seed: int, ground: Ground) -> Iterator[Round]:
    """Draws rounds, without end.

    Args:
        seed: the same one gives the same rounds.
        ground: what there is to strike.
    """
    chance = random.Random(f"rounds {seed}")  # noqa: S311 - no secret
    while True:
        yield _round(chance, ground)


def _round(chance: random.Random, ground: Ground) -> Round:
    count = chance.randint(-(-3 * ground.strikes_max // 4), ground.strikes_max)
    # Each target draws its turn; the larger its weight, the earlier that tends to be.
    turns = {name: chance.expovariate(weight) for name, weight in ground.targets.items()}
    chosen = sorted(turns, key=turns.__getitem__)[:count]
    chance.shuffle(chosen)
    jammed = chance.sample(ground.links, min(len(ground.links), chance.randint(0, JAMS_MAX)))
    return Round(
        strikes=tuple(_strike(chance, name, SPREAD_S / count) for name in chosen),
        jams=tuple(_jam(chance, name) for name in jammed),
        pause_s=chance.uniform(0.5, 1.5) * ground.pause_s,
    )


def _strike(chance: random.Random, target: str, gap_s: float) -> Strike:
    means = Means.STOP if chance.random() < STOP_SHARE else Means.KILL
    span = LONG_STOP_S if chance.random() < LONG_STOP_SHARE else STOP_S
    return Strike(
        target=target,
        means=means,
        stop_s=chance.uniform(*span) if means is Means.STOP else 0.0,
        pick=chance.randrange(1 << 16),
        after_s=chance.uniform(0.0, 2 * gap_s),
    )


def _jam(chance: random.Random, link: str) -> Jam:
    trouble = chance.choice(list(Trouble))
    return Jam(
        link=link,
        trouble=trouble,
        seconds=chance.uniform(*JAM_S) if trouble in LASTING else 0.0,
        amount=chance.randint(*_AMOUNTS.get(trouble, (0, 0))),
    )


def rules(seed: int, name: str, points: Sequence[Point]) -> list[Rule]:
    """Draws at which passage a process of this name kills itself at each point."""
    chance = random.Random(f"rules {seed} {name}")  # noqa: S311 - no secret
    return [Rule(point, Action.KILL, _passage(chance, point)) for point in points]


def _passage(chance: random.Random, point: Point) -> int:
    if point in _ONCE_A_LIFE:
        return 1
    return chance.randint(1, _PASSAGES_OFTEN if point in _OFTEN else _PASSAGES_SELDOM)
