"""The task that looks for credit slices whose lease has run out."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from libs.clock import Clock
from libs.errors import Unavailable


async def sweep_forever(
    sweep: Callable[[], Awaitable[None]], clock: Clock, *, interval_s: float
) -> None:
    """Sweeps for ever. A database that is away only delays the next look."""
    while True:
        # The pool has logged it, and slices only live longer.
        with contextlib.suppress(Unavailable):
            await sweep()
        await clock.sleep_s(interval_s)
