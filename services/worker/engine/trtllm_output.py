"""One output of TensorRT-LLM, read off a list that grows: what is new, what is shown, how it ended.

The list is of the whole output so far and changes in place, so there is a cursor of our own. It may
have shrunk at the end: nothing is taken back then, and nothing is told twice.

End and stop tokens are part of the list here (include_stop_str_in_output): the engine would cut
others along with them that have been told already. They are taken off here, whether or not the
engine has ended by them: with ignore_eos it knows no stop at all.

Pure: no asyncio, no tensorrt_llm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from services.worker.engine.base import Ended, EndReason, EngineRequest, Lane

_NOTHING: Final[Sequence[int]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Where an output ends.

    Attributes:
        lane: of the execution.
        room: most tokens that may still be told.
        drawn: most tokens that the engine may draw: one more under a constraint, so that an output
            that is complete with its last token has ended by itself.
        at_room: why it ends after `room`.
        end_ids: that end it by itself.
        stop_ids: that its request ends it by.
    """

    lane: Lane
    room: int
    drawn: int
    at_room: EndReason
    end_ids: frozenset[int]
    stop_ids: frozenset[int]


def bounds_of(
    lane: Lane, request: EngineRequest, *, context_length: int, end_ids: frozenset[int]
) -> Bounds:
    """Works out where an output ends.

    Args:
        lane: of the execution.
        request: of the execution.
        context_length: prompt and output together, tokens.
        end_ids: that end an output of this model.
    """
    most, reason = request.max_output_tokens, EndReason.MAX_TOKENS
    fits = context_length - len(request.prompt_ids)
    if most > fits:
        most, reason = fits, EndReason.CONTEXT_FULL
    # Under a constraint the end comes where nothing else may, however much output was asked for.
    ignores = request.ignore_eos and request.constraint is None
    room = max(0, most - len(request.continue_ids))
    has_more = request.constraint is not None and most < fits
    return Bounds(
        lane=lane,
        room=room,
        drawn=room + has_more,
        at_room=reason,
        end_ids=frozenset() if ignores else end_ids,
        stop_ids=request.stop_token_ids,
    )


class Output:
    """One output. Belongs to the event loop.

    Args:
        bounds: where it ends.
    """

    __slots__ = ("_bounds", "_cut", "_cuts", "_seen", "shown")

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._cuts = bounds.end_ids | bounds.stop_ids
        self._seen = 0
        self._cut: int | None = None
        self.shown = 0

    @property
    def is_cut(self) -> bool:
        """Whether it is through, even if the engine goes on."""
        return self._cut is not None

    @property
    def seen(self) -> int:
        """Tokens of the list that have been looked at."""
        return self._seen

    def take(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Looks at the list again.

        Args:
            token_ids: of the whole output.

        Returns:
            what is new and to be told; the first of them stands at `seen - len` before the call.
        """
        new = token_ids[self._seen :]
        if not new or self._cut is not None:
            return _NOTHING
        self._seen += len(new)
        if not self._cuts.isdisjoint(new):
            new = self._cut_off(new)
        left = self._bounds.room - self.shown
        if len(new) > left:
            new = new[:left]
        self.shown += len(new)
        return new

    def end(self, finish_reason: str | None, *, is_aborted: bool) -> Ended:
        """Says how it ended.

        Args:
            finish_reason: of the engine. None has been seen: then it ended as its length says, and
                one that is too short for any reason has failed.
            is_aborted: we asked the engine to stop, and told nothing since.
        """
        bounds = self._bounds
        if self._cut is not None:
            if self._cut in bounds.end_ids:
                return Ended(bounds.lane, EndReason.END_OF_SEQUENCE)
            return Ended(bounds.lane, EndReason.STOP_TOKEN, self._cut)
        reason = EndReason.ABORTED if is_aborted else self._reason_of(finish_reason)
        message = _why(finish_reason) if reason is EndReason.FAILED else ""
        return Ended(bounds.lane, reason, message=message)

    def _reason_of(self, finish_reason: str | None) -> EndReason:
        if finish_reason == "stop":
            return EndReason.END_OF_SEQUENCE
        if finish_reason in {"length", None} and self.shown >= self._bounds.room:
            return self._bounds.at_room
        # Where the engine calls it length before, it has less room than we were told.
        return EndReason.CONTEXT_FULL if finish_reason == "length" else EndReason.FAILED

    def _cut_off(self, new: Sequence[int]) -> Sequence[int]:
        at = next(place for place, token_id in enumerate(new) if token_id in self._cuts)
        self._cut = new[at]
        return new[:at]


def _why(finish_reason: str | None) -> str:
    if finish_reason is None:
        return "the engine ended it without saying why"
    known = {
        "timeout": "the engine gave up on it after too long a time",
        "cancelled": "the engine cancelled it",
    }
    return known.get(finish_reason, "the engine ended it for a reason that is not known here")
