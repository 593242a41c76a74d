"""What billing has just refused, so that not each of many who wait asks in vain. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from libs.errors import MaasError


@dataclass(frozen=True, slots=True)
class Refusal:
    """What billing said last, and to which of our questions.

    Attributes:
        turn: number of the question.
        nanos: that were required.
        error: the answer.
    """

    turn: int
    nanos: int
    error: MaasError

    def repeat(self, turn: int, nanos: int) -> None:
        """Refuses what was refused a moment ago: by a question that began after this one had come.

        Args:
            turn: number of the last question when this one came.
            nanos: that it requires.

        Raises:
            MaasError: as billing did.
        """
        if self.turn <= turn or self.nanos > nanos:
            return
        error = self.error
        raise type(error)(
            error.message,
            reason=error.reason,
            metadata=error.metadata,
            violations=error.violations,
            retry_after_s=error.retry_after_s,
        )
