"""From an execution to a worker that has accepted it. Nothing here is visible to the client.

A slot that was leased in advance names a worker at once (spares.py). Else, or when that worker does
not accept, the scheduler names a worker and fallbacks. While the scheduler cannot be reached,
workers are taken from the table that its watch left behind, least loaded by this gateway's own
count. A worker that refuses for a reason of its own is left out and the next is tried; a refusal
that any worker would give ends the search.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import structlog
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from libs.errors import DeadlineExceeded, MaasError, Reason
from services.gateway.generation import new_sink
from services.gateway.links import Link, LinkPool, worker_lost
from services.gateway.rich import AnySink
from services.gateway.spares import Lease, Spare, Spares
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
# What a worker says to a spare that the scheduler has taken back, or that is older than its present
# registration: the worker is fine, and the scheduler may name it again.
_SPARE_IS_STALE = {Reason.QUEUE_FULL, Reason.FENCED}
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
        spares: slots for executions that may come.
        start_within_s: seconds in which all of them have to start.
    """

    slot_id: str | None
    targets: Sequence[Target | Spare]
    spares: tuple[Spare, ...] = ()
    start_within_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be placed.

    Attributes:
        execution_id: prefix of the execution ids that are made for it; a spare brings its own.
        model_version: "models/{model}/versions/{version}".
        project: "projects/{project}", for fairness.
        max_wait_s: longest wait in the scheduler's queue.
        excluded: workers that it must not get.
        spare_ids: executions to lease slots for along with its own; the placer fills them in.
        places: that it takes on its worker, all at once.
        affinity: requests with equal bytes prefer the same worker; empty for any.
        priority: who goes first in the scheduler's queue.
        new_sink: makes where its events arrive, for each attempt.
    """

    execution_id: str
    model_version: str
    project: str
    max_wait_s: float
    excluded: frozenset[str] = frozenset()
    spare_ids: tuple[str, ...] = ()
    places: int = 1
    affinity: bytes = b""
    priority: generation_pb2.PriorityClass.ValueType = generation_pb2.PRIORITY_CLASS_UNSPECIFIED
    new_sink: Callable[[], AnySink] = new_sink

    @property
    def takes_spares(self) -> bool:
        """Whether any slot will do, so that one that was leased in advance will, too."""
        return (
            self.places == 1
            and not self.affinity
            and self.priority != generation_pb2.PRIORITY_CLASS_BACKGROUND
        )


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
        lanes: of its outputs on the link.
        sink: where its events arrive.
        input_tokens: exact.
    """

    link: Link
    lanes: Sequence[int]
    sink: AnySink
    input_tokens: int

    def abort(self) -> None:
        """Stops all outputs."""
        _abort(self.link, self.lanes, self.sink)


@dataclass(slots=True)
class _Search:
    """How far the search for a worker has come.

    Attributes:
        exclude: workers to leave out.
        last: what the last worker said that did not accept, for whoever asked.
        is_stale: it may accept all the same, once the scheduler names it again.
    """

    exclude: list[str]
    last: MaasError | None = None
    is_stale: bool = False


