"""The worker's side of WorkerRegistryService.Connect: who it is, how loaded, what runs.

    connect -> Register -> Welcome(epoch) -> LoadReport every heartbeat, ExecutionReport soon,
    Drain -> stream lost -> wait a little, connect again with the whole state, for ever

It begins before the model is loaded: Register then says so, LoadProgress takes the place of
reports, and `loaded` says once that the worker takes work.

The worker serves all the while: without a scheduler it keeps its epoch and what runs on it.
One task writes; what happens within a few milliseconds goes into one report.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import structlog
from maas.engine.v1 import engine_pb2
from maas.scheduler.v1 import worker_registry_service_pb2 as registry_pb
from maas.scheduler.v1 import worker_registry_service_pb2_grpc

from libs.clock import CancelTimer, Clock
from libs.errors import MaasError, Reason, Unavailable, unavailable
from libs.rpc import Peer
from services.worker.config import WorkerSection
from services.worker.convert import load_to_pb, progress_to_pb
from services.worker.engine.base import Engine, LoadProgress, LoadStage
from services.worker.executions import Executions
from services.worker.reports import Reports

if TYPE_CHECKING:
    from grpc.aio import StreamStreamCall

    Call = StreamStreamCall[registry_pb.ConnectRequest, registry_pb.ConnectResponse]

log = structlog.get_logger(__name__)

SERVICES = [registry_pb.DESCRIPTOR.services_by_name["WorkerRegistryService"]]
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0
# A scheduler that accepts the connection and then says nothing is left after this long.
WELCOME_WITHIN_S = 15.0
# How long starts and ends are gathered before they are reported. A free place is known that much
# later; a short execution is one message instead of two, and a busy worker sends 200 a second.
GATHER_S = 0.005
# So many times as long while half of the places are free: then nobody waits for one.
GATHER_IDLE_FACTOR = 10
# Loading is told of at most so often.
PROGRESS_EVERY_S = 0.5
# Ids in one ExecutionReport: half a mebibyte at most.
REPORT_MAX = 4096


def register_of(worker: WorkerSection) -> registry_pb.Register:
    """Says who this process is, and what is known of it before its model is loaded.

    Another process is another incarnation.
    """
    return registry_pb.Register(
        worker=f"workers/{worker.name}",
        incarnation=secrets.token_hex(16),
        endpoint=worker.endpoint,
        info=engine_pb2.EngineInfo(engine=worker.engine, model_versions=[worker.model_version]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What a worker has to report of, once its model is loaded.

    Attributes:
        engine: whose load is reported.
        executions: what runs; its epoch is set.
        info: what the worker is.
    """

    engine: Engine
    executions: Executions
    info: engine_pb2.EngineInfo


