"""What both sides of the comparison are given and give back. Standard library only.

The bare side runs in the engine's Python, which need not have anything of the suite's.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

PROMPT_FIRST_ID = 1000
_STRIDE = 7919


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How much is asked for.

    Attributes:
        streams: requests at the same time, one run for each number.
        input_tokens: of each prompt.
        output_tokens: of each output, exactly.
        rounds: requests of each stream, one after the other.
        vocabulary: token ids of prompts are below it.
    """

    streams: tuple[int, ...]
    input_tokens: int
    output_tokens: int
    rounds: int
    vocabulary: int

    def prompts(self, streams: int, stream: int) -> list[list[int]]:
        """Prompts of one stream of one run: no two of all begin alike, so no cache helps.

        Args:
            streams: of the run.
            stream: number of the stream in it, from 0.
        """
        # One more for warming up.
        return [
            self._prompt((streams * 1009 + stream) * (self.rounds + 1) + number)
            for number in range(self.rounds + 1)
        ]

    def _prompt(self, number: int) -> list[int]:
        first = min(PROMPT_FIRST_ID, self.vocabulary // 2)
        span = self.vocabulary - first
        # Its number, digit by digit, then what a small step makes of it.
        digits = [number % span, number // span % span]
        rest = ((number + place) * _STRIDE % span for place in range(self.input_tokens))
        return [first + token for token in (*digits, *rest)][: self.input_tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run came to.

    Attributes:
        streams: requests at the same time.
        tokens: of output, of all of them.
        seconds: from the first request to the last token.
        first_token_s: median time to the first token.
        failures: requests that failed, by reason.
    """

    streams: int
    tokens: int
    seconds: float
    first_token_s: float
    failures: dict[str, int]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all streams in a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one client process tells of its part of a run.

    Attributes:
        started_s: on the clock of the machine.
        ended_s: likewise.
        tokens: of output.
        firsts: seconds to each first token.
        failures: requests that failed, by reason.
    """

    started_s: float
    ended_s: float
    tokens: int
    firsts: list[float]
    failures: dict[str, int]


def together(streams: int, outcomes: Sequence[Outcome]) -> Run:
    """The whole run, of its clients' parts."""
    failures: dict[str, int] = {}
    for outcome in outcomes:
        for reason, count in outcome.failures.items():
            failures[reason] = failures.get(reason, 0) + count
    started_s = min(outcome.started_s for outcome in outcomes)
    return Run(
        streams=streams,
        tokens=sum(outcome.tokens for outcome in outcomes),
        seconds=max(outcome.ended_s for outcome in outcomes) - started_s,
        first_token_s=median([first for outcome in outcomes for first in outcome.firsts]),
        failures=failures,
    )


def median(values: Sequence[float]) -> float:
    """The middle one; 0 for none."""
    return statistics.median(values) if values else 0.0
