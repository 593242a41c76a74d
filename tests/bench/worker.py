"""What the worker process costs by itself: `python -m tests.bench.worker`.

Starts `python -m services.worker` with the simulated engine, and drives it over ExecuteMany from
this process, which is its scheduler too. CPU is that of the worker's whole process: engine, pump,
outbox, protobuf, gRPC, reports.

    paced     256 streams at 50 tokens/s each, all in one step every 20 ms
    flat out  256 streams, an engine that takes no time
    single    executions of one output token: 8 at a time, 64 at a time, 100 in a second
    idle      registered, nothing runs
    llamacpp  a model of more than 100 million parameters, against the same engine without a worker
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import uvloop
from google.protobuf.duration_pb2 import Duration
from maas.engine.v1 import engine_pb2, engine_service_pb2_grpc
from maas.engine.v1 import engine_service_pb2 as pb
from maas.inference.v1 import generation_pb2
from maas.scheduler.v1 import worker_registry_service_pb2 as registry_pb
from maas.scheduler.v1 import worker_registry_service_pb2_grpc
from typing_extensions import override

from libs.rpc import Peer
from tests.bench import bare, random_model
from tests.bench.load import PROMPT_TOKENS, Load
from tests.bench.processes import children_of, cpu_ns

if TYPE_CHECKING:
    from grpc.aio import ServicerContext, StreamStreamCall

    Context = ServicerContext[Any, Any]
    Call = StreamStreamCall[pb.ExecuteManyRequest, pb.ExecuteManyResponse]

ROOT = Path(__file__).resolve().parent.parent.parent
SERVICE = pb.DESCRIPTOR.services_by_name["EngineService"]
MODEL_VERSION = "models/sim/versions/1"
CONTEXT_LENGTH = 1 << 20
STREAMS = 256
STEP_S = 0.02
# Tokens of a stream that outlasts its measurement.
ENDLESS = CONTEXT_LENGTH - 64
GRANT = 64
TIMEOUT_S = 60.0
HEARTBEAT_S = 1
CASES = ["paced", "flat", "single", "idle", "llamacpp"]
VOCABULARY = ROOT / "services" / "worker" / "models" / "maas-tiny-story.gguf"
CPU_TOKENS = {1: 192, 8: 48, 32: 24}
"""Tokens of each stream of the CPU engine, by the number of streams."""
CPU_REPEATS = 3

CONFIG = """
[server]
listen = "127.0.0.1:0"
metrics_listen = "127.0.0.1:0"
[identity]
name = "worker"
token_file = "{folder}/worker.token"
[identity.callers]
gateway = "{folder}/gateway.sha256"
[identity.allow]
{allowed}
[peers]
scheduler = "127.0.0.1:{scheduler}"
[worker]
name = "w1"
endpoint = "127.0.0.1:1"
model_version = "{version}"
{engine}
"""
SIM = """
engine = "sim"
capacity = 512
context_length = {context}
[worker.sim]
prefill_tokens_per_s = 0
prefill_chunk_tokens = 1000000000
decode_base = "{step_ms}ms"
decode_per_lane = "0ms"
"""
LLAMACPP = """
engine = "llamacpp"
capacity = 32
model_path = "{path}"
"""


class Scheduler(worker_registry_service_pb2_grpc.WorkerRegistryServiceServicer):
    """Accepts the worker and counts what it says."""

    def __init__(self) -> None:
        self.messages = 0
        self.ended = 0
        self.connected = asyncio.Event()

    @override
    async def Connect(self, _: object, context: Context) -> None:  # type: ignore[override]  # reads and writes by itself
        await context.read()
        welcome = registry_pb.Welcome(
            epoch=1,
            heartbeat_interval=Duration(seconds=HEARTBEAT_S),
            lease_duration=Duration(seconds=10),
        )
        await context.write(registry_pb.ConnectResponse(welcome=welcome))
        self.connected.set()
        while isinstance(message := await context.read(), registry_pb.ConnectRequest):
            self.messages += 1
            self.ended += len(message.executions.ended_execution_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU of the worker over a time.

    Attributes:
        seconds: of the measurement.
        cpu_us: microseconds of CPU.
        events: tokens or executions that it was spent on.
    """

    seconds: float
    cpu_us: float
    events: int

    @override
    def __str__(self) -> str:
        each = f"{self.cpu_us / self.events:8.2f} us each" if self.events else ""
        share = self.cpu_us / self.seconds / 1e4
        return f"{self.events / self.seconds:12,.0f}/s  {each}  {share:5.1f} % of a core"


