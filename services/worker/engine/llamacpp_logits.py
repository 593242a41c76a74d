"""What changes one lane's logits before the llamacpp engine draws a token from them.

In this order, which is vLLM's:

1. logit_bias is added;
2. repetition_penalty divides positive and multiplies negative logits of tokens in prompt or output;
3. frequency_penalty (times its count) and presence_penalty are taken from tokens in the output;
4. min_output_tokens: too early, the tokens that end a generation get minus infinity;
5. the constraint: what may not come next gets minus infinity.

Output positions that another worker produced count as output. Lanes that ask for none of this have
no LogitRules and pay nothing; what a lane gets depends on that lane alone.

Pure: no clock, no ctypes.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import EngineRequest, Sampling
from services.worker.engine.matcher import MatcherError

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_NEVER: Final = np.float32(-np.inf)


class OutputMatcher(Protocol):
    """One output under a constraint; matcher.Matcher is one."""

    def mask(self) -> Mask:
        """Which tokens may come next; those that end a generation where it may end."""
        ...

    def accept(self, token_id: int) -> None:
        """Takes the next token."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether nothing but the end may follow."""
        ...


def changes_logits(request: EngineRequest) -> bool:
    """Whether a request needs LogitRules."""
    return (
        request.constraint is not None
        or request.min_output_tokens > len(request.continue_ids)
        or bool(request.sampling.logit_bias)
        or _has_penalties(request.sampling)
    )


class LogitRules:
    """The rules of one lane, and what they have to remember of its output.

    Args:
        request: of the lane.
        is_end: shape (vocabulary,): tokens that end a generation.
        matcher: of its constraint, at the beginning of the output; None without one.

    Raises:
        MatcherError: what was produced elsewhere does not fit the constraint.
    """

    def __init__(self, request: EngineRequest, is_end: Mask, matcher: OutputMatcher | None) -> None:
        sampling = request.sampling
        self._is_end = is_end
        self._matcher = matcher
        self._ignores_end = request.ignore_eos
        self._least_outputs = request.min_output_tokens
        self._bias_ids = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        self._penalties = (
            _Penalties(request, len(is_end)) if _has_penalties(request.sampling) else None
        )
        for token_id in request.continue_ids:
            self.take(token_id)

    @property
    def is_constrained(self) -> bool:
        """Whether there is a constraint, under which an end token always ends the lane."""
        return self._matcher is not None

    @property
    def is_over(self) -> bool:
        """Whether the constraint lets nothing but the end follow."""
        return self._matcher is not None and self._matcher.is_over

    def apply(self, logits: Floats, outputs: int) -> None:
        """Changes one row of logits in place.

        Args:
            logits: float32, shape (vocabulary,).
            outputs: output tokens so far.

        Raises:
            MatcherError: nothing may come next, or finding out what may takes too long.
        """
        if self._bias_ids.size:
            logits[self._bias_ids] += self._bias
        if self._penalties is not None:
            self._penalties.apply(logits)
        hides_end = outputs < self._least_outputs
        if self._matcher is not None:
            logits[~self._allowed(self._matcher, hides_end=hides_end)] = _NEVER
        elif hides_end:
            logits[self._is_end] = _NEVER

    def take(self, token_id: int) -> None:
        """Takes note of an output token.

        Raises:
            MatcherError: the constraint does not allow it.
        """
        if self._penalties is not None:
            self._penalties.take(token_id)
        if self._matcher is None:
            return
        try:
            self._matcher.accept(token_id)
        except MatcherError:
            # Its words name the token, which is output.
            raise MatcherError("an output token does not fit the constraint") from None

    def _allowed(self, matcher: OutputMatcher, *, hides_end: bool) -> Mask:
        allowed = matcher.mask()
        if hides_end or self._ignores_end:
            # Where only the end is left, it comes, however much output was asked for.
            others = allowed & ~self._is_end
            if others.any():
                return others
        return allowed


class _Penalties:
    """Tokens that were seen, as columns that grow with each new one."""

    def __init__(self, request: EngineRequest, vocabulary_size: int) -> None:
        sampling = request.sampling
        self._repetition = np.float32(sampling.repetition_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        prompt = np.unique(np.array(request.prompt_ids, np.int64))
        most = min(request.max_output_tokens, vocabulary_size)
        # Of the output.
        self._place_of: dict[int, int] = {}
        self._ids = np.zeros(most, np.int64)
        self._counts = np.zeros(most, np.float32)
        # Of prompt and output together.
        self._seen = set(prompt.tolist())
        self._seen_ids = np.concatenate([prompt, np.zeros(most, np.int64)])
        self._seen_count = len(prompt)

    def apply(self, logits: Floats) -> None:
        if self._repetition != 1:
            ids = self._seen_ids[: self._seen_count]
            values = logits[ids]
            logits[ids] = np.where(values > 0, values / self._repetition, values * self._repetition)
        count = len(self._place_of)
        logits[self._ids[:count]] -= self._counts[:count] * self._frequency + self._presence

    def take(self, token_id: int) -> None:
        place = self._place_of.get(token_id)
        if place is not None:
            self._counts[place] += 1
            return
        place = len(self._place_of)
        self._place_of[token_id] = place
        self._ids[place] = token_id
        self._counts[place] = 1
        if token_id not in self._seen:
            self._seen.add(token_id)
            self._seen_ids[self._seen_count] = token_id
            self._seen_count += 1


def _has_penalties(sampling: Sampling) -> bool:
    return (
        sampling.repetition_penalty != 1
        or sampling.frequency_penalty != 0
        or sampling.presence_penalty != 0
    )


__all__ = ["LogitRules", "MatcherError", "OutputMatcher", "changes_logits"]
