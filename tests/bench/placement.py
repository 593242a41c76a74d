"""CPU of a placement, with slots leased in advance and without: `python -m tests.bench.placement`.

A minute and a half. A scheduler process, a PostgreSQL and a worker process of this run; this
process is the gateway. Its links to workers accept at once, at no cost, and each execution starts
and ends right away, so what is left is the placement. The worker process reports to the scheduler
what has started and ended, as workers do. Modes alternate; "none" asks nobody and shows what the
loop of this script and those reports cost, to be taken off the other modes.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from maas.engine.v1 import engine_pb2
from maas.scheduler.v1 import worker_registry_service_pb2 as registry_pb
from maas.scheduler.v1 import worker_registry_service_pb2_grpc as registry_grpc
from typing_extensions import override

from libs.auth import sha256_of
from libs.clock import SystemClock
from libs.postgres import cluster
from libs.process import Background
from libs.rpc import Peer
from libs.testing import eventually
from services.gateway import clients
from services.gateway.generation import Inlet
from services.gateway.links import Link, LinkPool
from services.gateway.placement import Placer, Slot, Target, Wanted
from services.gateway.spares import Spares
from services.gateway.tables import Workers
from tests.bench.processes import cpu_s
from tests.conftest import SERVICES as SCHEMAS
from tests.conftest import PostgresCluster, leashed

PORT = 58954
CAPACITY = 1024
RATES = (50, 500)
SECONDS = 4.0
ROUNDS = 3
MODES = ("none", "asked", "leased")
VERSION = "models/bench/versions/1"
WORKER = "workers/bench"
GATEWAY_TOKEN, WORKER_TOKEN = "ms_gateway", "ms_worker"
REGISTRY = registry_pb.DESCRIPTOR.services_by_name["WorkerRegistryService"]
REPORT_S = 0.01
CONFIG = """
[server]
listen = "127.0.0.1:{port}"
metrics_listen = "127.0.0.1:{metrics_port}"
[log]
level = "warning"
[identity]
name = "scheduler"
token_file = "{state}/token"
[identity.callers]
gateway = "{state}/gateway.sha256"
worker = "{state}/worker.sha256"
[identity.allow]
"maas.scheduler.v1.PlacementService/AcquireSlot" = ["gateway"]
"maas.scheduler.v1.PlacementService/ReleaseSlots" = ["gateway"]
"maas.scheduler.v1.WorkerService/WatchWorkers" = ["gateway"]
"maas.scheduler.v1.WorkerRegistryService/Connect" = ["worker"]
[auth]
endpoint = "127.0.0.1:1"
[postgres]
dsn = "{dsn}"
"""


@dataclass(slots=True)
class Result:
    """One mode at one rate.

    Attributes:
        gateway_us: CPU microseconds of this process for each placement, once a run.
        scheduler_us: the scheduler's.
        place_ms: time that each placement took.
    """

    gateway_us: list[float] = field(default_factory=list)
    scheduler_us: list[float] = field(default_factory=list)
    place_ms: list[float] = field(default_factory=list)

    @property
    def medians(self) -> tuple[float, float]:
        """Of the gateway and of the scheduler."""
        return statistics.median(self.gateway_us), statistics.median(self.scheduler_us)


class InstantLink(Link):
    """A link whose worker accepts at once and is done at once."""

    def __init__(self, worker: str, endpoint: str, over: list[str]) -> None:
        super().__init__(worker, endpoint, "")
        self._over = over

    @property
    @override
    def is_up(self) -> bool:
        return True

    @override
    def start(self, execution: engine_pb2.Execution, sink: Inlet) -> int:
        self._over.append(execution.execution_id)
        sink.accept(1)
        return 1


class InstantLinks(LinkPool):
    """Links of that kind; `over` has the executions that are to be reported."""

    def __init__(self, background: Background) -> None:
        super().__init__("", background)
        self.over: list[str] = []
        self._made: dict[tuple[str, str], InstantLink] = {}

    @override
    def get(self, worker: str, endpoint: str) -> InstantLink:
        link = self._made.get((worker, endpoint))
        if link is None:
            link = self._made[worker, endpoint] = InstantLink(worker, endpoint, self.over)
        return link


class Bench:
    """A gateway's placement, and what it costs."""

    def __init__(
        self, scheduler: Peer, background: Background, worker: asyncio.StreamWriter
    ) -> None:
        self._worker = worker
        self._client = clients.SchedulerClient(scheduler, background)
        self._links = InstantLinks(background)
        self._table = Workers()
        self._runs = itertools.count()
        background.start(
            clients.follow_workers(scheduler, self._table, self._links), name="follow workers"
        )
        background.start(self._tell_worker(), name="tell worker")

    async def wait_for_worker(self) -> None:
        """Waits until the worker is in the gateway's table."""
        await self._table.wait()
        await eventually(lambda: bool(self._table.serving(VERSION, set())), within_s=30.0)

    async def _tell_worker(self) -> None:
        while True:
            over, self._links.over[:] = self._links.over[:], []
            if over:
                self._worker.write((" ".join(over) + "\n").encode())
            await asyncio.sleep(REPORT_S)

    async def _acquire_nothing(self, *_: object) -> Slot:
        return Slot(slot_id=None, targets=[Target(worker=WORKER, endpoint="bench:1", epoch=1)])

    @asynccontextmanager
    async def _placer(self, mode: str) -> AsyncIterator[Placer]:
        prefix = f"bench.{os.getpid()}.{next(self._runs)}"
        async with Background() as background:
            spares: Spares | None = None
            if mode == "leased":
                spares = Spares(
                    lease=self._client.lease,
                    release=self._client.release_all,
                    workers=self._table,
                    clock=SystemClock(),
                    id_prefix=prefix,
                )
                background.start(spares.run(), name="spares")
            yield Placer(
                acquire=self._acquire_nothing if mode == "none" else self._client.acquire,
                release=self._client.release,
                workers=self._table,
                links=self._links,
                spares=spares,
            )

    async def measure(self, mode: str, rate: int, scheduler_pid: int, result: Result) -> None:
        """Places at a steady rate, each in a task of its own, as requests come."""
        async with self._placer(mode) as placer:
            prefix = f"gen.{os.getpid()}.{next(self._runs)}"
            # The first second fills pools and connections.
            await self._place_for(1.0, placer, prefix, rate, Result())
            own, scheduler = time.process_time(), cpu_s(scheduler_pid)
            count = await self._place_for(SECONDS, placer, prefix + "x", rate, result)
            result.gateway_us.append((time.process_time() - own) / count * 1e6)
            result.scheduler_us.append((cpu_s(scheduler_pid) - scheduler) / count * 1e6)

    async def _place_for(
        self, seconds: float, placer: Placer, prefix: str, rate: int, result: Result
    ) -> int:
        async def place(number: int) -> None:
            wanted = Wanted(
                execution_id=f"{prefix}.{number}",
                model_version=VERSION,
                project="projects/bench",
                max_wait_s=5.0,
            )
            begun = time.perf_counter()
            _ = await placer.place(wanted, _execution)
            result.place_ms.append((time.perf_counter() - begun) * 1e3)

        count = round(seconds * rate)
        begun = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number in range(count):
                await asyncio.sleep(begun + number / rate - time.perf_counter())
                tasks.create_task(place(number))
        return count


