"""A gateway in process: real gRPC on both sides, workers that do what the test says."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from maas.engine.v1 import engine_pb2, engine_service_pb2
from maas.inference.v1 import generation_pb2, generation_service_pb2, generation_service_pb2_grpc

from libs.auth import KeyRecord, KeyTable, Role, new_key, sha256_of
from libs.clock import SystemClock
from libs.config import ServerSection
from libs.errors import FailedPrecondition, Reason, unavailable
from libs.process import Background
from libs.rpc import Peer, Server
from libs.rpc.identity import Identity
from services.gateway.domain import Offering, Price
from services.gateway.journal import Journal
from services.gateway.links import SERVICES, LinkPool
from services.gateway.operations import Generations, Limits
from services.gateway.placement import Placer, Slot, Target, Wanted
from services.gateway.running import Books
from services.gateway.service import GenerationService
from services.gateway.settlement import Settled, Settlement, Settler
from services.gateway.slices import Grant, SliceBook
from services.gateway.tables import Offerings, Prices, no_ready_worker
from services.gateway.tables import Worker as KnownWorker
from services.gateway.tables import Workers as WorkerTable

if TYPE_CHECKING:
    from grpc.aio import ServicerContext, UnaryStreamCall

    Context = ServicerContext[
        engine_service_pb2.ExecuteManyRequest, engine_service_pb2.ExecuteManyResponse
    ]
    Stream = UnaryStreamCall[
        generation_service_pb2.StreamGenerateRequest,
        generation_service_pb2.StreamGenerateResponse,
    ]

TOKEN = "ms_gateway_test"
END = generation_pb2.OutputEnd(reason=generation_pb2.FINISH_REASON_END)


class ScriptedWorker:
    """An EngineService whose streams the test drives."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[engine_service_pb2.ExecuteManyRequest] = asyncio.Queue()
        self.responses: asyncio.Queue[engine_pb2.StepEvents | None] = asyncio.Queue()
        self.granted = 0
        self.grants: asyncio.Queue[int] = asyncio.Queue()
        self.streams = 0

    async def ExecuteMany(self, _: object, context: Context) -> None:  # noqa: N802
        self.streams += 1
        await context.send_initial_metadata(())
        reading = asyncio.create_task(self._read(context))
        try:
            while (events := await self.responses.get()) is not None:
                response = engine_service_pb2.ExecuteManyResponse(events=events)
                await context.write(response)
        finally:
            reading.cancel()

    async def _read(self, context: Context) -> None:
        while isinstance(request := await context.read(), engine_service_pb2.ExecuteManyRequest):
            self.granted += request.grant
            self.grants.put_nowait(request.grant)
            if request.start or request.abort_lanes:
                self.requests.put_nowait(request)

    async def Abort(self, *_: object) -> None:  # noqa: N802
        raise AssertionError

    GetEngineInfo = Abort
    GetLoad = Abort


