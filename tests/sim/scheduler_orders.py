"""Who goes first in the simulated world, and what must hold of several places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.scheduler.core.messages import Grant, Priority
from services.scheduler.core.state import Worker
from tests.sim.scheduler_parts import Request

if TYPE_CHECKING:
    from tests.sim.scheduler_world import World

# Times are sums of floats.
_ROUNDING_S = 1e-6


class Orders:
    """Looks at each grant when its step is over."""

    def __init__(self, world: World) -> None:
        self._world = world

    def granted(self, grant: Grant, request: Request, worker: Worker) -> None:
        """Holds a grant against those who still wait for its worker."""
        slot = self._world.state.slots[grant.execution_id]
        if slot.start_by_s is None:
            # It runs by its gateway's own choice.
            return
        ask = request.ask
        claim = self._world.claim
        claim(slot.places >= ask.places, f"{grant} has {slot.places} of {ask.places} places")
        if ask.places > 1:
            self._world.count("several places queued" if grant.queued_s else "several places")
        if ask.priority is Priority.BACKGROUND and grant.queued_s:
            self._world.count("background queued")
        asked_s = self._world.now_s - grant.queued_s - _ROUNDING_S
        max_running = worker.registration.info.max_running
        for waiter in self._world.state.waiting.values():
            is_rival = waiter.model_version == ask.model_version
            # One that wants more may have been passed over: it did not fit.
            is_rival = is_rival and waiter.places <= ask.places
            if not is_rival or not waiter.may_run_on(worker.name, max_running):
                continue
            is_higher = ask.priority is Priority.BACKGROUND and (
                waiter.priority is Priority.STANDARD
            )
            claim(not is_higher, f"{grant} went before {waiter}, which is of a higher class")
            is_same_row = (waiter.project, waiter.priority) == (ask.project, ask.priority)
            is_older = is_same_row and waiter.asked_s < asked_s
            claim(not is_older, f"{grant} has overtaken {waiter}")