def _execution(execution_id: str, epoch: int) -> engine_pb2.Execution:
    return engine_pb2.Execution(execution_id=execution_id, epoch=epoch)


async def run_worker() -> None:
    """The worker process: reports as started and ended what standard input names."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    info = engine_pb2.EngineInfo(
        engine="bench", model_versions=[VERSION], max_running=CAPACITY, max_waiting=CAPACITY
    )
    register = registry_pb.Register(
        worker=WORKER, incarnation="bench", endpoint="bench:1", info=info
    )
    async with AsyncExitStack() as stack:
        peer = await stack.enter_async_context(Peer(f"127.0.0.1:{PORT}", WORKER_TOKEN, [REGISTRY]))
        async with asyncio.timeout(30):
            await peer.channel.channel_ready()
        stub = registry_grpc.WorkerRegistryServiceStub(peer.channel)
        call = await stack.enter_async_context(peer.both_ways(stub.Connect))
        await call.write(registry_pb.ConnectRequest(register=register))
        while True:
            try:
                async with asyncio.timeout(1.0):
                    line = await reader.readline()
            except TimeoutError:
                await call.write(registry_pb.ConnectRequest(load=engine_pb2.LoadReport()))
                continue
            if not line:
                return
            names = line.decode().split()
            report = registry_pb.ExecutionReport(
                started_execution_ids=names, ended_execution_ids=names
            )
            await call.write(registry_pb.ConnectRequest(executions=report))


@contextmanager
def scheduler_process(state: Path, dsn: str) -> Iterator[int]:
    """Runs the scheduler; gives its process id."""
    (state / "token").write_text("ms_scheduler")
    (state / "gateway.sha256").write_text(sha256_of(GATEWAY_TOKEN).hex())
    (state / "worker.sha256").write_text(sha256_of(WORKER_TOKEN).hex())
    config = state / "scheduler.toml"
    text = CONFIG.format(port=PORT, metrics_port=PORT + 1000, state=state, dsn=dsn)
    config.write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-m", "services.scheduler", "--config", str(config)],
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


async def run(scheduler_pid: int) -> None:
    """Measures all modes in turn and prints a line for each."""
    results = {(rate, mode): Result() for rate in RATES for mode in MODES}
    async with AsyncExitStack() as stack:
        # Before gRPC has threads: it does not like to be forked.
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.bench.placement", "worker", stdin=subprocess.PIPE
        )
        assert worker.stdin is not None
        stack.push_async_callback(worker.wait)
        stack.callback(worker.stdin.close)
        peer = Peer(f"127.0.0.1:{PORT}", GATEWAY_TOKEN, clients.SCHEDULER_SERVICES)
        scheduler = await stack.enter_async_context(peer)
        async with asyncio.timeout(30):
            await scheduler.channel.channel_ready()
        background = await stack.enter_async_context(Background())
        bench = Bench(scheduler, background, worker.stdin)
        await bench.wait_for_worker()
        for _ in range(ROUNDS):
            for (rate, mode), result in results.items():
                await bench.measure(mode, rate, scheduler_pid, result)
    report(results)


def report(results: dict[tuple[int, str], Result]) -> None:
    """Prints medians of the runs."""
    print(f"medians of {ROUNDS} alternating runs; CPU us for each placement")
    print("rate/s  mode    gateway  scheduler  both less none   p50 ms   p99 ms")
    for (rate, mode), result in results.items():
        none = results[rate, "none"]
        gateway, scheduler = result.medians
        more = gateway + scheduler - sum(none.medians)
        ordered = sorted(result.place_ms)
        p50, p99 = (ordered[int(len(ordered) * share)] for share in (0.5, 0.99))
        print(
            f"{rate:6d}  {mode:6}  {gateway:7.0f}  {scheduler:9.0f}"
            f"  {more:14.0f}  {p50:7.3f}  {p99:7.3f}"
        )


def main() -> None:
    """Runs everything in a temporary directory."""
    if sys.argv[1:] == ["worker"]:
        uvloop.run(run_worker())
        return
    with tempfile.TemporaryDirectory(prefix="maas-bench-") as folder:
        state = Path(folder)
        state.chmod(0o711)
        found = cluster.place(state)
        try:
            with cluster.running(found, prefix=leashed(found.owner)):
                server = PostgresCluster(found, dict.fromkeys(SCHEMAS, "bench"))
                server.create_schemas("maas")
                with scheduler_process(state, server.dsn("scheduler", "maas")) as pid:
                    uvloop.run(run(pid))
        finally:
            found.destroy()


if __name__ == "__main__":
    main()