class Meter:
    """Measures the CPU that a process spends."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before_ns = cpu_ns(pid)
        self._started_s = time.perf_counter()

    def stop(self, events: int) -> Cost:
        """Ends the measurement."""
        return Cost(
            seconds=time.perf_counter() - self._started_s,
            cpu_us=(cpu_ns(self._pid) - self._before_ns) / 1e3,
            events=events,
        )


class Waits:
    """Measures for how much of a time a process's main thread waited, other than for a core."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/schedstat")
        self._before_ns = self._busy_ns()
        self._started_ns = time.monotonic_ns()

    def stop(self) -> float:
        """Ends the measurement; returns a share, 0 to 1."""
        busy_ns = self._busy_ns() - self._before_ns
        return 1 - busy_ns / (time.monotonic_ns() - self._started_ns)

    def _busy_ns(self) -> int:
        """Time on a core and time in the queue for one."""
        run, queued, _ = self._path.read_text().split()
        return int(run) + int(queued)


class Gateway:
    """One ExecuteMany stream and what came on it."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._messages = 0
        self._numbers = 0
        self.tokens = 0
        self.messages = 0
        # By lane: when it was sent, accepted, and spoke first; the waiter for its end.
        self.sent_s: dict[int, float] = {}
        self.accepted_s: dict[int, float] = {}
        self.first_s: dict[int, float] = {}
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._requests: asyncio.Queue[pb.ExecuteManyRequest] = asyncio.Queue(4096)

    async def write(self) -> None:
        """Sends what there is to send; merges what waits."""
        await self._call.write(pb.ExecuteManyRequest(grant=2 * GRANT))
        while True:
            request = await self._requests.get()
            while not self._requests.empty():
                request.MergeFrom(self._requests.get_nowait())
            await self._call.write(request)

    async def read(self) -> None:
        """Takes what comes, until the stream ends."""
        while isinstance(response := await self._call.read(), pb.ExecuteManyResponse):
            self._take(response.events, time.perf_counter())
            self.messages += 1
            if self.messages % GRANT == 0:
                await self._requests.put(pb.ExecuteManyRequest(grant=GRANT))

    async def start(self, tokens: int, *, is_numeric: bool = False) -> int:
        """Starts an execution of a chat, or of the token ids that the bare engine gets."""
        self._numbers += 1
        lane = self._numbers
        self._waiting[lane] = asyncio.get_running_loop().create_future()
        self.sent_s[lane] = time.perf_counter()
        made = execution(lane, tokens)
        if is_numeric:
            made.tokens.ids.extend(range(300, 300 + PROMPT_TOKENS))
            made.sampling.temperature = 0
        await self._requests.put(pb.ExecuteManyRequest(start=[made]))
        return lane

    async def stop(self, lanes: list[int]) -> None:
        """Aborts executions and waits for their ends."""
        await self._requests.put(pb.ExecuteManyRequest(abort_lanes=lanes))
        for lane in lanes:
            await self.ended(lane)

    async def ended(self, lane: int) -> None:
        """Waits for the end of an execution."""
        async with asyncio.timeout(TIMEOUT_S):
            await self._waiting[lane]
        del self._waiting[lane]

    async def speak(self, lanes: list[int]) -> None:
        """Waits until each of some executions has had a token."""
        async with asyncio.timeout(TIMEOUT_S):
            while any(lane not in self.first_s for lane in lanes):  # noqa: ASYNC110 - a measurement
                await asyncio.sleep(0.01)

    def _take(self, events: engine_pb2.StepEvents, now_s: float) -> None:
        self.tokens += len(events.token_ids)
        for accepted in events.accepted:
            self.accepted_s[accepted.lane] = now_s
        if len(self.first_s) < self._numbers:
            for lane in events.lanes:
                self.first_s.setdefault(lane, now_s)
        for ended in events.ended:
            self._waiting[ended.lane].set_result(None)


def execution(lane: int, tokens: int) -> engine_pb2.Execution:
    """Makes an execution as a gateway would."""
    return engine_pb2.Execution(
        lane=lane,
        execution_id=f"gen_g1_{time.perf_counter_ns():020d}_{lane}",
        epoch=1,
        model_version=MODEL_VERSION,
        chat=generation_pb2.ChatInput(
            messages=[
                generation_pb2.ChatMessage(
                    role=generation_pb2.ROLE_USER,
                    parts=[generation_pb2.ContentPart(text="tell me a story about a fox")],
                )
            ]
        ),
        sampling=generation_pb2.SamplingOptions(temperature=1, top_p=1, top_k=0, seed=lane),
        stop=generation_pb2.StopOptions(max_output_tokens=tokens, ignore_eos=True),
        budget=Duration(seconds=600),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A worker and who speaks to it."""

    pid: int
    scheduler: Scheduler
    gateway: Gateway


