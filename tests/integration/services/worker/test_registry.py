"""The worker's registration, against a scheduler that only listens, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from maas.engine.v1 import engine_pb2
from maas.scheduler.v1 import worker_registry_service_pb2 as pb
from maas.scheduler.v1 import worker_registry_service_pb2_grpc
from typing_extensions import override

from libs.errors import FailedPrecondition, Reason, Unavailable
from libs.process import Background
from libs.rpc import Peer, Server
from libs.testing import FakeClock
from libs.testing.rpc import ANY_PORT, Callers, serving
from services.worker import registry, reports
from services.worker.engine.base import LoadProgress, LoadStage
from services.worker.registry import PROGRESS_EVERY_S, SERVICES, Registration, Serving
from tests.integration.services.worker.harness import (
    PATIENCE_S,
    STEPWISE,
    WORKER,
    Worker,
    execution,
    make_engine,
    running_worker,
)

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

CONNECT = "maas.scheduler.v1.WorkerRegistryService/Connect"
INFO = engine_pb2.EngineInfo(engine="sim", max_running=4)
LITTLE = engine_pb2.EngineInfo(engine="sim", model_versions=["models/m/versions/1"])


@dataclass
class Connection:
    """One worker's stream, as the scheduler sees it."""

    register: pb.Register
    messages: list[pb.ConnectRequest] = field(default_factory=list)
    cut: asyncio.Event = field(default_factory=asyncio.Event)

    def count(self, kind: str) -> int:
        return sum(message.WhichOneof("message") == kind for message in self.messages)

    @property
    def started(self) -> list[str]:
        return [name for item in self.messages for name in item.executions.started_execution_ids]

    @property
    def ended(self) -> list[str]:
        return [name for item in self.messages for name in item.executions.ended_execution_ids]


