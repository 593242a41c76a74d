"""What workers say a generation took of their engines, summed over outputs and attempts."""

from __future__ import annotations

from dataclasses import dataclass

# No generation takes that long, about eleven days: billing refuses more, and then nobody would
# ever pay.
ENGINE_TIME_MAX_NS = 10**15


@dataclass(slots=True)
class Meter:
    """Engine time of one generation, or of one call. Belongs to one event loop.

    A worker that is told to stop says what it took a moment after the generation's end, so whoever
    needs the sum reads it as late as possible.

    Attributes:
        engine_time_ns: nanoseconds so far.
    """

    engine_time_ns: int = 0

    def add(self, engine_time_ns: int) -> None:
        """Adds what one output took on one worker: what it says is cut to what can be."""
        took = self.engine_time_ns + max(engine_time_ns, 0)
        self.engine_time_ns = min(took, ENGINE_TIME_MAX_NS)
