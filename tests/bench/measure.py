"""What is computed of what was measured. Pure: no clock, no process, no file."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


def quantile(values: Sequence[float], share: float) -> float:
    """Returns the value that `share` of all values do not exceed, between neighbours linearly.

    Args:
        values: at least one.
        share: 0 for the smallest, 0.5 for the median, 1 for the largest.
    """
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def added(whole: Sequence[float], bare: Sequence[float], share: float) -> float:
    """Returns the difference of two distributions' quantiles.

    Not the quantile of differences: a request through the suite and its twin on the bare engine
    meet different moments of the engine's step, so their difference tells more of the step than
    of the suite.
    """
    return quantile(whole, share) - quantile(bare, share)


def arrivals(count: int, per_s: float, seed: int) -> list[float]:
    """Draws moments of arrival, seconds from the start, as independent callers make them.

    The mean distance is that of the rate; equal seeds give equal moments.
    """
    chance = random.Random(seed)  # noqa: S311 - a load, not a secret
    moments = []
    now = 0.0
    for _ in range(count):
        now += chance.expovariate(per_s)
        moments.append(now)
    return moments


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Returns the slope of the straight line with the least squares of distances.

    Args:
        points: x and y, with two different x at least.
    """
    mean_x = statistics.fmean(x for x, _ in points)
    mean_y = statistics.fmean(y for _, y in points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def middle(items: Sequence[Item], key: Callable[[Item], float]) -> Item:
    """Returns the item whose key is the median; of two in the middle the lower.

    For figures that have to fit together, which medians of each of them would not.
    """
    return sorted(items, key=key)[(len(items) - 1) // 2]


@dataclass(frozen=True, slots=True)
class Fairness:
    """How evenly streams were served while all of them ran.

    Attributes:
        begun: streams that had their first token when the watch began.
        begin_s: how long it took until they had.
        seconds: how long they were watched.
        tokens: of all streams while they were watched.
        frames: likewise.
        least_tokens: of the stream that got the fewest.
        most_tokens: of the stream that got the most.
        longest_s: longest time that any stream waited for its next frame.
    """

    begun: int
    begin_s: float
    seconds: float
    tokens: int
    frames: int
    least_tokens: int
    most_tokens: int
    longest_s: float
