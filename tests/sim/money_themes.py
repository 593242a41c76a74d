"""What a seed is about: the same world, with more of some faults than of others."""

from __future__ import annotations

from dataclasses import dataclass, field

ALL_KINDS = (
    "kill",
    "kill at a point",
    "power loss",
    "halt",
    "cut",
    "loss",
    "billing away",
    "billing restart",
    "full disk",
    "worker",
    "clock",
    "stop",
)
DEATHS = ("kill", "kill", "kill at a point", "kill at a point", "stop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """What is drawn from.

    Attributes:
        name: for tests.
        kinds: of faults.
        faults: how many.
        requests: how many, from and to.
        span_s: seconds in which they come, and as much longer as the faults last.
        limited_shares: of requests, those of the organization with rate limits.
        credits: nanos of each organization: from not enough for all up to plenty.
        slices: nanos of a slice.
        long_share: of outages, those of about a lease and its grace.
        again_share: of gateways that have started, those that die soon again.
        is_lossy: messages are lost all the time.
    """

    name: str
    kinds: tuple[str, ...] = ALL_KINDS
    faults: tuple[int, ...] = (1, 2, 3, 4)
    requests: tuple[int, int] = (8, 14)
    span_s: float = 6.0
    limited_shares: tuple[float, ...] = (0.0, 0.3, 0.3, 0.9)
    credits: tuple[int, ...] = field(default=(150, 300, 600, 10_000))
    slices: tuple[int, ...] = (100, 300, 3000)
    long_share: float = 0.2
    again_share: float = 0.3
    is_lossy: bool = False


THEMES = (
    Theme(name="everything"),
    Theme(
        name="deaths",
        kinds=DEATHS,
        faults=(5, 8),
        requests=(14, 20),
        limited_shares=(0.0,),
        credits=(600, 10_000),
        long_share=0.05,
        again_share=0.6,
    ),
    Theme(
        name="lost messages",
        kinds=(*DEATHS, "billing restart", "halt", "cut"),
        faults=(1, 3, 5),
        requests=(12, 18),
        limited_shares=(0.0, 0.3),
        credits=(200, 400, 10_000),
        slices=(100,),
        long_share=0.1,
        is_lossy=True,
    ),
    Theme(
        name="outages",
        kinds=("cut", "billing away", "halt"),
        faults=(1, 2),
        requests=(16, 24),
        span_s=4.0,
        limited_shares=(0.0,),
        credits=(10_000,),
        slices=(3000,),
        long_share=0.8,
    ),
    Theme(
        name="crowds",
        kinds=("kill", "worker", "clock"),
        faults=(0, 1),
        requests=(28, 36),
        span_s=1.5,
        limited_shares=(1.0,),
        credits=(10_000,),
    ),
    Theme(
        name="near the floor",
        kinds=("kill", "stop", "billing restart", "worker"),
        faults=(0, 1, 2),
        requests=(16, 24),
        span_s=2.0,
        limited_shares=(0.5,),
        credits=(120, 200, 350),
    ),
    Theme(
        name="lost messages near the floor",
        kinds=("billing restart", "stop"),
        faults=(0, 1),
        requests=(20, 28),
        span_s=4.0,
        limited_shares=(0.0,),
        credits=(100, 150, 200),
        slices=(100,),
        is_lossy=True,
    ),
)


def theme_of(seed: int) -> Theme:
    """Returns what a seed is about."""
    return THEMES[seed % len(THEMES)]


def seeds_of(name: str, count: int) -> list[int]:
    """Returns the first seeds that are about something."""
    start = next(number for number, theme in enumerate(THEMES) if theme.name == name)
    return [start + len(THEMES) * number for number in range(count)]