class Placer:
    """Places executions."""

    def __init__(
        self,
        *,
        acquire: AcquireSlot,
        release: ReleaseSlot,
        workers: Workers,
        links: LinkPool,
        spares: Spares | None = None,
    ) -> None:
        """Keeps what it needs.

        Args:
            acquire: asks the scheduler.
            release: gives a slot back.
            workers: those that take work, for the time when the scheduler is away.
            links: to workers.
            spares: slots leased in advance; None leases none.
        """
        self._acquire = acquire
        self._release = release
        self._workers = workers
        self._links = links
        self._spares = spares
        self._numbers = itertools.count()

    async def place(self, wanted: Wanted, make: MakeExecution) -> Placed:
        """Finds a worker that accepts.

        Raises:
            MaasError: what the last worker or the scheduler said.
        """
        search = _Search(list(wanted.excluded))
        if self._spares is not None and wanted.takes_spares:
            placed = await self._on_spare(self._spares, wanted, make, search)
            if placed is not None:
                return placed
        for _ in range(ROUNDS_MAX):
            # Ids are never used twice, however often one generation is placed.
            execution_id = f"{wanted.execution_id}.{next(self._numbers)}"
            try:
                slot = await self._slot(wanted, execution_id, search.exclude)
            except MaasError as error:
                # The workers' own refusal says more than that no other is left.
                if search.last is not None and error.reason is Reason.NO_READY_WORKER:
                    raise search.last from error
                raise
            placed = await self._on_slot(slot, execution_id, wanted, make, search)
            if placed is not None:
                return placed
        assert search.last is not None
        raise search.last

    async def _on_spare(
        self, spares: Spares, wanted: Wanted, make: MakeExecution, search: _Search
    ) -> Placed | None:
        """Tries a slot that was leased in advance; it has no fallbacks."""
        spare = spares.take(wanted.model_version, wanted.excluded)
        if spare is None:
            return None
        slot = Slot(slot_id=spare.slot_id, targets=[spare])
        placed = await self._on_slot(slot, spare.execution_id, wanted, make, search)
        if search.is_stale:
            search.exclude = list(wanted.excluded)
        return placed

    async def _on_slot(
        self,
        slot: Slot,
        execution_id: str,
        wanted: Wanted,
        make: MakeExecution,
        search: _Search,
    ) -> Placed | None:
        """Tries the targets of a slot and gives it back when none of them accepts."""
        is_used = False
        try:
            for target in slot.targets:
                try:
                    execution = make(execution_id, target.epoch)
                    placed = await self._try(target, execution, wanted.new_sink())
                except MaasError as error:
                    if error.reason not in _TRY_ELSEWHERE:
                        raise
                    search.last = _for_caller(error, target.worker)
                    search.is_stale = error.reason in _SPARE_IS_STALE
                    search.exclude.append(target.worker)
                    continue
                is_used = True
                return placed
        finally:
            if not is_used and slot.slot_id is not None:
                self._release(slot.slot_id)
        return None

    async def _slot(self, wanted: Wanted, execution_id: str, exclude: list[str]) -> Slot:
        try:
            return await self._acquire_with_spares(wanted, execution_id, exclude)
        except MaasError as error:
            if error.reason in _SCHEDULER_SAYS or isinstance(error, DeadlineExceeded):
                raise
            log.warning("placing without the scheduler", cause=error.reason.value)
            return self._own_slot(wanted.model_version, exclude)

    async def _acquire_with_spares(
        self, wanted: Wanted, execution_id: str, exclude: list[str]
    ) -> Slot:
        # Who may not wait and brings spares gets nothing but a spare: the scheduler's rule.
        if self._spares is None or wanted.max_wait_s <= 0 or not wanted.takes_spares:
            return await self._acquire(wanted, execution_id, exclude)
        with self._spares.order(wanted.model_version) as order:
            if order.ids:
                wanted = replace(wanted, spare_ids=tuple(order.ids))
            slot = await self._acquire(wanted, execution_id, exclude)
            order.lease = Lease(spares=slot.spares, start_within_s=slot.start_within_s)
        return slot

    def _own_slot(self, model_version: str, exclude: list[str]) -> Slot:
        workers = self._workers.serving(model_version, set(exclude))
        if not workers:
            raise no_ready_worker(model_version)
        workers.sort(key=lambda worker: self._links.get(worker.name, worker.endpoint).running)
        targets: list[Target | Spare] = [
            Target(worker=worker.name, endpoint=worker.endpoint, epoch=worker.epoch)
            for worker in workers
        ]
        return Slot(slot_id=None, targets=targets)

    async def _try(
        self, target: Target | Spare, execution: engine_pb2.Execution, sink: AnySink
    ) -> Placed:
        link = self._links.get(target.worker, target.endpoint)
        if not link.is_up:
            await link.ready(LINK_WAIT_S)
        inlets = sink.inlets
        if len(inlets) == 1:
            lanes = [link.start(execution, inlets[0])]
        else:
            lanes = link.start_many(execution, inlets)
        try:
            async with asyncio.timeout(ACCEPT_WAIT_S):
                input_tokens = await sink.accepted
        except TimeoutError:
            _abort(link, lanes, sink)
            raise link.lost() from None
        except asyncio.CancelledError:
            _abort(link, lanes, sink)
            raise
        return Placed(link=link, lanes=lanes, sink=sink, input_tokens=input_tokens)


def _for_caller(error: MaasError, worker: str) -> MaasError:
    """Turns what a worker and the scheduler have between them into a worker that was lost."""
    return worker_lost(worker) if error.reason is Reason.FENCED else error


def _abort(link: Link, lanes: Sequence[int], sink: AnySink) -> None:
    for lane, inlet in zip(lanes, sink.inlets, strict=True):
        link.abort(lane, inlet)
