"""The scheduler's methods: parse, one call, build."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
from maas.scheduler.v1 import placement_service_pb2 as placement_pb
from maas.scheduler.v1 import (
    placement_service_pb2_grpc,
    worker_pb2,
    worker_registry_service_pb2_grpc,
    worker_service_pb2_grpc,
)
from maas.scheduler.v1 import worker_registry_service_pb2 as registry_pb
from maas.scheduler.v1 import worker_service_pb2 as worker_service_pb
from typing_extensions import override

from libs import paging
from libs.clock import Clock
from libs.errors import FieldRule, invalid_field
from libs.ids import last_part
from libs.limits import WATCH_BOOKMARK_S
from libs.rpc.feed import changes
from libs.rpc.validation import Validator
from services.scheduler import convert, operations
from services.scheduler.config import SchedulerSection
from services.scheduler.core.messages import Registration
from services.scheduler.core.state import Worker
from services.scheduler.loop import Connection, Scheduler
from services.scheduler.store import SchedulerStore

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]


class PlacementService(placement_service_pb2_grpc.PlacementServiceServicer):
    """Slots: maas.scheduler.v1.PlacementService."""

    def __init__(self, scheduler: Scheduler, config: SchedulerSection) -> None:
        self._scheduler = scheduler
        self._wait_default_s = config.wait_default
        self._wait_max_s = config.wait_max
        self._start_within = convert.duration_to_pb(config.start_within)

    @override
    async def AcquireSlot(
        self, request: placement_pb.AcquireSlotRequest, _: Context
    ) -> placement_pb.AcquireSlotResponse:
        """Waits for a slot."""
        ask = convert.ask_from_pb(
            request, wait_default_s=self._wait_default_s, wait_max_s=self._wait_max_s
        )
        grant = await self._scheduler.acquire(ask)
        return convert.grant_to_pb(grant, self._start_within)

    @override
    async def ReleaseSlots(
        self, request: placement_pb.ReleaseSlotsRequest, _: Context
    ) -> placement_pb.ReleaseSlotsResponse:
        """Frees slots."""
        self._scheduler.release(tuple(request.slot_ids))
        return placement_pb.ReleaseSlotsResponse()


class WorkerRegistryService(worker_registry_service_pb2_grpc.WorkerRegistryServiceServicer):
    """Workers' streams: maas.scheduler.v1.WorkerRegistryService."""

    def __init__(
        self, scheduler: Scheduler, store: SchedulerStore, clock: Clock, config: SchedulerSection
    ) -> None:
        self._scheduler = scheduler
        self._store = store
        self._clock = clock
        self._config = config
        self._validator = Validator()

    @override
    async def Connect(self, _: object, context: Context) -> None:  # type: ignore[override]  # reads and writes by itself (facts.md), where the stub expects iterators
        """Registers a worker and listens to it until one of the two ends the stream."""
        registration = await self._read_register(context)
        epoch = await operations.next_epoch(
            self._store, self._clock, registration, within_s=self._config.register_within
        )
        connection: Connection | None = None
        try:
            # An interruption from outside: the core ends the stream of a worker that is replaced.
            async with asyncio.timeout(None) as scope:
                with self._scheduler.connect(
                    registration, epoch, cut=lambda: scope.reschedule(0)
                ) as connection:
                    # Nothing is written to one that was refused at once: a status cannot be sent
                    # while a message is.
                    if connection.error is None:
                        await context.write(self._welcome(epoch))
                        await self._listen(context, connection)
        except TimeoutError:
            assert connection is not None
            assert connection.error is not None
        if connection.error is not None:
            raise connection.error

    async def _read_register(self, context: Context) -> Registration:
        async with asyncio.timeout(self._config.lease_duration):
            first = await context.read()
        if first is grpc.aio.EOF or not first.HasField("register"):
            raise invalid_field("register", FieldRule.REQUIRED, "must be the first message")
        # The stack checks the requests of unary methods only.
        self._validator.check(first)
        return convert.registration_from_pb(first.register)

    def _welcome(self, epoch: int) -> registry_pb.ConnectResponse:
        return registry_pb.ConnectResponse(
            welcome=registry_pb.Welcome(
                epoch=epoch,
                heartbeat_interval=convert.duration_to_pb(self._config.heartbeat_interval),
                lease_duration=convert.duration_to_pb(self._config.lease_duration),
            )
        )

    async def _listen(self, context: Context, connection: Connection) -> None:
        while True:
            message = await context.read()
            if message is grpc.aio.EOF:
                return
            event = convert.heard_from_pb(message, connection.worker, connection.epoch)
            self._scheduler.hear(event)


@dataclass(frozen=True, slots=True)
class _Change:
    """A worker as it was at one revision."""

    revision: int
    worker: worker_pb2.Worker


class WorkerService(worker_service_pb2_grpc.WorkerServiceServicer):
    """The workers there are: maas.scheduler.v1.WorkerService."""

    def __init__(
        self, scheduler: Scheduler, clock: Clock, *, bookmark_s: float = WATCH_BOOKMARK_S
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._bookmark_s = bookmark_s

    @override
    async def ListWorkers(
        self, request: worker_service_pb.ListWorkersRequest, _: Context
    ) -> worker_service_pb.ListWorkersResponse:
        """Lists workers by name."""
        page = paging.page_of(request.page_size, request.page_token)
        workers = [item for item in self._scheduler.workers() if last_part(item.name) > page.after]
        found = [self._to_pb(item) for item in workers[: page.read_size]]
        items, token = paging.cut_named(found, page)
        return worker_service_pb.ListWorkersResponse(workers=items, next_page_token=token)

    @override
    async def WatchWorkers(
        self, _request: worker_service_pb.WatchWorkersRequest, _: Context
    ) -> AsyncGenerator[worker_service_pb.WatchWorkersResponse, None]:
        """Streams every worker, then each change, then signs of life."""
        hub = self._scheduler.hub
        async with aclosing(changes(hub, self._read_after, bookmark_s=self._bookmark_s)) as feed:
            async for item in feed:
                yield worker_service_pb.WatchWorkersResponse(
                    workers=[change.worker for change in item.items],
                    snapshot_complete=item.completes_snapshot,
                )

    async def _read_after(self, revision: int, count: int) -> Sequence[_Change]:
        # Copies: the core changes its workers in place while a slow watcher takes its time.
        workers = self._scheduler.workers_after(revision, count)
        return [_Change(item.revision, self._to_pb(item)) for item in workers]

    def _to_pb(self, worker: Worker) -> worker_pb2.Worker:
        return convert.worker_to_pb(worker, self._time_of)

    def _time_of(self, moment_s: float) -> datetime:
        return self._clock.now() - timedelta(seconds=self._clock.monotonic_s() - moment_s)
