"""A scheduler in this process: real gRPC on loopback, real PostgreSQL, time that tests move."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
from google.protobuf.duration_pb2 import Duration
from maas.common.v1 import capabilities_pb2
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2
from maas.scheduler.v1 import (
    placement_service_pb2,
    placement_service_pb2_grpc,
    worker_pb2,
    worker_registry_service_pb2,
    worker_registry_service_pb2_grpc,
    worker_service_pb2,
    worker_service_pb2_grpc,
)

from libs import postgres
from libs.config import PostgresSection
from libs.errors import MaasError
from libs.process import Background
from libs.rpc import Peer, Server
from libs.rpc.status import error_of
from libs.testing import FakeClock
from libs.testing.rpc import ANY_PORT, Callers, serving
from services.scheduler.config import SchedulerSection
from services.scheduler.loop import Scheduler
from services.scheduler.service import PlacementService, WorkerRegistryService, WorkerService
from services.scheduler.store import SchedulerStore

if TYPE_CHECKING:
    from grpc.aio import StreamStreamCall, UnaryStreamCall

    ConnectCall = StreamStreamCall[
        worker_registry_service_pb2.ConnectRequest, worker_registry_service_pb2.ConnectResponse
    ]
    WatchCall = UnaryStreamCall[
        worker_service_pb2.WatchWorkersRequest, worker_service_pb2.WatchWorkersResponse
    ]

PLACEMENT = placement_service_pb2.DESCRIPTOR.services_by_name["PlacementService"]
REGISTRY = worker_registry_service_pb2.DESCRIPTOR.services_by_name["WorkerRegistryService"]
WORKERS = worker_service_pb2.DESCRIPTOR.services_by_name["WorkerService"]
ALLOW = {
    "maas.scheduler.v1.PlacementService/AcquireSlot": ["gateway"],
    "maas.scheduler.v1.PlacementService/ReleaseSlots": ["gateway"],
    "maas.scheduler.v1.WorkerService/WatchWorkers": ["gateway"],
    "maas.scheduler.v1.WorkerRegistryService/Connect": ["worker"],
}
VERSION = "models/tiny/versions/1"
BOOKMARK_S = 0.05
PATIENCE_S = 5.0
# What holds in the first seconds after a start has tests of its own.
CONFIG = SchedulerSection.model_validate({"queue_length_max": 3, "gather_for": "0s"})


async def until(holds: Callable[[], bool]) -> None:
    """Waits for what another task is about to do."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


