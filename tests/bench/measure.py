"""What one measurement gives, and how several become one."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Measurement:
    """One load, once.

    Attributes:
        tokens: output tokens of all streams.
        seconds: from the first request until the last end.
        first_token_s: median over the streams, from the request until the first token.
    """

    tokens: int
    seconds: float
    first_token_s: float

    @property
    def tokens_per_s(self) -> float:
        """Throughput of all streams together."""
        return self.tokens / self.seconds

    def to_json(self) -> str:
        """Writes it as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """Reads what `to_json` wrote."""
        return cls(**json.loads(text))


def median_of(measurements: list[Measurement]) -> tuple[float, float]:
    """Returns the medians of tokens per second and of seconds to the first token."""
    return (
        statistics.median(item.tokens_per_s for item in measurements),
        statistics.median(item.first_token_s for item in measurements),
    )
