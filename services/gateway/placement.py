"""From an execution to a worker that has accepted it. Nothing here is visible to the client.

The scheduler names a worker and fallbacks. While the scheduler cannot be reached, workers are taken
from the table that its watch left behind, least loaded by this gateway's own count. A worker that
refuses for a reason of its own is left out and the next is tried; a refusal that any worker would
give ends the search.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
from maas.engine.v1 import engine_pb2

from libs.errors import DeadlineExceeded, MaasError, Reason
from services.gateway.generation import Sink, new_sink
from services.gateway.links import Link, LinkPool
from services.gateway.tables import Workers, no_ready_worker

log = structlog.get_logger(__name__)

# A worker whose link does not stand is given this long to come up before the next is tried.
LINK_WAIT_S = 1.0
# A worker accepts once it has tokenised the prompt; one that takes longer than this hangs.
ACCEPT_WAIT_S = 15.0
# Rounds of asking the scheduler: each leaves out the workers that have failed so far.
ROUNDS_MAX = 3

_TRY_ELSEWHERE = {
    Reason.WORKER_LOST,
    Reason.WORKER_DRAINING,
    Reason.QUEUE_FULL,
    Reason.FENCED,
    Reason.RESOURCE_NOT_FOUND,
    Reason.SERVICE_UNAVAILABLE,
}
# What the scheduler says itself, as against not being there.
_SCHEDULER_SAYS = {Reason.NO_READY_WORKER, Reason.QUEUE_FULL, Reason.QUEUE_TIMEOUT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A worker to try.

    Attributes:
        worker: "workers/{worker}".
        endpoint: host:port.
        epoch: for the execution.
    """

    worker: str
    endpoint: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """What the scheduler gives.

    Attributes:
        slot_id: to give it back by; None for a placement of our own.
        targets: to be tried in order.
    """

    slot_id: str | None
    targets: list[Target]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be placed.

    Attributes:
        execution_id: unique per attempt to place; the prefix of the ids of its rounds.
        model_version: "models/{model}/versions/{version}".
        project: "projects/{project}", for fairness.
        max_wait_s: longest wait in the scheduler's queue.
    """

    execution_id: str
    model_version: str
    project: str
    max_wait_s: float


AcquireSlot = Callable[[Wanted, str, list[str]], Awaitable[Slot]]
"""Asks the scheduler: what, execution id, workers to leave out."""

ReleaseSlot = Callable[[str], None]
"""Gives a slot back, in the background."""

MakeExecution = Callable[[str, int], engine_pb2.Execution]
"""Makes the execution for an execution id and an epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """An execution that a worker has accepted.

    Attributes:
        link: to the worker.
        lane: on the link.
        sink: where its events arrive.
        input_tokens: exact.
    """

    link: Link
    lane: int
    sink: Sink
    input_tokens: int

    def abort(self) -> None:
        """Stops it."""
        self.link.abort(self.lane, self.sink)


class Placer:
    """Places executions."""

    def __init__(
        self,
        *,
        acquire: AcquireSlot,
        release: ReleaseSlot,
        workers: Workers,
        links: LinkPool,
    ) -> None:
        self._acquire = acquire
        self._release = release
        self._workers = workers
        self._links = links

    async def place(self, wanted: Wanted, make: MakeExecution) -> Placed:
        """Finds a worker that accepts.

        Raises:
            MaasError: what the last worker or the scheduler said.
        """
        exclude: list[str] = []
        last: MaasError | None = None
        for number in range(ROUNDS_MAX):
            execution_id = f"{wanted.execution_id}.{number}"
            try:
                slot = await self._slot(wanted, execution_id, exclude)
            except MaasError as error:
                # The workers' own refusal says more than that no other is left.
                if last is not None and error.reason is Reason.NO_READY_WORKER:
                    raise last from error
                raise
            is_used = False
            try:
                for target in slot.targets:
                    try:
                        placed = await self._try(target, make(execution_id, target.epoch))
                    except MaasError as error:
                        if error.reason not in _TRY_ELSEWHERE:
                            raise
                        last = error
                        exclude.append(target.worker)
                        continue
                    is_used = True
                    return placed
            finally:
                if not is_used and slot.slot_id is not None:
                    self._release(slot.slot_id)
        assert last is not None
        raise last

    async def _slot(self, wanted: Wanted, execution_id: str, exclude: list[str]) -> Slot:
        try:
            return await self._acquire(wanted, execution_id, exclude)
        except MaasError as error:
            if error.reason in _SCHEDULER_SAYS or isinstance(error, DeadlineExceeded):
                raise
            log.warning("placing without the scheduler", cause=error.reason.value)
            return self._own_slot(wanted.model_version, exclude)

    def _own_slot(self, model_version: str, exclude: list[str]) -> Slot:
        workers = self._workers.serving(model_version, set(exclude))
        if not workers:
            raise no_ready_worker(model_version)
        workers.sort(key=lambda worker: self._links.get(worker.name, worker.endpoint).running)
        targets = [
            Target(worker=worker.name, endpoint=worker.endpoint, epoch=worker.epoch)
            for worker in workers
        ]
        return Slot(slot_id=None, targets=targets)

    async def _try(self, target: Target, execution: engine_pb2.Execution) -> Placed:
        link = self._links.get(target.worker, target.endpoint)
        if not link.is_up:
            await link.ready(LINK_WAIT_S)
        sink = new_sink()
        lane = link.start(execution, sink)
        try:
            async with asyncio.timeout(ACCEPT_WAIT_S):
                input_tokens = await sink.accepted
        except TimeoutError:
            link.abort(lane, sink)
            raise link.lost() from None
        except asyncio.CancelledError:
            link.abort(lane, sink)
            raise
        return Placed(link=link, lane=lane, sink=sink, input_tokens=input_tokens)