@dataclasses.dataclass(slots=True, kw_only=True)
class Running:
    """A running scheduler and its callers.

    Attributes:
        bare: the gateway's channel without the library's own retries of UNAVAILABLE.
    """

    endpoint: str
    bare: grpc.aio.Channel
    scheduler: Scheduler
    clock: FakeClock
    callers: Callers
    admin: Peer
    gateway: Peer
    worker: Peer

    async def acquire(
        self,
        execution_id: str,
        *,
        version: str = VERSION,
        project: str = "projects/demo",
        exclude: Sequence[str] = (),
        max_wait_s: float | None = None,
        timeout_s: float = PATIENCE_S,
        spares: Sequence[str] = (),
        places: int = 0,
        affinity: bytes = b"",
        priority: generation_pb2.PriorityClass.ValueType = (
            generation_pb2.PRIORITY_CLASS_UNSPECIFIED
        ),
    ) -> placement_service_pb2.AcquireSlotResponse:
        request = placement_service_pb2.AcquireSlotRequest(
            execution_id=execution_id,
            model_version=version,
            project=project,
            exclude_workers=exclude,
            max_wait=None if max_wait_s is None else duration(max_wait_s),
            spare_execution_ids=spares,
            places=places,
            affinity=affinity,
            priority=priority,
        )
        stub = placement_service_pb2_grpc.PlacementServiceStub(self.bare)
        token = self.callers.tokens["gateway"]
        metadata = (("authorization", f"Bearer {token}"),)
        try:
            return await stub.AcquireSlot(request, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from failure

    async def release(self, *slot_ids: str) -> None:
        request = placement_service_pb2.ReleaseSlotsRequest(slot_ids=slot_ids)
        stub = placement_service_pb2_grpc.PlacementServiceStub(self.gateway.channel)
        await self.gateway.call(stub.ReleaseSlots, request)

    @asynccontextmanager
    async def waiting(
        self, execution_id: str, *, project: str = "projects/demo", max_wait_s: float | None = None
    ) -> AsyncIterator[asyncio.Task[placement_service_pb2.AcquireSlotResponse]]:
        """Asks for a slot in a task and returns once it waits in the queue."""
        call = self.acquire(execution_id, project=project, max_wait_s=max_wait_s)
        task = asyncio.create_task(call)
        await until(lambda: execution_id in self.queued or task.done())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def queued(self) -> list[str]:
        """Executions that wait."""
        return list(self.scheduler._state.waiting)

    def slots(self, worker: str = "a") -> list[str]:
        """Executions that have a slot on a worker."""
        return list(self.scheduler._state.workers[f"workers/{worker}"].slots)

    @asynccontextmanager
    async def connecting(self) -> AsyncIterator[WorkerStream]:
        """Opens a worker's stream and says nothing."""
        stub = worker_registry_service_pb2_grpc.WorkerRegistryServiceStub(self.worker.channel)
        async with self.worker.both_ways(stub.Connect) as call:
            yield WorkerStream(call)

    @asynccontextmanager
    async def registered(
        self,
        name: str = "a",
        *,
        capacity: int = 1,
        versions: Sequence[str] = (VERSION,),
        running: Sequence[str] = (),
        incarnation: str = "one",
    ) -> AsyncIterator[WorkerStream]:
        """Has a worker registered."""
        async with self.connecting() as stream:
            await stream.register(
                register(
                    name,
                    capacity=capacity,
                    versions=versions,
                    running=running,
                    incarnation=incarnation,
                )
            )
            yield stream

    async def list_workers(
        self, *, page_size: int = 0, page_token: str = ""
    ) -> worker_service_pb2.ListWorkersResponse:
        stub = worker_service_pb2_grpc.WorkerServiceStub(self.admin.channel)
        request = worker_service_pb2.ListWorkersRequest(page_size=page_size, page_token=page_token)
        return await self.admin.call(stub.ListWorkers, request)

    async def worker_named(self, name: str = "a") -> worker_pb2.Worker:
        found = {item.name: item for item in (await self.list_workers()).workers}
        return found[f"workers/{name}"]

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[Watcher]:
        """Opens a watch as the gateway does."""
        stub = worker_service_pb2_grpc.WorkerServiceStub(self.gateway.channel)
        request = worker_service_pb2.WatchWorkersRequest()
        async with self.gateway.stream(stub.WatchWorkers, request) as stream:
            yield Watcher(stream)

    async def advance(self, seconds: float) -> None:
        """Moves time on and lets the scheduler notice."""
        # The loop may still be on its way to its sleep.
        await until(lambda: bool(self.clock._sleepers))
        self.clock.advance(seconds)
        await until(lambda: bool(self.clock._sleepers))


class WorkerStream:
    """A worker's end of its stream."""

    def __init__(self, call: ConnectCall) -> None:
        self._call = call
        self.epoch = 0

    async def register(
        self, message: worker_registry_service_pb2.Register
    ) -> worker_registry_service_pb2.Welcome:
        """Registers and waits for the welcome."""
        await self.send(worker_registry_service_pb2.ConnectRequest(register=message))
        welcome = (await self.read()).welcome
        self.epoch = welcome.epoch
        return welcome

    async def send(self, message: worker_registry_service_pb2.ConnectRequest) -> None:
        await self._call.write(message)

    async def report(self, *, started: Sequence[str] = (), ended: Sequence[str] = ()) -> None:
        report = worker_registry_service_pb2.ExecutionReport(
            started_execution_ids=started, ended_execution_ids=ended
        )
        await self.send(worker_registry_service_pb2.ConnectRequest(executions=report))

    async def load(self, *, resident_adapters: Sequence[str] = (), **fields: int) -> None:
        load = engine_pb2.LoadReport(resident_adapters=resident_adapters)
        for name, value in fields.items():
            setattr(load, name, value)
        await self.send(worker_registry_service_pb2.ConnectRequest(load=load))

    async def loading(self, progress: engine_pb2.LoadProgress) -> None:
        await self.send(worker_registry_service_pb2.ConnectRequest(loading=progress))

    async def loaded(self, info: engine_pb2.EngineInfo) -> None:
        await self.send(worker_registry_service_pb2.ConnectRequest(loaded=info))

    async def drain(self) -> None:
        drain = worker_registry_service_pb2.Drain()
        await self.send(worker_registry_service_pb2.ConnectRequest(drain=drain))

    async def close(self) -> None:
        """Ends the stream in good order."""
        await self._call.done_writing()

    async def read(self) -> worker_registry_service_pb2.ConnectResponse:
        async with asyncio.timeout(PATIENCE_S):
            response = await self._call.read()
        assert isinstance(response, worker_registry_service_pb2.ConnectResponse), "ended"
        return response

    async def error(self) -> MaasError:
        """Waits for the scheduler to end the stream; returns why."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                received = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            return error_of(failure)
        raise AssertionError(f"the stream goes on: {received!r}")


class Watcher:
    """Reads a watch."""

    def __init__(self, stream: WatchCall) -> None:
        self._stream = stream

    async def read(self) -> worker_service_pb2.WatchWorkersResponse:
        async with asyncio.timeout(PATIENCE_S):
            response = await self._stream.read()
        assert isinstance(response, worker_service_pb2.WatchWorkersResponse)
        return response

    async def change(self) -> worker_pb2.Worker:
        """The next change, which is of one worker."""
        while True:
            response = await self.read()
            assert not response.snapshot_complete
            if response.workers:
                (worker,) = response.workers
                return worker


def duration(seconds: float) -> Duration:
    message = Duration()
    message.FromMilliseconds(round(seconds * 1000))
    return message


def register(
    name: str = "a",
    *,
    capacity: int = 1,
    versions: Sequence[str] = (VERSION,),
    running: Sequence[str] = (),
    incarnation: str = "one",
    loading: engine_pb2.LoadProgress | None = None,
) -> worker_registry_service_pb2.Register:
    """What a worker says first."""
    return worker_registry_service_pb2.Register(
        loading=loading,
        worker=f"workers/{name}",
        incarnation=incarnation,
        endpoint=f"{name}:50055",
        running_execution_ids=running,
        info=engine_pb2.EngineInfo(
            engine="sim",
            engine_version="1",
            model_versions=versions,
            context_length=4096,
            max_running=capacity,
            max_waiting=2,
            vocabulary_size=100,
            digest="sha256:00",
            capabilities=capabilities_pb2.Capabilities(chat=True, max_outputs=4),
        ),
    )


_INSTANCES = itertools.count(1)


@asynccontextmanager
async def running_scheduler(dsn: str, config: SchedulerSection = CONFIG) -> AsyncIterator[Running]:
    """Runs one process's worth of scheduler on a migrated database."""
    callers = Callers()
    clock = FakeClock()
    scheduler = Scheduler(config.for_core(), clock, instance=f"test{next(_INSTANCES)}")
    section = PostgresSection(dsn=dsn, connections_max=4)
    async with await postgres.connect(section, schema="scheduler") as database:
        store = SchedulerStore(database)
        server = Server(ANY_PORT, callers.identity(ALLOW))
        server.add(PlacementService(scheduler, config), PLACEMENT)
        server.add(WorkerRegistryService(scheduler, store, clock, config), REGISTRY)
        server.add(WorkerService(scheduler, clock, bookmark_s=BOOKMARK_S), WORKERS)
        async with Background() as background, serving(server) as endpoint:
            background.start(scheduler.run(), name="scheduler loop")
            async with (
                grpc.aio.insecure_channel(endpoint) as bare,
                Peer(endpoint, callers.admin, [WORKERS]) as admin,
                Peer(endpoint, callers.tokens["gateway"], [PLACEMENT, WORKERS]) as gateway,
                Peer(endpoint, callers.tokens["worker"], [REGISTRY]) as worker,
            ):
                yield Running(
                    endpoint=endpoint,
                    bare=bare,
                    scheduler=scheduler,
                    clock=clock,
                    callers=callers,
                    admin=admin,
                    gateway=gateway,
                    worker=worker,
                )
                # Whatever a test did, the books are right afterwards.
                assert scheduler._state.check_integrity() == []
