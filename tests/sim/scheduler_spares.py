"""Gateways of the simulated world that lease slots in advance, and what must hold of spares."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from services.scheduler.core.messages import (
    Grant,
    SlotAsked,
    SlotsReleased,
    Spare,
    TakeBack,
    WorkerState,
)
from services.scheduler.core.placement import ROOM_FOR_SPARE
from tests.sim.scheduler_parts import SETTINGS, WAIT_MAX_S, Request

if TYPE_CHECKING:
    from tests.sim.scheduler_world import World

# Some are used when their time is over: start_by is a bound for gateways, not a law of nature.
KEPT_MAX_S = 1.2 * SETTINGS.start_within_s


class SpareGateways:
    """Keeps spares for a while, then uses, returns or forgets them."""

    def __init__(self, world: World) -> None:
        self._world = world

    def check(self) -> None:
        """Holds after each step: small workers give no spares."""
        for worker in self._world.state.workers.values():
            is_small = worker.registration.info.max_running < ROOM_FOR_SPARE
            is_wrong = is_small and bool(worker.spares)
            self._world.claim(not is_wrong, f"{worker.name} is too small for spares")

    def granted(self, grant: Grant, request: Request) -> None:
        """Takes in the spares that came with a slot; the step that granted them is just over."""
        for spare in grant.spares:
            slot = self._world.state.slots[spare.execution_id]
            is_right = slot.is_spare and slot.slot_id == spare.slot_id
            self._world.claim(is_right, f"{spare} is no spare")
            if spare.execution_id in self._world.requests:
                self._world.count("spare said again")
            else:
                self._world.count("spare granted")
                self._check_new(spare, request)
                self._keep(spare, request)

    def _check_new(self, spare: Spare, request: Request) -> None:
        state, claim = self._world.state, self._world.claim
        worker = state.slots[spare.execution_id].worker
        claim(request.ask.model_version not in state.queues, f"{spare} came while others wait")
        claim(state.next_waiter(worker) is None, f"{spare} is where others wait")
        claim(worker.name not in request.ask.excluded, f"{spare} is excluded")
        claim(worker.state is WorkerState.READY, f"{spare} is on a draining worker")
        is_within_share = len(worker.spares) <= worker.room // ROOM_FOR_SPARE
        claim(is_within_share, f"{spare} is beyond the share of {worker.name}")

    def _keep(self, spare: Spare, request: Request) -> None:
        ask = SlotAsked(
            execution_id=spare.execution_id,
            model_version=request.ask.model_version,
            max_wait_s=WAIT_MAX_S,
        )
        self._world.requests[spare.execution_id] = Request(
            ask, outcome="granted", slot_id=spare.slot_id
        )
        delay_s = self._world.rng.uniform(0.0, KEPT_MAX_S)
        self._world.after(delay_s, partial(self._use, spare))

    def _use(self, spare: Spare) -> None:
        """Nobody has told the gateway whether the spare was taken back."""
        kind = self._world.rng.random()
        if kind < 0.15:
            self._world.count("spare forgotten")
        elif kind < 0.4:
            self._world.count("spare returned")
            self._world.feed(SlotsReleased(slot_ids=(spare.slot_id,)))
        else:
            is_there = spare.execution_id in self._world.state.slots
            self._world.count("spare used" if is_there else "spare used that was gone")
            target = spare.target
            worker = next(item for item in self._world.workers if item.name == target.worker)
            if not self._world.start_execution(worker, spare.execution_id, target.epoch):
                self._world.feed(SlotsReleased(slot_ids=(spare.slot_id,)))

    def taken_back(self, command: TakeBack) -> None:
        """A spare has gone to a request."""
        request = self._world.requests[command.execution_id]
        has_slot = command.execution_id in self._world.state.slots
        self._world.claim(not has_slot, f"{command} has a slot")
        self._world.claim(bool(request.slot_id), f"{command} never had a slot")
