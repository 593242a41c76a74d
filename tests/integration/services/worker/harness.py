"""A worker in this process, on a real listener, and a gateway that talks to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from maas.engine.v1 import engine_pb2, engine_service_pb2_grpc
from maas.engine.v1 import engine_service_pb2 as engine_service_pb
from maas.inference.v1 import generation_pb2

from libs.clock import Clock, SystemClock
from libs.process import Background
from libs.rpc import Peer, Server
from libs.testing.rpc import ANY_PORT, Callers, serving
from services.worker.admission import Admission
from services.worker.chat import ChatTemplate
from services.worker.convert import info_to_pb
from services.worker.engine.base import Engine
from services.worker.engine.sim import FLAT_OUT, SimCosts, SimEngine
from services.worker.engine.sim_tokenizer import SimTokenizer
from services.worker.executions import Executions
from services.worker.prompt import PromptBuilder
from services.worker.reports import Reports
from services.worker.service import EngineService
from services.worker.text import TokenPieces

if TYPE_CHECKING:
    from grpc.aio import StreamStreamCall

    Call = StreamStreamCall[
        engine_service_pb.ExecuteManyRequest, engine_service_pb.ExecuteManyResponse
    ]

SERVICE = engine_service_pb.DESCRIPTOR.services_by_name["EngineService"]
TOKENIZER = SimTokenizer()
PIECES = TokenPieces.of(TOKENIZER)
MODEL_VERSION = "models/sim/versions/1"
WORKER = "workers/w1"
CAPACITY = 4
MAX_WAITING = 2
CONTEXT_LENGTH = 512
ABORT_WITHIN_S = 60.0
PATIENCE_S = 10.0
STEP_S = 0.01
STEPWISE = SimCosts(
    prefill_tokens_per_s=0, prefill_chunk_tokens=1 << 20, decode_base_s=STEP_S, decode_per_lane_s=0
)
"""A step for each 10 ms of the clock, and none without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What runs.

    Attributes:
        endpoint: host:port.
        engine: behind it.
        executions: in it.
        reports: what the scheduler would be told.
        stub: of its service, with a gateway's credential through `peer`.
        peer: the gateway's connection.
        server: its listener.
    """

    endpoint: str
    callers: Callers
    engine: Engine
    executions: Executions
    reports: Reports
    peer: Peer
    stub: Any
    server: Server

    @asynccontextmanager
    async def gateway(self, *, grant: int = 1 << 16) -> AsyncIterator[Gateway]:
        """Opens a stream."""
        async with self.peer.both_ways(self.stub.ExecuteMany) as call:
            gateway = Gateway(call)
            if grant:
                await gateway.send(grant=grant)
            yield gateway


@dataclass
class Told:
    """What a worker told about one lane."""

    input_tokens: int | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: engine_pb2.Ended | None = None

    @property
    def end(self) -> generation_pb2.OutputEnd:
        assert self.ended is not None
        assert self.ended.HasField("end"), self.ended
        return self.ended.end

    @property
    def failure(self) -> engine_pb2.Failure:
        assert self.ended is not None
        assert self.ended.HasField("failure"), self.ended
        return self.ended.failure

    @property
    def reason(self) -> str:
        return self.failure.reason


class Gateway:
    """One ExecuteMany stream; checks the grammar of what it reads."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.told: dict[int, Told] = {}
        self.messages: list[engine_pb2.StepEvents] = []

    async def send(
        self,
        *start: engine_pb2.Execution,
        abort_lanes: Sequence[int] = (),
        grant: int = 0,
    ) -> None:
        for execution in start:
            self.told[execution.lane] = Told()
        await self.call.write(
            engine_service_pb.ExecuteManyRequest(start=start, abort_lanes=abort_lanes, grant=grant)
        )

    async def read(self) -> engine_pb2.StepEvents:
        async with asyncio.timeout(PATIENCE_S):
            response = await self.call.read()
        assert isinstance(response, engine_service_pb.ExecuteManyResponse), "the stream ended"
        self.take(response.events)
        return response.events

    async def until_ended(self, *lanes: int) -> None:
        while any(self.told[lane].ended is None for lane in lanes):
            await self.read()

    async def run(self, execution: engine_pb2.Execution) -> Told:
        await self.send(execution)
        await self.until_ended(execution.lane)
        return self.told[execution.lane]

    def take(self, events: engine_pb2.StepEvents) -> None:
        self.messages.append(events)
        for accepted in events.accepted:
            told = self.told[accepted.lane]
            assert told.input_tokens is None
            told.input_tokens = accepted.input_tokens
        counts = list(events.token_counts) or [1] * len(events.lanes)
        assert len(counts) == len(events.lanes) == len(events.texts)
        assert len(set(events.lanes)) == len(events.lanes)
        assert sum(counts) == len(events.token_ids)
        place = 0
        for lane, count, text in zip(events.lanes, counts, events.texts, strict=True):
            told = self.told[lane]
            assert told.input_tokens is not None
            assert told.ended is None
            assert count > 0
            token_ids = events.token_ids[place : place + count]
            place += count
            told.token_ids.extend(token_ids)
            told.text += text
        for ended in events.ended:
            told = self.told[ended.lane]
            assert told.ended is None
            told.ended = ended
        for lane in events.lanes:
            told = self.told[lane]
            spelled = spell(told.token_ids)
            if told.ended is not None and told.ended.end.stop_sequence:
                assert spelled.startswith(told.text), "of the last token a part may be visible"
            else:
                assert told.text == spelled, "text and tokens agree, always"


