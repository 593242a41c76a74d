"""How much of the engine's time each output takes. Pure but for the clock that it is given.

At every moment that the engine works, its time is divided by the outputs that are in its batch. A
counter V grows by dt / outputs, whoever they are, and an output has taken V(end) - V(start): so
nothing is done for a step or a token, and the shares of all outputs sum to the time in which there
was work. While there is none nobody is charged.

The engine takes outputs into its batch in the order in which they were submitted, as many as it
runs; those that wait behind them take no time. A call to embed counts as one output while the
engine works on its inputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from libs.clock import Clock
from services.worker import metrics


@dataclass(slots=True)
class Took:
    """What a call took.

    Attributes:
        seconds: of the engine; 0 until the call is over.
    """

    seconds: float = 0.0


class EngineTime:
    """Shares of one engine's time. Belongs to one event loop; every call is O(1)."""

    def __init__(self, clock: Clock, most: int) -> None:
        """Starts idle.

        Args:
            clock: time.
            most: outputs that the engine has in its batch at the same time.
        """
        self._clock = clock
        self._most = most
        # Of those in the batch: the counter when they came into it.
        self._running: dict[Hashable, float] = {}
        self._waiting: dict[Hashable, None] = {}
        self._share_s = 0.0
        self._since_s = 0.0

    def enter(self, lane: Hashable) -> None:
        """An output was submitted.

        Args:
            lane: of the engine; for what has none whatever is not in use as one.
        """
        self._advance()
        if len(self._running) < self._most:
            self._running[lane] = self._share_s
        else:
            self._waiting[lane] = None

    @contextmanager
    def passing(self, name: str) -> Iterator[Took]:
        """Counts a call in for the block.

        Args:
            name: of the call; no other has it meanwhile.
        """
        took = Took()
        self.enter(name)
        try:
            yield took
        finally:
            took.seconds = self.leave(name)

    def leave(self, lane: Hashable) -> float:
        """An output has ended, or was stopped; returns the seconds that it took.

        One that is not known, or has left before, took nothing.
        """
        self._advance()
        start_s = self._running.pop(lane, None)
        if start_s is None:
            self._waiting.pop(lane, None)
            return 0.0
        if self._waiting:
            following = next(iter(self._waiting))
            del self._waiting[following]
            self._running[following] = self._share_s
        return self._share_s - start_s

    def _advance(self) -> None:
        now_s = self._clock.monotonic_s()
        if self._running:
            elapsed_s = now_s - self._since_s
            self._share_s += elapsed_s / len(self._running)
            metrics.ENGINE_BUSY.inc(elapsed_s)
        else:
            # From the beginning, as a counter that has grown large is less exact.
            self._share_s = 0.0
        self._since_s = now_s