@asynccontextmanager
async def running(engine: str) -> AsyncIterator[World]:
    """Runs a worker with an engine, which is lines of its configuration."""
    scheduler = Scheduler()
    server = grpc.aio.server()
    worker_registry_service_pb2_grpc.add_WorkerRegistryServiceServicer_to_server(scheduler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with tempfile.TemporaryDirectory() as folder:
        config = _write_config(Path(folder), port, engine)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.worker", "--config", str(config), cwd=ROOT, stdout=PIPE
        )
        try:
            async with (
                asyncio.timeout(10 * TIMEOUT_S),
                Peer(await _address(process), "ms_gateway", [SERVICE]) as peer,
            ):
                await scheduler.connected.wait()
                stub: Any = engine_service_pb2_grpc.EngineServiceStub(peer.channel)
                async with peer.both_ways(stub.ExecuteMany) as call:
                    gateway = Gateway(call)
                    tasks = [asyncio.ensure_future(gateway.write())]
                    tasks.append(asyncio.ensure_future(gateway.read()))
                    yield World(pid=process.pid, scheduler=scheduler, gateway=gateway)
                    for task in tasks:
                        task.cancel()
        finally:
            process.kill()
            await process.wait()
            await server.stop(0)


def sim(step_s: float) -> str:
    """An engine that takes a fixed time for each step."""
    return SIM.format(context=CONTEXT_LENGTH, step_ms=round(step_s * 1000))


def _write_config(folder: Path, scheduler: int, engine: str) -> Path:
    (folder / "worker.token").write_text("ms_worker")
    (folder / "gateway.sha256").write_text(hashlib.sha256(b"ms_gateway").hexdigest())
    allowed = "\n".join(
        f'"{SERVICE.full_name}/{method.name}" = ["gateway"]' for method in SERVICE.methods
    )
    path = folder / "worker.toml"
    path.write_text(
        CONFIG.format(
            folder=folder,
            allowed=allowed,
            scheduler=scheduler,
            version=MODEL_VERSION,
            engine=engine,
        )
    )
    return path


async def _address(process: Process) -> str:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        event = json.loads(line)
        if event["event"] == "listening":
            return f"127.0.0.1:{event['port']}"
    raise SystemExit("the worker did not start")


async def streams(step_s: float, seconds: float) -> None:
    """Measures 256 streams."""
    async with running(sim(step_s)) as world:
        gateway = world.gateway
        lanes = [await gateway.start(ENDLESS) for _ in range(STREAMS)]
        await gateway.speak(lanes)
        meter, tokens, messages = Meter(world.pid), gateway.tokens, gateway.messages
        await asyncio.sleep(seconds)
        cost = meter.stop(gateway.tokens - tokens)
        rate = (gateway.messages - messages) / cost.seconds
        print(f"{'paced' if step_s else 'flat out':24s} {cost}  {rate:,.0f} messages/s")
        await gateway.stop(lanes)


async def single(seconds: float) -> None:
    """Measures executions of one token."""
    async with running(sim(0)) as world:
        for concurrency in (8, 64):
            await _report_single(
                f"single, {concurrency} at a time",
                world,
                lambda ends_s, many=concurrency: _closed(world.gateway, many, ends_s),  # type: ignore[misc] # called at once
                seconds,
            )
        for rate in (20, 100):
            await _report_single(
                f"single, {rate} a second",
                world,
                lambda ends_s, many=rate: _open(world.gateway, many, ends_s),  # type: ignore[misc] # called at once
                seconds,
            )