def spell(token_ids: Sequence[int]) -> str:
    return b"".join(map(TOKENIZER.token_bytes, token_ids)).decode("utf-8", "replace")


def make_engine(clock: Clock, costs: SimCosts = FLAT_OUT) -> SimEngine:
    return SimEngine(
        clock,
        TOKENIZER,
        capacity=CAPACITY,
        context_length=CONTEXT_LENGTH,
        kv_tokens=CAPACITY * CONTEXT_LENGTH,
        costs=costs,
    )


@asynccontextmanager
async def running_worker(
    *,
    clock: Clock | None = None,
    engine: Engine | None = None,
    chat_template: str | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
) -> AsyncIterator[Worker]:
    """Runs a worker until the block is left."""
    clock = clock if clock is not None else SystemClock()
    engine = engine if engine is not None else make_engine(clock)
    info = await engine.start()
    callers = Callers()
    methods = [f"{SERVICE.full_name}/{method.name}" for method in SERVICE.methods]
    server = Server(ANY_PORT, callers.identity({method: ["gateway"] for method in methods}))
    source = TOKENIZER.chat_template if chat_template is None else chat_template
    template = ChatTemplate(source, TOKENIZER.special_tokens, clock.now) if source else None
    reports = Reports()
    reports.open()
    with ThreadPoolExecutor(1) as threads:
        executions = Executions(
            engine,
            info,
            admission=Admission(info, PromptBuilder(TOKENIZER, PIECES, template), [MODEL_VERSION]),
            pieces=PIECES,
            reports=reports,
            threads=threads,
            clock=clock,
            worker=WORKER,
            max_waiting=MAX_WAITING,
            abort_within_s=ABORT_WITHIN_S,
        )
        described = info_to_pb(info, model_versions=[MODEL_VERSION], max_waiting=MAX_WAITING)
        server.add(EngineService(engine, executions, described), SERVICE)
        async with serving(server) as endpoint, Background(on_failure) as background:
            background.start(executions.pump(), name="pump")
            background.start(executions.watch(), name="watch")
            async with Peer(endpoint, callers.tokens["gateway"], [SERVICE]) as peer:
                yield Worker(
                    endpoint=endpoint,
                    callers=callers,
                    engine=engine,
                    executions=executions,
                    reports=reports,
                    peer=peer,
                    stub=engine_service_pb2_grpc.EngineServiceStub(peer.channel),
                    server=server,
                )
            await engine.stop()


def execution(
    lane: int = 1,
    *,
    tokens: int = 5,
    text: str | None = "Once upon a time",
    chat: Sequence[tuple[generation_pb2.Role.ValueType, str]] = (),
    ids: Sequence[int] = (),
    continues: Sequence[int] = (),
    stops: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    seed: int = 7,
    epoch: int = 0,
    budget_s: float | None = None,
    execution_id: str | None = None,
    model_version: str = MODEL_VERSION,
    charge_limit: engine_pb2.ChargeLimit | None = None,
    interval_s: float | None = None,
) -> engine_pb2.Execution:
    """Makes an execution as a gateway would: everything is resolved."""
    made = engine_pb2.Execution(
        lane=lane,
        execution_id=execution_id if execution_id is not None else f"execution-{lane}",
        epoch=epoch,
        model_version=model_version,
        continue_token_ids=continues,
        sampling=generation_pb2.SamplingOptions(temperature=1, top_p=1, top_k=0, seed=seed),
        stop=generation_pb2.StopOptions(
            max_output_tokens=tokens, stop_sequences=stops, stop_token_ids=stop_ids
        ),
        charge_limit=charge_limit,
    )
    if chat:
        made.chat.messages.extend(
            generation_pb2.ChatMessage(role=role, parts=[generation_pb2.ContentPart(text=content)])
            for role, content in chat
        )
    elif ids:
        made.tokens.ids.extend(ids)
    elif text is not None:
        made.text = text
    if budget_s is not None:
        made.budget.FromNanoseconds(round(budget_s * 1e9))
    if interval_s is not None:
        made.output_interval.FromNanoseconds(round(interval_s * 1e9))
    return made


async def eventually(condition: Callable[[], bool]) -> None:
    """Waits for what another task does."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - a helper of tests
            await asyncio.sleep(0.001)