class Registration:
    """Keeps the worker registered. `run` it in the background.

    Attributes:
        is_up: set while a scheduler has accepted the worker.
    """

    def __init__(
        self,
        peer: Peer,
        reports: Reports,
        *,
        register: registry_pb.Register,
        clock: Clock,
        gather_s: float = GATHER_S,
    ) -> None:
        """Keeps what it needs.

        Args:
            peer: the scheduler.
            reports: what started and ended.
            register: who the worker is, and what is known of it before its model is loaded; the
                rest is filled in here.
            clock: for heartbeats and the wait between two attempts.
            gather_s: how long starts and ends are gathered before they are reported.
        """
        self.is_up = asyncio.Event()
        self._peer = peer
        self._stub = worker_registry_service_pb2_grpc.WorkerRegistryServiceStub(peer.channel)
        self._reports = reports
        self._register = register
        self._clock = clock
        self._gather_s = gather_s
        self._serving: Serving | None = None
        self._epoch = 0
        self._progress = LoadProgress(LoadStage.CHECKING)
        self._progress_told_s = float("-inf")
        self._is_progress_due = False
        self._progress_timer: CancelTimer | None = None
        self._is_draining = False
        self._is_heartbeat_due = False

    def tell(self, progress: LoadProgress) -> None:
        """Tells the scheduler how far loading is, soon; of what comes in between only the last."""
        self._progress = progress
        if self._progress_timer is None and self._serving is None:
            wait_s = self._progress_told_s + PROGRESS_EVERY_S - self._clock.monotonic_s()
            self._progress_timer = self._clock.call_after(max(wait_s, 0.0), self._is_due_to_tell)

    def loaded(self, serving: Serving) -> None:
        """Tells the scheduler that the worker takes work, now and after every reconnection."""
        self._serving = serving
        serving.executions.epoch = self._epoch
        if self._progress_timer is not None:
            self._progress_timer()
        self._reports.changed.set()

    def drain(self) -> None:
        """Tells the scheduler, now and after every reconnection, that nothing new is taken."""
        self._is_draining = True
        self._reports.changed.set()

    async def run(self) -> None:
        """Connects, again and again, for ever."""
        backoff_s = BACKOFF_MIN_S
        while True:
            is_fenced = False
            try:
                async with self._peer.both_ways(self._stub.Connect) as call:
                    await self._converse(call)
            except (MaasError, TimeoutError) as error:
                log.warning("scheduler lost", endpoint=self._peer.endpoint, cause=str(error))
                is_fenced = isinstance(error, MaasError) and error.reason is Reason.FENCED
            if self.is_up.is_set():
                self.is_up.clear()
                # Two processes with one name would take it from each other again and again.
                backoff_s = BACKOFF_MAX_S if is_fenced else BACKOFF_MIN_S
            self._reports.close()
            # Chance spreads the workers of a scheduler that comes back.
            await self._clock.sleep_s(backoff_s * (0.5 + random.random()))  # noqa: S311 - not a secret
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    def _is_due_to_tell(self) -> None:
        self._progress_timer = None
        self._progress_told_s = self._clock.monotonic_s()
        self._is_progress_due = True
        self._reports.changed.set()

    async def _converse(self, call: Call) -> None:
        is_loading = self._serving is None
        heartbeat_s = await self._introduce(call)
        self.is_up.set()
        log.info("registered", epoch=self._epoch, is_loading=is_loading)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write(call, is_loading=is_loading), name="report")
                tasks.create_task(self._beat(heartbeat_s), name="heartbeat")
                # Nothing more is said to workers yet; this waits for the end of the stream.
                while await call.read() is not grpc.aio.EOF:
                    pass
                raise unavailable("scheduler")
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _introduce(self, call: Call) -> float:
        """Registers; returns the heartbeat interval, seconds."""
        register = registry_pb.Register()
        register.CopyFrom(self._register)
        if self._serving is None:
            register.loading.CopyFrom(progress_to_pb(self._progress))
        else:
            register.info.CopyFrom(self._serving.info)
            register.running_execution_ids.extend(self._serving.executions.running_ids())
        # From here on changes are kept: nothing is lost between this state and the first report.
        self._reports.open()
        async with asyncio.timeout(WELCOME_WITHIN_S):
            await call.write(registry_pb.ConnectRequest(register=register))
            response = await call.read()
        if not isinstance(response, registry_pb.ConnectResponse):
            raise unavailable("scheduler")
        self._epoch = response.welcome.epoch
        if self._serving is not None:
            self._serving.executions.epoch = self._epoch
        return response.welcome.heartbeat_interval.ToNanoseconds() / 1e9

    async def _beat(self, heartbeat_s: float) -> None:
        while True:
            self._is_heartbeat_due = True
            self._reports.changed.set()
            await self._clock.sleep_s(heartbeat_s)

    async def _write(self, call: Call, *, is_loading: bool) -> None:
        """Writes what there is to say, until the stream ends; the reader hears why.

        Args:
            call: the stream.
            is_loading: as which the worker has registered.
        """
        is_drain_said = False
        try:
            while not self._reports.overflowed:
                # First, so that what changes while something is written is not missed.
                self._reports.changed.clear()
                if is_loading and self._serving is not None:
                    is_loading = False
                    await call.write(registry_pb.ConnectRequest(loaded=self._serving.info))
                await self._write_executions(call)
                if self._is_draining and not is_drain_said:
                    is_drain_said = True
                    await call.write(registry_pb.ConnectRequest(drain=registry_pb.Drain()))
                await self._write_state(call)
                await self._reports.changed.wait()
                await self._clock.sleep_s(self._gather_for_s())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return
        raise Unavailable("more happened than is kept for the scheduler: registering anew")

    async def _write_state(self, call: Call) -> None:
        """Writes how loaded the worker is, or how far it is with loading, if that is due."""
        serving = self._serving
        if self._is_heartbeat_due or (self._is_progress_due and serving is None):
            self._is_heartbeat_due = self._is_progress_due = False
            if serving is None:
                progress = progress_to_pb(self._progress)
                await call.write(registry_pb.ConnectRequest(loading=progress))
                return
            load = load_to_pb(serving.engine.load(), preparing=serving.executions.preparing)
            await call.write(registry_pb.ConnectRequest(load=load))

    def _gather_for_s(self) -> float:
        serving = self._serving
        if serving is None:
            return 0.0
        is_ample = 2 * serving.executions.count <= serving.info.max_running
        return self._gather_s * GATHER_IDLE_FACTOR if is_ample else self._gather_s

    async def _write_executions(self, call: Call) -> None:
        while True:
            started, ended = self._reports.take(REPORT_MAX)
            if not started and not ended:
                return
            report = registry_pb.ExecutionReport(
                started_execution_ids=started, ended_execution_ids=ended
            )
            await call.write(registry_pb.ConnectRequest(executions=report))
