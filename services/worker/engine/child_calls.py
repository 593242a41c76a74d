"""Questions to an engine's child that each get one answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Generic, TypeVar

from services.worker.engine.base import EngineDied

T = TypeVar("T")


class Calls(Generic[T]):
    """The questions of one kind that are open. Belongs to one event loop."""

    def __init__(self) -> None:
        self._answers: dict[int, asyncio.Future[T]] = {}
        self._last = 0

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[int, asyncio.Future[T]]]:
        """A question's number and its answer; whoever asks forgets it by leaving.

        Leaving by cancellation is fine: an answer that comes later is dropped.
        """
        self._last = (self._last + 1) % (1 << 32)
        number, answer = self._last, asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            yield number, answer
        finally:
            del self._answers[number]

    def answer(self, number: int, value: T) -> None:
        """Answers a question, if somebody still waits."""
        waiting = self._answers.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(value)

    def fail(self, reason: str | None) -> None:
        """Ends all questions, because nobody is left who answers."""
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(EngineDied(reason))
