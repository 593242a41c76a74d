"""Constraints that are followed from outside: what may come next, token by token.

TensorRT-LLM begins a constraint with the first token that it draws. An output that was begun
elsewhere has to go on in the middle of its constraint, so there the engine draws one token at a
time without one, and what may not come is kept away by a bias. That is slow, and exact; it is done
for executions that lost their worker, and for no others.

With the llguidance that TensorRT-LLM brings along. Belongs to one thread at a time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol, cast

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import EngineRequest
from services.worker.engine.trtllm_guided import ConstraintUnusable

Mask = npt.NDArray[np.bool_]

_SEED_STEP: Final = 0x9E3779B97F4A7C15
_SEED_MASK: Final = 2**64 - 1
_CANNOT: Final = "an output under a constraint cannot be continued with this engine"


class LibraryMatcher(Protocol):
    """What is used of llguidance.LLMatcher."""

    def try_consume_tokens(self, tokens: list[int]) -> int:
        """Takes as many of these as fit; returns how many."""
        ...

    def is_error(self) -> bool:
        """Whether it cannot go on."""
        ...

    def is_stopped(self) -> bool:
        """Whether nothing but the end may follow."""
        ...


Bits = npt.NDArray[np.int32]
Fill = Callable[[LibraryMatcher, Bits, int], None]


class Walker:
    """One output on its way through its constraint.

    Args:
        matcher: at the beginning of it.
        fill: writes which tokens may come.
        size: of the vocabulary.
        end_id: token that ends an output.
        taken: tokens of the output so far.

    Raises:
        ConstraintUnusable: these do not fit.
    """

    def __init__(
        self, matcher: LibraryMatcher, fill: Fill, *, size: int, end_id: int, taken: Sequence[int]
    ) -> None:
        self._matcher = matcher
        self._fill = fill
        self._size = size
        self._end_id = end_id
        self._bits: Bits = np.zeros((1, -(-size // 32)), np.int32)
        for token_id in taken:
            self.take(token_id)

    def take(self, token_id: int) -> None:
        """Takes the next token.

        Raises:
            ConstraintUnusable: it does not fit.
        """
        if self._matcher.try_consume_tokens([token_id]) != 1 or self._matcher.is_error():
            # Says neither which token nor which constraint: both are a tenant's.
            raise ConstraintUnusable("the output so far does not fit its constraint")

    def allowed(self, *, keeps_on: bool) -> Mask | None:
        """Says what may come; None where only the end may.

        Args:
            keeps_on: no end, as long as anything else may come.

        Raises:
            ConstraintUnusable: nothing may come.
        """
        if self._matcher.is_stopped():
            return None
        self._fill(self._matcher, self._bits, 0)
        bits = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little", count=self._size)
        mask: Mask = bits.astype(np.bool_)
        may_end = bool(mask[self._end_id])
        mask[self._end_id] = False
        if not mask.any():
            if may_end:
                return None
            raise ConstraintUnusable("nothing may follow under the constraint")
        mask[self._end_id] = may_end and not keeps_on
        return mask


class Walks:
    """Makes walkers over the vocabulary of one model.

    Args:
        directory: of the model.
        size: of its vocabulary.
        end_id: token that ends an output, as its tokenizer calls it.
    """

    def __init__(self, directory: Path, *, size: int, end_id: int) -> None:
        self._directory = directory
        self._size = size
        self._end_id = end_id
        self._tokenizer: object = None

    def begin(self, request: EngineRequest) -> Walker:
        """Begins behind the output that a request continues. The first time takes up to a second.

        Raises:
            ConstraintUnusable: that output does not fit the constraint, or there is no library.
        """
        constraint = request.constraint
        try:
            library = importlib.import_module("llguidance")
            fill = importlib.import_module("llguidance.numpy").fill_next_token_bitmask
            if self._tokenizer is None:
                text = (self._directory / "tokenizer.json").read_text("utf-8")
                self._tokenizer = library.LLTokenizer(
                    text, n_vocab=self._size, eos_token=self._end_id
                )
            grammar = "" if constraint is None else constraint.grammar
            matcher = cast(
                "LibraryMatcher", library.LLMatcher(self._tokenizer, grammar, log_level=0)
            )
        except (ImportError, AttributeError, OSError, ValueError, TypeError) as error:
            raise ConstraintUnusable(_CANNOT) from error
        if matcher.is_error():
            raise ConstraintUnusable("the constraint does not compile in the engine")
        return Walker(
            matcher,
            cast("Fill", fill),
            size=self._size,
            end_id=self._end_id,
            taken=request.continue_ids,
        )


def step_of(request: EngineRequest, drawn: Sequence[int]) -> EngineRequest:
    """Returns the request for one more token: without its constraint, and with a seed of its own.

    Args:
        request: of the execution.
        drawn: tokens that have been drawn here.
    """
    seed = (request.sampling.seed + _SEED_STEP * (len(drawn) + 1)) & _SEED_MASK
    return replace(
        request,
        continue_ids=(*request.continue_ids, *drawn),
        sampling=replace(request.sampling, seed=seed),
        constraint=None,
        ignore_eos=False,
        min_output_tokens=0,
        stop_texts=(),
    )
