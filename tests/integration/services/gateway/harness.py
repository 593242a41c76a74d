"""A gateway in process: real gRPC on both sides, workers that do what the test says."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from maas.common.v1.capabilities_pb2 import Capabilities
from maas.engine.v1 import engine_pb2, engine_service_pb2
from maas.inference.v1 import generation_pb2
from typing_extensions import override

from libs.auth import KeyTable, sha256_of
from libs.clock import Clock, SystemClock
from libs.config import ServerSection
from libs.process import Background
from libs.receipts import ReceiptSigner
from libs.rpc import Server
from libs.rpc.identity import Identity
from libs.testing import eventually
from libs.units import Rates
from services.gateway.__main__ import EMBEDDINGS, GENERATIONS, TOKENIZATION
from services.gateway.admission import Admission, Rules
from services.gateway.books import Books
from services.gateway.checks import Checks
from services.gateway.desks import Desks
from services.gateway.embed_placement import EmbedPlacer
from services.gateway.embedding import Embeddings
from services.gateway.generation import Chunk, Sink
from services.gateway.inquiries import Inquirer
from services.gateway.journal import Journal
from services.gateway.limits import Limits
from services.gateway.links import SERVICES, LinkPool
from services.gateway.operations import Bounds, Generations
from services.gateway.placement import Placer, Target
from services.gateway.places import Places
from services.gateway.quotas import Quotas
from services.gateway.quote import Quotes
from services.gateway.release import Releaser
from services.gateway.replay import Budget
from services.gateway.salt import Salts
from services.gateway.service import EmbeddingService, GenerationService, TokenizationService
from services.gateway.settlement import Settlement, Settler
from services.gateway.slices import Sizes, SliceBook
from services.gateway.tables import Adapters as AdapterTable
from services.gateway.tables import Offerings
from services.gateway.tables import Worker as KnownWorker
from services.gateway.tables import Workers as WorkerTable
from services.gateway.tokenization import Tokenization
from services.gateway.turnstile import Turnstile
from tests.integration.services.gateway.client import Client
from tests.integration.services.gateway.neighbours import (
    ADAPTERS,
    ALICE,
    RATES,
    VERSION,
    Billing,
    Caller,
    Scheduler,
    key_table,
    tables,
)
from tests.integration.services.gateway.neighbours_unary import UnaryMethods

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[
        engine_service_pb2.ExecuteManyRequest, engine_service_pb2.ExecuteManyResponse
    ]

TOKEN = "ms_gateway_test"
END = generation_pb2.OutputEnd(reason=generation_pb2.FINISH_REASON_END)


class ScriptedWorker(UnaryMethods):
    """An EngineService whose streams the test drives."""

    def __init__(self) -> None:
        super().__init__()
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
    WatchKvEvents = Abort


class CountingClock(SystemClock):
    """Real time, and how often somebody has waited for it.

    Attributes:
        sleeps: begun so far.
    """

    def __init__(self) -> None:
        self.sleeps = 0

    @override
    async def sleep_s(self, seconds: float) -> None:
        """Sleeps, and counts that."""
        self.sleeps += 1
        await super().sleep_s(seconds)

    async def rounds(self, count: int) -> None:
        """Waits until that many sleeps have begun from now on."""
        until = self.sleeps + count
        await eventually(lambda: self.sleeps >= until)


async def taken(sink: Sink) -> Chunk:
    """Waits for output and takes it; raises what ended the execution instead."""
    event = asyncio.Event()
    sink.on_event = sink.on_output = event.set
    while not sink.has_output and sink.failure is None:
        async with asyncio.timeout(10):
            await event.wait()
        event.clear()
    if sink.failure is not None:
        raise sink.failure
    return sink.take()


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

    def say(self, lane: int, *words: str, first: int = 0) -> None:
        """Sends one step for each word, of one token each; token ids count from `first`."""
        for number, word in enumerate(words, first):
            self.responses.put_nowait(
                engine_pb2.StepEvents(lanes=[lane], token_ids=[number], texts=[word])
            )

    def step(self, lanes: list[int], words: list[str]) -> None:
        """Sends one step with a token for each of several executions."""
        token_ids = list(range(len(lanes)))
        self.responses.put_nowait(
            engine_pb2.StepEvents(lanes=lanes, token_ids=token_ids, texts=words)
        )

    def end(self, lane: int, how: generation_pb2.OutputEnd = END) -> None:
        """Ends an output well."""
        ended = engine_pb2.Ended(lane=lane, end=how)
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
class World:
    """A gateway in process, its neighbours, and clients of it.

    Attributes:
        endpoint: of the gateway.
        client: of ALICE.
        failures: of the gateway's own tasks; each would stop a real process.
    """

    workers: list[Worker]
    scheduler: Scheduler
    billing: Billing
    generations: Generations
    settler: Settler
    book: SliceBook
    journal: Journal
    budget: Budget
    keys: KeyTable
    endpoint: str
    client: Client
    failures: list[BaseException]
    table: WorkerTable
    offerings: Offerings
    adapters: AdapterTable
    desks: Desks
    embeddings: Embeddings
    limits: Limits
    quotas: Quotas
    places: Places

    def dial(self, caller: Caller = ALICE) -> Client:
        """Makes a client with a connection of its own."""
        return Client(self.endpoint, caller)

    async def accepted(
        self, worker: Worker | None = None, *, input_tokens: int = 3
    ) -> engine_pb2.Execution:
        """Has a worker, the first one by default, accept the next execution."""
        worker = worker or self.workers[0]
        execution = await worker.next_start()
        worker.accept(execution.lane, input_tokens)
        return execution

    async def settlements(self, count: int) -> list[Settlement]:
        """Waits for that many settlements, and sees that there are no more."""
        async with asyncio.timeout(5):
            while len(self.billing.settled) < count:
                await self.settler.flush()
                await asyncio.sleep(0)
        await self.settler.flush()
        assert len(self.billing.settled) == count
        return self.billing.settled

    async def only_settlement(self) -> Settlement:
        """Waits for the one settlement there is to be."""
        return (await self.settlements(1))[0]

    async def no_settlement(self) -> None:
        """Sees that nothing is charged or held."""
        await self.settler.flush()
        assert self.billing.settled == []
        await self.book.close_idle(0.0)
        assert self.book.open_ids() == []


def rate_limits(billing: Billing, clock: Clock, background: Background) -> tuple[Places, Quotas]:
    """Makes what keeps rate limits, and runs it."""
    places = Places(billing.quota.hold, clock)
    quotas = Quotas(
        take=billing.quota.take, give_back=billing.quota.give_back, places=places, clock=clock
    )
    background.start(places.run(), name="places")
    background.start(quotas.run(), name="quotas")
    return places, quotas


@asynccontextmanager
async def gateway(
    folder: Path,
    *,
    worker_count: int = 1,
    stall_limit_s: float = 30.0,
    available: int = 10**9,
    replay_window_s: float = 60.0,
    replay_bytes_max: int = 4 * 1024 * 1024,
    replay_total_bytes_max: int = 64 * 1024 * 1024,
    move_wait_s: float = 1.0,
    make_journal: Callable[[Path], Journal] = Journal,
    clock: Clock | None = None,
    capabilities: Capabilities | None = None,
    calls_max: int = 64,
    generations_max: int = 8,
    slice_nanos: int = 1,
    rates: Rates = RATES,
    signer: ReceiptSigner | None = None,
) -> AsyncIterator[World]:
    """Serves a gateway and its workers on loopback ports."""
    clock = clock or SystemClock()
    billing, scheduler = Billing(available), Scheduler()
    offerings, prices = tables(rates)
    table = WorkerTable()
    async with AsyncExitStack() as stack:
        failures: list[BaseException] = []
        background = await stack.enter_async_context(Background(failures.append))
        links = LinkPool(TOKEN, background)
        workers = [Worker() for _ in range(worker_count)]
        for number, worker in enumerate(workers):
            endpoint = await stack.enter_async_context(served(worker))
            name = f"workers/w{number}"
            scheduler.targets.append(Target(worker=name, endpoint=endpoint, epoch=1))
            table.put(
                KnownWorker(
                    name=name,
                    endpoint=endpoint,
                    epoch=1,
                    model_versions=frozenset({VERSION}),
                    capabilities=capabilities,
                )
            )
            await links.get(name, endpoint).ready(5)
        numbers = itertools.count()
        book = SliceBook(
            acquire=billing.acquire,
            close=billing.close,
            new_id=lambda: f"s{next(numbers)}",
            clock=clock,
            sizes=Sizes(nanos_max=slice_nanos, refill_s=1.0, count_max=1000),
            start=lambda refill: background.start(refill, name="refill slice"),
        )
        journal = make_journal(folder)
        stack.callback(journal.close)
        settler = Settler(
            settle=billing.settle,
            book=book,
            journal=journal,
            clock=clock,
            interval_s=0.01,
            idle_s=2.0,
        )
        books = Books(
            journal=journal,
            slices=book,
            settler=settler,
            clock=clock,
            releaser=Releaser(journal),
            background=background,
            move_wait_s=move_wait_s,
            signer=signer,
        )
        budget = Budget(replay_total_bytes_max)
        keys = key_table(clock)
        limits = Limits()
        limits.apply((), is_snapshot=True, is_complete=True)
        places, quotas = rate_limits(billing, clock, background)
        adapters = AdapterTable()
        adapters.apply(ADAPTERS, (), is_snapshot=True, is_complete=True)
        checks = Checks(
            offerings=offerings,
            prices=prices,
            adapters=adapters,
            workers=table,
            clock=clock,
        )
        admission = Admission(
            instance="g1",
            rules=Rules(queue_wait_s=5.0, replay_bytes_max=replay_bytes_max),
            books=books,
            budget=budget,
            checks=checks,
            limits=limits,
            quotas=quotas,
            salts=Salts(b"secret of tests"),
            placer=Placer(
                acquire=scheduler.acquire,
                release=scheduler.release,
                workers=table,
                links=links,
            ),
            find_charged=billing.find_charged,
            is_revoked=keys.is_revoked,
            random_bits=secrets.randbits,
        )
        generations = Generations(
            instance="g1",
            bounds=Bounds(
                generations_max=generations_max,
                stall_limit_s=stall_limit_s,
                replay_window_s=replay_window_s,
            ),
            books=books,
            budget=budget,
            admission=admission,
        )
        keys.on_revoked(generations.revoke)
        background.start(generations.watch(), name="watch generations")
        section = ServerSection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0")
        server = Server(section, Identity(keys, {}, {}), is_public=True)
        desks = Desks(TOKEN, clock)
        background.start(desks.run(), name="desks")
        inquirer = Inquirer(desks=desks, workers=table, clock=clock)
        questions = Turnstile("questions", calls_max)
        quotes = Quotes(
            checks=checks,
            offerings=offerings,
            workers=table,
            inquirer=inquirer,
            turnstile=questions,
        )
        tokenization = Tokenization(
            offerings=offerings, inquirer=inquirer, quotes=quotes, turnstile=questions
        )
        embeddings = Embeddings(
            instance="g1",
            books=books,
            offerings=offerings,
            prices=prices,
            workers=table,
            limits=limits,
            quotas=quotas,
            placer=EmbedPlacer(
                acquire=scheduler.acquire,
                release=scheduler.release,
                workers=table,
                links=links,
                desks=desks,
                queue_wait_s=5.0,
            ),
            turnstile=Turnstile("calls to embed", calls_max),
            is_revoked=keys.is_revoked,
            random_bits=secrets.randbits,
        )
        keys.on_revoked(embeddings.revoke)
        server.add(GenerationService(generations, quotes), GENERATIONS)
        server.add(TokenizationService(tokenization), TOKENIZATION)
        server.add(EmbeddingService(embeddings), EMBEDDINGS)
        endpoint = f"127.0.0.1:{await server.start()}"
        stack.push_async_callback(server.stop, 0)
        yield World(
            workers=workers,
            scheduler=scheduler,
            billing=billing,
            generations=generations,
            settler=settler,
            book=book,
            journal=journal,
            budget=budget,
            keys=keys,
            endpoint=endpoint,
            client=await stack.enter_async_context(Client(endpoint)),
            failures=failures,
            table=table,
            offerings=offerings,
            adapters=adapters,
            desks=desks,
            embeddings=embeddings,
            limits=limits,
            quotas=quotas,
            places=places,
        )