@asynccontextmanager
async def served(worker: ScriptedWorker) -> AsyncIterator[str]:
    methods = [f"{SERVICES[0].full_name}/{method.name}" for method in SERVICES[0].methods]
    allow = {method: frozenset({"gateway"}) for method in methods}
    identity = Identity(KeyTable(), {sha256_of(TOKEN): "gateway"}, allow)
    server = Server(ServerSection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0"), identity)
    server.add(worker, SERVICES[0])
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


class Worker(ScriptedWorker):
    """A scripted worker with words for what tests want to say."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[engine_pb2.Execution] = []
        self._aborted: list[int] = []

    async def next_start(self) -> engine_pb2.Execution:
        """Waits for the next execution; several may come in one message."""
        while not self._started:
            await self._take()
        return self._started.pop(0)

    async def next_abort(self) -> int:
        """Waits for the next abort; returns its lane."""
        while not self._aborted:
            await self._take()
        return self._aborted.pop(0)

    async def _take(self) -> None:
        async with asyncio.timeout(10):
            request = await self.requests.get()
        self._started += request.start
        self._aborted += request.abort_lanes

    def accept(self, lane: int, input_tokens: int = 3) -> None:
        """Accepts an execution."""
        accepted = engine_pb2.Accepted(lane=lane, input_tokens=input_tokens)
        self.responses.put_nowait(engine_pb2.StepEvents(accepted=[accepted]))

    def say(self, lane: int, *words: str) -> None:
        """Sends one step for each word, of one token each."""
        for number, word in enumerate(words):
            self.responses.put_nowait(
                engine_pb2.StepEvents(lanes=[lane], token_ids=[number], texts=[word])
            )

    def end(self, lane: int) -> None:
        """Ends an execution well."""
        ended = engine_pb2.Ended(lane=lane, end=END)
        self.responses.put_nowait(engine_pb2.StepEvents(ended=[ended]))

    def fail(self, lane: int, code: int, reason: str) -> None:
        """Ends an execution without a result."""
        failure = engine_pb2.Failure(code=code, reason=reason, message=reason)
        ended = engine_pb2.Ended(lane=lane, failure=failure)
        self.responses.put_nowait(engine_pb2.StepEvents(ended=[ended]))

    def break_stream(self) -> None:
        """Ends the stream as a dying worker would."""
        self.responses.put_nowait(None)


@dataclass
class Billing:
    """One account, and what was settled on it."""

    available: int = 10**9
    settled: list[Settlement] = field(default_factory=list)

    async def acquire(self, _: str, account: str, required: int, wanted: int) -> Grant:
        """Sets money aside."""
        if self.available < required:
            raise FailedPrecondition(
                "no credit", reason=Reason.INSUFFICIENT_CREDIT, metadata={"account": account}
            )
        granted = min(wanted, self.available)
        self.available -= granted
        return Grant(granted, 60.0)

    async def settle(self, settlements: list[Settlement], _: list[str]) -> Settled:
        """Takes settlements."""
        self.settled += settlements
        return Settled(lost_slice_ids=[], lease_s=60.0)

    async def close(self, _: list[str]) -> None:
        """Takes slices back."""


class Scheduler:
    """Names the workers that the test gave, in that order, without those excluded."""

    def __init__(self) -> None:
        self.targets: list[Target] = []
        self.released: list[str] = []
        self.is_away = False

    async def acquire(self, wanted: Wanted, execution_id: str, exclude: list[str]) -> Slot:
        """Gives a slot."""
        if self.is_away:
            raise unavailable("scheduler")
        targets = [target for target in self.targets if target.worker not in exclude]
        if not targets:
            raise no_ready_worker(wanted.model_version)
        return Slot(slot_id=f"slot-{execution_id}", targets=targets)

    def release(self, slot_id: str) -> None:
        """Takes a slot back."""
        self.released.append(slot_id)


@dataclass
class World:
    """A gateway in process, its neighbours, and a client of it."""

    workers: list[Worker]
    scheduler: Scheduler
    billing: Billing
    generations: Generations
    settler: Settler
    book: SliceBook
    peer: Peer
    stub: generation_service_pb2_grpc.GenerationServiceAsyncStub

    def request(self, **stop: int) -> generation_service_pb2.StreamGenerateRequest:
        """Makes a request for a stream."""
        return generation_service_pb2.StreamGenerateRequest(
            spec=generation_pb2.GenerationSpec(
                model="m",
                text="hello",
                stop=generation_pb2.StopOptions(max_output_tokens=stop.get("most", 100)),
            )
        )

    def stream(self, **stop: int) -> Stream:
        """Opens a stream, to be cancelled by the test."""
        metadata = (("authorization", f"Bearer {KEY.secret}"),)
        return self.stub.StreamGenerate(
            self.request(**stop), metadata=metadata, timeout=stop.get("timeout_s")
        )

    async def only_settlement(self) -> Settlement:
        """Waits for the one settlement there is to be."""
        async with asyncio.timeout(5):
            while not self.billing.settled:
                await self.settler.flush()
                await asyncio.sleep(0)
        (found,) = self.billing.settled
        return found


KEY = new_key(1, 2)
VERSION = "models/m/versions/1"


def _keys(clock: SystemClock) -> KeyTable:
    table = KeyTable()
    table.apply(
        [
            KeyRecord(
                key_id=KEY.key_id,
                secret_sha256=sha256_of(KEY.secret),
                role=Role.TENANT,
                is_active=True,
                project="p",
                organization="o",
                revision=1,
            )
        ]
    )
    table.touch(clock.monotonic_s())
    return table


def _tables() -> tuple[Offerings, Prices]:
    offerings, prices = Offerings(), Prices()
    offerings.apply(
        [
            Offering(
                name="offerings/m",
                model_version=VERSION,
                context_length=1000,
                default_max_output_tokens=512,
                default_temperature=1.0,
                default_top_p=1.0,
                default_top_k=0,
                prompt_overhead_tokens=0,
                message_overhead_tokens=0,
            )
        ]
    )
    # One token costs a thousand nanos, in and out.
    prices.apply(
        [
            Price(
                name="prices/p",
                offering="offerings/m",
                input_price=10**9,
                output_price=10**9,
                effective_time=datetime(2026, 1, 1, tzinfo=UTC),
            )
        ]
    )
    return offerings, prices


@asynccontextmanager
async def gateway(
    folder: Path, *, worker_count: int = 1, stall_limit_s: float = 30.0, available: int = 10**9
) -> AsyncIterator[World]:
    """Serves a gateway and its workers on loopback ports."""
    clock = SystemClock()
    billing, scheduler = Billing(available), Scheduler()
    offerings, prices = _tables()
    table = WorkerTable()
    async with AsyncExitStack() as stack:
        background = await stack.enter_async_context(Background())
        links = LinkPool(TOKEN, background)
        workers = [Worker() for _ in range(worker_count)]
        for number, worker in enumerate(workers):
            endpoint = await stack.enter_async_context(served(worker))
            name = f"workers/w{number}"
            scheduler.targets.append(Target(worker=name, endpoint=endpoint, epoch=1))
            table.put(
                KnownWorker(
                    name=name, endpoint=endpoint, epoch=1, model_versions=frozenset({VERSION})
                )
            )
            await links.get(name, endpoint).ready(5)
        numbers = itertools.count()
        book = SliceBook(
            acquire=billing.acquire,
            close=billing.close,
            new_id=lambda: f"s{next(numbers)}",
            clock=clock,
            slice_nanos=1,
            slices_max=100,
        )
        journal = Journal(folder)
        stack.callback(journal.close)
        settler = Settler(
            settle=billing.settle,
            book=book,
            journal=journal,
            clock=clock,
            interval_s=0.01,
            idle_s=2.0,
        )
        generations = Generations(
            instance="g1",
            limits=Limits(generations_max=8, queue_wait_s=5.0, stall_limit_s=stall_limit_s),
            books=Books(journal=journal, slices=book, settler=settler, clock=clock),
            offerings=offerings,
            prices=prices,
            placer=Placer(
                acquire=scheduler.acquire,
                release=scheduler.release,
                workers=table,
                links=links,
            ),
            random_bits=secrets.randbits,
        )
        background.start(generations.watch_stalls(), name="watch stalls")
        section = ServerSection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0")
        server = Server(section, Identity(_keys(clock), {}, {}), is_public=True)
        service = generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"]
        server.add(GenerationService(generations, clock), service)
        port = await server.start()
        stack.push_async_callback(server.stop, 0)
        peer = await stack.enter_async_context(Peer(f"127.0.0.1:{port}", KEY.secret, [service]))
        yield World(
            workers=workers,
            scheduler=scheduler,
            billing=billing,
            generations=generations,
            settler=settler,
            book=book,
            peer=peer,
            stub=generation_service_pb2_grpc.GenerationServiceStub(peer.channel),
        )
