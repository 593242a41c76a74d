"""Lanes of the llamacpp engine that wait for a slot, and the compiling of their constraints.

Lanes go first come, first served, those that are in the background behind all others. One that
cannot go yet (its constraint is being compiled, its adapter has no room) is passed by the others
and keeps its place.

Compiling a grammar takes up to some hundred milliseconds. It is done on a thread of its own, so
that no other lane waits for it.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.worker.engine.base import EngineRequest, Lane
from services.worker.engine.llamacpp_logits import MatcherError, OutputMatcher

Compile = Callable[[str], OutputMatcher]
"""Compiles a grammar for one output; raises matcher.MatcherError."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A lane that waits.

    Attributes:
        lane: its name.
        request: what it asks for.
        compiling: its constraint; None without one.
    """

    lane: Lane
    request: EngineRequest
    compiling: concurrent.futures.Future[OutputMatcher] | None

    @property
    def tokens(self) -> int:
        """Tokens to prefill."""
        return len(self.request.prompt_ids) + len(self.request.continue_ids)

    def matcher(self) -> OutputMatcher:
        """The compiled constraint; there has to be one.

        Raises:
            MatcherError: it could not be compiled, for whatever reason: that ends this lane, and
                not the process with all others.
        """
        assert self.compiling is not None
        error = self.compiling.exception()
        if error is None:
            return self.compiling.result()
        if isinstance(error, MatcherError):
            raise error
        # Of other errors the text may show what somebody wrote.
        raise MatcherError(f"the constraint cannot be compiled: {type(error).__name__}")


class WaitingQueue:
    """The lanes that wait.

    Args:
        compile_grammar: called on a thread of its own, one grammar at a time; None when there are
            no constraints.

    Attributes:
        tokens: to prefill, of all lanes.
    """

    def __init__(self, compile_grammar: Compile | None) -> None:
        self._compile = compile_grammar
        self._compiler: concurrent.futures.ThreadPoolExecutor | None = None
        # In order of arrival.
        self._first: dict[Lane, Waiting] = {}
        self._behind: dict[Lane, Waiting] = {}
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._first) + len(self._behind)

    def __iter__(self) -> Iterator[Waiting]:
        """In the order in which they go; the queue may be changed meanwhile."""
        yield from [*self._first.values(), *self._behind.values()]

    def add(self, lane: Lane, request: EngineRequest) -> None:
        """Puts a lane at the end of its queue."""
        waiting = Waiting(lane, request, self._start_compiling(request))
        (self._behind if request.is_background else self._first)[lane] = waiting
        self.tokens += waiting.tokens

    def remove(self, lane: Lane) -> bool:
        """Takes a lane out; False when it is not here."""
        waiting = self._first.pop(lane, None) or self._behind.pop(lane, None)
        if waiting is None:
            return False
        self.tokens -= waiting.tokens
        if waiting.compiling is not None:
            waiting.compiling.cancel()
        return True

    def wait_for_compiler(self, within_s: float) -> None:
        """Waits until some constraint is compiled, for a bounded time; at once without any."""
        running = [waiting.compiling for waiting in self if waiting.compiling is not None]
        if running:
            concurrent.futures.wait(
                running, timeout=within_s, return_when=concurrent.futures.FIRST_COMPLETED
            )

    def _start_compiling(
        self, request: EngineRequest
    ) -> concurrent.futures.Future[OutputMatcher] | None:
        if request.constraint is None or self._compile is None:
            return None
        if self._compiler is None:
            self._compiler = concurrent.futures.ThreadPoolExecutor(1, "grammars")
        return self._compiler.submit(self._compile, request.constraint.grammar)
