"""What needs more than one collaborator: a worker's registration outlives a database restart."""

from __future__ import annotations

from libs.clock import Clock
from libs.errors import Unavailable
from services.scheduler.core.messages import Registration
from services.scheduler.store import SchedulerStore

_RETRY_MIN_S = 0.1
_RETRY_MAX_S = 1.0


async def next_epoch(
    store: SchedulerStore, clock: Clock, registration: Registration, *, within_s: float
) -> int:
    """Returns the epoch of a registration, trying again while the database is away.

    Raises:
        Unavailable: it was away for that long; the worker will come again.
    """
    give_up_s = clock.monotonic_s() + within_s
    delay_s = _RETRY_MIN_S
    while True:
        try:
            return await store.next_epoch(registration, clock.now())
        except Unavailable:
            if clock.monotonic_s() + delay_s > give_up_s:
                raise
        await clock.sleep_s(delay_s)
        delay_s = min(2 * delay_s, _RETRY_MAX_S)
