"""How fast something is taken, and so how much of it is worth asking for at once. Pure.

Time is cut into periods. Of credit, a slice is to last for two of them, so that the next one is
there before it is spent. In the first period of a burst the rate is not known yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class _Period:
    """What was taken in one period: the sum, and the most at once."""

    total: int = 0
    largest: int = 0


@dataclass(slots=True)
class Demand:
    """The demand for one thing: credit of a purse, quota of a limit. Times are monotonic seconds.

    Attributes:
        period_s: length of a refill period.
    """

    period_s: float
    _started_s: float = float("-inf")
    _now: _Period = field(default_factory=_Period)
    _before: _Period = field(default_factory=_Period)

    def note(self, taken: int, now_s: float) -> None:
        """Counts what was taken for a request."""
        self._turn(now_s)
        self._now.total += taken
        self._now.largest = max(self._now.largest, taken)

    def size(self, at_most: int, now_s: float) -> int:
        """Returns the nanos that a slice should have; 0 as long as that is not known.

        At least the largest recent hold, and twice what a period takes; at most a bound.

        Args:
            at_most: the bound, nanos.
            now_s: time.
        """
        spent = self.recent(now_s)
        if not spent:
            return 0
        largest = max(self._now.largest, self._before.largest)
        return min(max(2 * spent, largest), at_most)

    def so_far(self, now_s: float) -> int:
        """Returns what was taken in the period that runs."""
        self._turn(now_s)
        return self._now.total

    def recent(self, now_s: float) -> int:
        """Returns what a period takes; 0 as long as that is not known."""
        self._turn(now_s)
        return max(self._now.total, self._before.total) if self._before.total else 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing was counted in this period and the one before."""
        return not (self._now.total or self._before.total)

    def _turn(self, now_s: float) -> None:
        """Begins a new period when it is time. What is older than the last one is forgotten."""
        since_s = now_s - self._started_s
        if since_s < self.period_s:
            return
        self._before = self._now if since_s < 2 * self.period_s else _Period()
        self._now = _Period()
        self._started_s = now_s
