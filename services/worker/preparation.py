"""What is made away from the event loop: long prompts, constraints, counts. Bounded.

There is one thread, and it does one thing at a time: first what is due first. Everything is due
once `PATIENCE` times as much as itself has been made since it came. So what is small passes by what
is large and waits at most for the one thing that is being made, and nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from threading import Lock
from typing import ParamSpec, TypeVar

import structlog

from libs.errors import Internal, MaasError, ResourceExhausted

log = structlog.get_logger(__name__)

# What may wait for the thread.
PREPARING_MAX = 32
# How much may pass by what waits, for its own size.
PATIENCE = 8

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(order=True, slots=True, frozen=True)
class _Job:
    """Something to make; ordered by what comes first.

    Attributes:
        due: when so much has been made.
        number: in the order of coming.
        size: of it.
        make: does it, unless nobody waits for it any more.
    """

    due: int
    number: int
    size: int = field(compare=False)
    make: Callable[[], None] = field(compare=False)


class Preparation:
    """The way to the thread. Belongs to one event loop."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._waiting = 0
        # The thread takes from these, the event loop puts into them.
        self._lock = Lock()
        self._jobs: list[_Job] = []
        self._count = 0
        self._made = 0

    def require_room(self, others: int = 0) -> None:
        """Sees that one more may wait.

        Args:
            others: that are about to, or hold on to what was made for them.

        Raises:
            ResourceExhausted: too many do.
        """
        if max(self._waiting, others) >= PREPARING_MAX:
            raise ResourceExhausted("too many long prompts wait for the tokenizer")

    async def run(
        self, name: str, size: int, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Makes something in the thread. When cancelled, what has not begun is never made.

        Args:
            name: whom it is for; for the log.
            size: how much work it is, as characters of a text to tokenise.
            make: pure.
            args: of it.
            kwargs: of it.

        Raises:
            MaasError: what `make` raised.
            Internal: it has a defect, which must not end others' stream.
        """
        made: Future[T] = Future()

        def make_it() -> None:
            if not made.set_running_or_notify_cancel():
                return
            try:
                made.set_result(guarded(name, make, *args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - whoever waits raises it
                made.set_exception(error)

        self._waiting += 1
        try:
            self._put(size, make_it)
            return await asyncio.wrap_future(made)
        finally:
            self._waiting -= 1

    def _put(self, size: int, make: Callable[[], None]) -> None:
        with self._lock:
            self._count += 1
            due = self._made + PATIENCE * size
            heapq.heappush(self._jobs, _Job(due, self._count, size, make))
        self._threads.submit(self._make_next)

    def _make_next(self) -> None:
        """Makes what is due first. Runs in the thread, once for each thing to make."""
        with self._lock:
            job = heapq.heappop(self._jobs)
            self._made += job.size
        job.make()


def guarded(name: str, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls what may have a defect on one prompt; that must not end all others' stream.

    Raises:
        MaasError: what it raised.
        Internal: for everything else.
    """
    try:
        return make(*args, **kwargs)
    except MaasError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a tokenizer does wrong; its text may quote the prompt
        log.error(  # noqa: TRY400 - a traceback's last line may quote the prompt
            "prompt failed", execution=name, error=type(error).__name__
        )
        raise Internal("internal error") from None