class Scheduler(worker_registry_service_pb2_grpc.WorkerRegistryServiceServicer):
    """Accepts workers and writes down what they say."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.attempts = 0
        self.refuses = False
        self.is_mute = False
        self.fences = False

    @override
    async def Connect(self, _: object, context: Context) -> None:  # type: ignore[override]  # reads and writes by itself
        self.attempts += 1
        if self.refuses:
            raise Unavailable("not now")
        first = await context.read()
        connection = Connection(first.register)
        self.connections.append(connection)
        if self.is_mute:
            await connection.cut.wait()
        await context.write(
            pb.ConnectResponse(
                welcome=pb.Welcome(
                    epoch=10 + len(self.connections),
                    heartbeat_interval=Duration(seconds=1),
                    lease_duration=Duration(seconds=5),
                )
            )
        )
        reading = asyncio.ensure_future(self._listen(context, connection))
        await asyncio.wait(
            [reading, asyncio.ensure_future(connection.cut.wait())],
            return_when=asyncio.FIRST_COMPLETED,
        )
        reading.cancel()
        if self.fences:
            raise FailedPrecondition("another has taken its place", reason=Reason.FENCED)

    async def _listen(self, context: Context, connection: Connection) -> None:
        while True:
            message = await context.read()
            if message is grpc.aio.EOF:
                return
            connection.messages.append(message)


@dataclass
class World:
    clock: FakeClock
    scheduler: Scheduler
    worker: Worker
    registration: Registration
    loaded: Serving

    @property
    def last(self) -> Connection:
        return self.scheduler.connections[-1]

    async def eventually(
        self, condition: Callable[[], bool], *, is_time_moving: bool = False
    ) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                if is_time_moving:
                    self.clock.advance(0.25)
                await asyncio.sleep(0.001)

    async def connected(self, count: int = 1) -> None:
        await self.eventually(
            lambda: len(self.scheduler.connections) >= count and self.registration.is_up.is_set(),
            is_time_moving=count > 1,
        )


@asynccontextmanager
async def registering(gather_s: float = 0.0, *, is_loaded: bool = True) -> AsyncIterator[World]:
    clock = FakeClock()
    callers = Callers()
    server = Server(ANY_PORT, callers.identity({CONNECT: ["worker"]}))
    scheduler = Scheduler()
    server.add(scheduler, SERVICES[0])
    engine = make_engine(clock, STEPWISE)
    async with (
        serving(server) as endpoint,
        running_worker(clock=clock, engine=engine) as worker,
        Peer(endpoint, callers.tokens["worker"], SERVICES) as peer,
        Background() as background,
    ):
        registration = Registration(
            peer,
            worker.reports,
            register=pb.Register(worker=WORKER, incarnation="i", endpoint="h:1", info=LITTLE),
            clock=clock,
            gather_s=gather_s,
        )
        loaded = Serving(engine=engine, executions=worker.executions, info=INFO)
        if is_loaded:
            registration.loaded(loaded)
        background.start(registration.run(), name="registration")
        yield World(clock, scheduler, worker, registration, loaded)


async def test_says_who_it_is_and_takes_the_epoch() -> None:
    async with registering() as world:
        await world.connected()

        register = world.last.register
        assert (register.worker, register.incarnation, register.endpoint) == (WORKER, "i", "h:1")
        assert register.info == INFO
        assert world.worker.executions.epoch == 11


async def test_reports_its_load_at_once_and_with_every_heartbeat() -> None:
    async with registering() as world:
        await world.connected()
        await world.eventually(lambda: world.last.count("load") == 1)

        for beats in (2, 3):
            world.clock.advance(1.0)
            await world.eventually(lambda want=beats: world.last.count("load") == want)  # type: ignore[misc] # bound at once

        assert world.last.messages[0].load.running == 0


async def test_starts_and_ends_are_reported_without_a_heartbeat() -> None:
    async with registering() as world, world.worker.gateway() as gateway:
        await world.connected()

        await gateway.send(execution(1, tokens=99, epoch=99), execution(2, tokens=99, epoch=99))
        await world.eventually(lambda: len(world.last.started) == 2)
        await gateway.send(abort_lanes=[1])
        await world.eventually(lambda: world.last.ended == ["execution-1"])

        assert world.last.count("executions") == 2, "one turn of the loop is one report"


async def test_a_short_execution_is_one_report() -> None:
    async with registering(gather_s=0.005) as world, world.worker.gateway() as gateway:
        await world.connected()
        await world.eventually(lambda: world.last.count("load") == 1, is_time_moving=True)
        await gateway.send(execution(1, tokens=99, epoch=99), execution(2, tokens=99, epoch=99))
        await gateway.read()
        await gateway.send(abort_lanes=[1])
        await gateway.until_ended(1)
        assert world.last.count("executions") == 0

        await world.eventually(lambda: world.last.ended == ["execution-1"], is_time_moving=True)

        assert sorted(world.last.started) == ["execution-1", "execution-2"]
        assert world.last.count("executions") == 1


async def test_a_gateway_that_is_gone_frees_its_places_at_the_scheduler() -> None:
    async with registering() as world:
        await world.connected()
        async with world.worker.gateway() as gateway:
            await gateway.send(execution(1, tokens=99, epoch=99), execution(2, tokens=99, epoch=99))
            await world.eventually(lambda: len(world.last.started) == 2)

        await world.eventually(lambda: len(world.last.ended) == 2)


async def test_a_lost_scheduler_is_found_again_and_told_what_runs() -> None:
    async with registering() as world, world.worker.gateway() as gateway:
        await world.connected()
        await gateway.send(execution(1, tokens=9999, epoch=99), execution(2, tokens=9999, epoch=99))
        await world.eventually(lambda: len(world.last.started) == 2)

        world.last.cut.set()
        await world.eventually(lambda: not world.registration.is_up.is_set())
        await gateway.send(abort_lanes=[2])
        await gateway.until_ended(2)
        await world.connected(2)

        assert list(world.last.register.running_execution_ids) == ["execution-1"]
        assert world.worker.executions.epoch == 12
        assert gateway.told[1].ended is None, "it served all the while"
        await world.eventually(lambda: world.last.count("load") == 1)
        assert world.last.ended == []


async def test_a_scheduler_that_refuses_is_asked_again() -> None:
    async with registering() as world:
        world.scheduler.refuses = True
        await world.eventually(lambda: world.scheduler.attempts >= 3, is_time_moving=True)

        world.scheduler.refuses = False
        await world.eventually(world.registration.is_up.is_set, is_time_moving=True)


async def test_a_worker_whose_name_another_has_taken_does_not_take_it_back_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with registering() as world:
        await world.connected()
        await world.eventually(lambda: world.last.count("load") == 1)
        slept: list[float] = []
        sleep_s = world.clock.sleep_s

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            await sleep_s(seconds)

        monkeypatch.setattr(world.clock, "sleep_s", sleep)
        world.scheduler.fences = True
        world.last.cut.set()
        await world.eventually(lambda: not world.registration.is_up.is_set() and bool(slept))

        assert slept[-1] >= registry.BACKOFF_MAX_S / 2
        await world.connected(2)


async def test_a_scheduler_that_says_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "WELCOME_WITHIN_S", 0.05)
    async with registering() as world:
        world.scheduler.is_mute = True
        await world.eventually(lambda: world.scheduler.attempts >= 2, is_time_moving=True)

        assert not world.registration.is_up.is_set()


async def test_a_drain_is_said_now_and_again_after_a_reconnection() -> None:
    async with registering() as world:
        await world.connected()

        world.registration.drain()
        await world.eventually(lambda: world.last.count("drain") == 1)
        world.last.cut.set()
        await world.connected(2)
        await world.eventually(lambda: world.last.count("drain") == 1)


async def test_too_many_reports_repeat_the_whole_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "PENDING_MAX", 2)
    async with registering() as world:
        await world.connected()
        for number in range(3):
            world.worker.reports.started(f"e{number}")

        await world.connected(2)

        assert list(world.last.register.running_execution_ids) == []


async def test_a_worker_that_loads_says_how_far_it_is_and_then_that_it_takes_work() -> None:
    async with registering(is_loaded=False) as world, world.worker.gateway() as gateway:
        await world.connected()
        assert world.last.register.info == LITTLE
        assert world.last.register.loading.stage == engine_pb2.LOAD_STAGE_CHECKING

        world.registration.tell(LoadProgress(LoadStage.LOADING, 0.5))
        half = engine_pb2.LoadProgress(stage=engine_pb2.LOAD_STAGE_LOADING, fraction=0.5)
        await world.eventually(lambda: half in [item.loading for item in world.last.messages])
        world.registration.loaded(world.loaded)
        await world.eventually(lambda: world.last.count("loaded") == 1)
        assert world.worker.executions.epoch == 11
        await gateway.send(execution(1, tokens=99, epoch=11))
        await world.eventually(lambda: world.last.started == ["execution-1"])
        world.clock.advance(1.0)
        await world.eventually(lambda: world.last.count("load") == 1)

        kinds = [item.WhichOneof("message") for item in world.last.messages]
        assert kinds.index("loaded") < kinds.index("executions")
        assert world.last.messages[kinds.index("loaded")].loaded == INFO


async def test_progress_is_told_twice_a_second_at_most_and_renews_the_lease() -> None:
    async with registering(is_loaded=False) as world:
        await world.connected()
        await world.eventually(lambda: world.last.count("loading") == 1, is_time_moving=False)
        for percent in range(100):
            world.registration.tell(LoadProgress(LoadStage.LOADING, percent / 100))
            await asyncio.sleep(0)
        await world.eventually(lambda: world.last.count("loading") == 2)

        world.clock.advance(PROGRESS_EVERY_S)
        await world.eventually(lambda: world.last.count("loading") == 3)
        assert world.last.messages[-1].loading.fraction == 0.99
        world.clock.advance(1.0)
        await world.eventually(lambda: world.last.count("loading") == 4)

        assert world.last.count("load") == 0


async def test_a_worker_that_lost_its_scheduler_while_loading_comes_again_as_it_is_by_then() -> (
    None
):
    async with registering(is_loaded=False) as world:
        await world.connected()
        world.registration.tell(LoadProgress(LoadStage.LOADING))
        world.last.cut.set()
        await world.connected(2)
        assert world.last.register.loading.stage == engine_pb2.LOAD_STAGE_LOADING

        world.scheduler.refuses = True
        world.last.cut.set()
        await world.eventually(lambda: not world.registration.is_up.is_set())
        world.registration.loaded(world.loaded)
        world.scheduler.refuses = False
        await world.connected(3)

        assert not world.last.register.HasField("loading")
        assert world.last.register.info == INFO
        assert world.worker.executions.epoch == 13
        await world.eventually(lambda: world.last.count("load") == 1)
        assert world.last.count("loaded") == 0