async def _report_single(
    name: str, world: World, load: Callable[[float], Awaitable[list[int]]], seconds: float
) -> None:
    gateway, scheduler = world.gateway, world.scheduler
    await load(time.perf_counter() + 0.5)
    meter, reports, messages = Meter(world.pid), scheduler.messages, gateway.messages
    lanes = await load(time.perf_counter() + seconds)
    cost = meter.stop(len(lanes))
    print(
        f"{name:24s} {cost}  {(gateway.messages - messages) / len(lanes):.2f} messages and"
        f" {(scheduler.messages - reports) / len(lanes):.2f} reports each;"
        f" accepted {_quantiles(gateway.sent_s, gateway.accepted_s, lanes)},"
        f" first token {_quantiles(gateway.sent_s, gateway.first_s, lanes)}"
    )


async def _closed(gateway: Gateway, many: int, ends_s: float) -> list[int]:
    """Keeps some executions running; returns those that ended."""
    done: list[int] = []

    async def one() -> None:
        while time.perf_counter() < ends_s:
            lane = await gateway.start(1)
            await gateway.ended(lane)
            done.append(lane)

    await asyncio.gather(*(one() for _ in range(many)))
    return done


async def _open(gateway: Gateway, rate: int, ends_s: float) -> list[int]:
    """Starts executions at even distances."""
    done: list[int] = []
    while time.perf_counter() < ends_s:
        done.append(await gateway.start(1))
        await asyncio.sleep(1 / rate)
    for lane in done:
        await gateway.ended(lane)
    return done


def _quantiles(sent_s: dict[int, float], seen_s: dict[int, float], lanes: list[int]) -> str:
    waits = sorted((seen_s[lane] - sent_s[lane]) * 1e3 for lane in lanes)
    last = waits[int(len(waits) * 0.99)]
    return f"p50 {statistics.median(waits):.2f} p99 {last:.2f} ms"


async def idle(seconds: float) -> None:
    """Measures a worker that has nothing to do."""
    async with running(sim(STEP_S)) as world:
        await asyncio.sleep(1)
        meter = Meter(world.pid)
        await asyncio.sleep(seconds)
        print(f"{'idle':24s} {meter.stop(0)}")


async def cpu_engine() -> None:
    """Measures the CPU engine behind the worker against the same child without it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        random_model.write(path, VOCABULARY, random_model.Shape())
        async with running(LLAMACPP.format(path=path)) as world:
            (child,) = children_of(world.pid)
            for count, tokens in CPU_TOKENS.items():
                alone: list[float] = []
                behind: list[float] = []
                spent: list[float] = []
                blocked: list[float] = []
                for _ in range(CPU_REPEATS):
                    alone.append(await asyncio.to_thread(_rate_alone, path, count, tokens))
                    meter = Meter(world.pid)
                    waits = Waits(child)
                    behind.append(await _rate(world.gateway, count, tokens))
                    blocked.append(waits.stop())
                    spent.append(meter.stop(0).cpu_us / count / tokens)
                rates = statistics.median(alone), statistics.median(behind)
                print(
                    f"{f'llamacpp, {count} streams':24s} bare {rates[0]:.1f}/s, behind the worker"
                    f" {rates[1]:.1f}/s: {rates[1] / rates[0]:.3f};"
                    f" {statistics.median(spent):.0f} us of the worker each; the child waited for"
                    f" anything but a core {statistics.median(blocked):.1%} of the time"
                )


def _rate_alone(path: Path, count: int, tokens: int) -> float:
    load = Load(kind="streams", count=count, tokens=tokens)
    result = bare.measure(bare.Spec(model=str(path), capacity=32, step_s=None, load=load))
    return result.tokens / result.seconds


async def _rate(gateway: Gateway, count: int, tokens: int) -> float:
    """Runs some streams at once; returns tokens per second."""
    started_s = time.perf_counter()
    for lane in [await gateway.start(tokens, is_numeric=True) for _ in range(count)]:
        await gateway.ended(lane)
    return count * tokens / (time.perf_counter() - started_s)


async def main(arguments: argparse.Namespace) -> None:
    """Measures what was asked for."""
    seconds = arguments.seconds
    cases: dict[str, Callable[[], Awaitable[None]]] = {
        "paced": lambda: streams(STEP_S, seconds),
        "flat": lambda: streams(0, seconds),
        "single": lambda: single(seconds),
        "idle": lambda: idle(seconds),
        "llamacpp": cpu_engine,
    }
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load average before {load}")
    for name in arguments.case or CASES:
        await cases[name]()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--case", choices=CASES, action="append")
    uvloop.run(main(parser.parse_args()))
