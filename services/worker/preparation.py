"""What is made away from the event loop: long prompts, constraints, counts. Bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

import structlog

from libs.errors import Internal, MaasError, ResourceExhausted

log = structlog.get_logger(__name__)

# What may wait for the thread.
PREPARING_MAX = 32

P = ParamSpec("P")
T = TypeVar("T")


class Preparation:
    """The way to the thread. Belongs to one event loop."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._waiting = 0

    def require_room(self, others: int = 0) -> None:
        """Sees that one more may wait.

        Args:
            others: that are about to, or hold on to what was made for them.

        Raises:
            ResourceExhausted: too many do.
        """
        if max(self._waiting, others) >= PREPARING_MAX:
            raise ResourceExhausted("too many long prompts wait for the tokenizer")

    async def run(self, name: str, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Makes something in the thread.

        Args:
            name: whom it is for; for the log.
            make: pure.
            args: of it.
            kwargs: of it.

        Raises:
            MaasError: what `make` raised.
            Internal: it has a defect, which must not end others' stream.
        """
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: guarded(name, make, *args, **kwargs)
            )
        finally:
            self._waiting -= 1


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
