"""What a pitfall of TensorRT-LLM is, to its test."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.integration.services.worker.engine.trtllm_habits import Habit
from tests.integration.services.worker.engine.trtllm_subjects import Bench

Check = Callable[[Bench], Awaitable[None]]
HANGS = "TimeoutError"


@dataclass(frozen=True, slots=True)
class Pitfall:
    """One thing that TensorRT-LLM does otherwise than one would think.

    Attributes:
        name: of its check.
        sentence: what it does.
        habit: with which the naive adapter falls into it.
        fails: pattern of how it fails then: type and words of the error.
        check: states what an adapter makes of it.
    """

    name: str
    sentence: str
    habit: Habit
    fails: str
    check: Check


class Pitfalls(list[Pitfall]):
    """Pitfalls in order."""

    def add(
        self, sentence: str, *, habit: Habit = Habit.NONE, fails: str = "AssertionError"
    ) -> Callable[[Check], Check]:
        """Adds one with the check that follows; see Pitfall."""

        def take(check: Check) -> Check:
            self.append(Pitfall(check.__name__, sentence, habit, fails, check))
            return check

        return take
