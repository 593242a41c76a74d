"""From a call to embed to a worker that has done it. Nothing here is visible to the caller.

The scheduler names a worker and fallbacks, as for executions; while it cannot be reached, workers
are taken from the table that its watch left behind. The work is one unary call, so a worker that is
lost before it has answered is replaced by another, from the start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog
from maas.engine.v1 import engine_service_pb2

from libs.errors import DeadlineExceeded, MaasError, NotFound, Reason
from services.gateway.desks import ELSEWHERE, Desks
from services.gateway.links import LinkPool
from services.gateway.placement import (
    ROUNDS_MAX,
    AcquireSlot,
    ReleaseSlot,
    Slot,
    Target,
    Wanted,
)
from services.gateway.tables import Workers, no_ready_worker

log = structlog.get_logger(__name__)

# The default deadline of the method in the contract: no worker is given more.
ANSWER_WAIT_S = 60.0
# Of a placement of our own: about as many as the scheduler names.
TARGETS_MAX = 4
# What the scheduler says itself, as against not being there.
_SCHEDULER_SAYS = {Reason.NO_READY_WORKER, Reason.QUEUE_FULL, Reason.QUEUE_TIMEOUT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a worker has made.

    Attributes:
        worker: "workers/{worker}".
        response: its answer.
    """

    worker: str
    response: engine_service_pb2.EmbedResponse


class EmbedPlacer:
    """Finds a worker for a unary call: as Placer does for executions, without spares."""

    def __init__(
        self,
        *,
        acquire: AcquireSlot,
        release: ReleaseSlot,
        workers: Workers,
        links: LinkPool,
        desks: Desks,
        queue_wait_s: float,
    ) -> None:
        """Keeps what it needs.

        Args:
            acquire: asks the scheduler.
            release: gives a slot back.
            workers: those that take work, for the time when the scheduler is away.
            links: to workers; they know how many executions of ours run there.
            desks: connections for unary calls.
            queue_wait_s: longest wait for a place on a worker.
        """
        self._acquire = acquire
        self._release = release
        self._workers = workers
        self._links = links
        self._desks = desks
        self._queue_wait_s = queue_wait_s

    async def embed(
        self,
        request: engine_service_pb2.EmbedRequest,
        *,
        generation_id: str,
        project: str,
        left_s: Callable[[], float],
    ) -> Made:
        """Has a worker embed.

        Args:
            request: what is common to all attempts.
            generation_id: prefix of the execution ids.
            project: "projects/{project}", for fairness.
            left_s: seconds until the caller's deadline, never less than a little.

        Raises:
            MaasError: what the last worker or the scheduler said.
        """
        excluded: list[str] = []
        last: MaasError | None = None
        for number in range(ROUNDS_MAX):
            request.execution_id = f"{generation_id}.{number}"
            wanted = Wanted(
                execution_id=generation_id,
                model_version=request.model_version,
                project=project,
                max_wait_s=min(self._queue_wait_s, left_s()),
            )
            try:
                slot = await self._slot(wanted, request.execution_id, excluded)
            except MaasError as error:
                # The workers' own refusal says more than that no other is left.
                if last is not None and error.reason is Reason.NO_READY_WORKER:
                    raise last from error
                raise
            outcome = await self._on_slot(slot, request, left_s, excluded)
            if isinstance(outcome, Made):
                return outcome
            last = outcome
        assert last is not None
        raise last

    async def _on_slot(
        self,
        slot: Slot,
        request: engine_service_pb2.EmbedRequest,
        left_s: Callable[[], float],
        excluded: list[str],
    ) -> Made | MaasError:
        """Tries the targets of a slot; returns the last refusal when each has one of its own.

        The slot of a call that was served ends with the worker's report; any other goes back.
        """
        last: MaasError = no_ready_worker(request.model_version)
        is_used = False
        try:
            for target in slot.targets:
                request.epoch = target.epoch
                try:
                    response = await self._desks.call(
                        (target.worker, target.endpoint),
                        lambda stub: stub.Embed,
                        request,
                        timeout_s=min(left_s(), ANSWER_WAIT_S),
                        field="inputs",
                    )
                except MaasError as error:
                    if error.reason not in ELSEWHERE:
                        raise
                    if not isinstance(error, NotFound):
                        # It has said what it no longer serves; to our caller the model is there.
                        last = error
                    excluded.append(target.worker)
                    continue
                is_used = True
                return Made(worker=target.worker, response=response)
        finally:
            if not is_used and slot.slot_id is not None:
                self._release(slot.slot_id)
        return last

    async def _slot(self, wanted: Wanted, execution_id: str, excluded: list[str]) -> Slot:
        try:
            return await self._acquire(wanted, execution_id, excluded)
        except MaasError as error:
            if error.reason in _SCHEDULER_SAYS or isinstance(error, DeadlineExceeded):
                raise
            log.warning("embedding without the scheduler", cause=error.reason.value)
        workers = self._workers.serving(wanted.model_version, set(excluded))
        if not workers:
            raise no_ready_worker(wanted.model_version)
        workers.sort(key=lambda worker: self._links.get(worker.name, worker.endpoint).running)
        targets = [
            Target(worker=worker.name, endpoint=worker.endpoint, epoch=worker.epoch)
            for worker in workers[:TARGETS_MAX]
        ]
        return Slot(slot_id=None, targets=targets)
