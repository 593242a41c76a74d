"""A worker in this process, on a real listener, and a gateway that talks to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maas.engine.v1 import engine_pb2, engine_service_pb2_grpc
from maas.engine.v1 import engine_service_pb2 as engine_service_pb
from maas.inference.v1 import generation_pb2, scores_pb2

from libs.clock import Clock, SystemClock
from libs.process import Background
from libs.rpc import Peer, Server
from libs.testing.rpc import ANY_PORT, Callers, serving
from services.worker.adapters import AdapterForm, Adapters
from services.worker.assembly import assemble
from services.worker.engine.base import Engine, Tokenizer
from services.worker.engine.sim import FLAT_OUT, SimCosts, SimEngine
from services.worker.engine.sim_tokenizer import SimTokenizer
from services.worker.executions import Executions
from services.worker.model import TextSettings, make_model
from services.worker.preparation import Preparation
from services.worker.reports import Reports
from services.worker.text import TokenPieces
from services.worker.watchdog import Patience, Watchdog

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
PATIENCE_S = 10.0
STEP_S = 0.01
AS_THE_MODEL_SAYS = TextSettings()
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
        tokenizer: of its model.
    """

    endpoint: str
    callers: Callers
    engine: Engine
    executions: Executions
    reports: Reports
    peer: Peer
    stub: Any
    server: Server
    tokenizer: Tokenizer

    @asynccontextmanager
    async def gateway(self, *, grant: int = 1 << 16) -> AsyncIterator[Gateway]:
        """Opens a stream."""
        async with self.peer.both_ways(self.stub.ExecuteMany) as call:
            gateway = Gateway(call, self.tokenizer)
            if grant:
                await gateway.send(grant=grant)
            yield gateway


@dataclass
class Told:
    """What a worker told about one lane."""

    input_tokens: int | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    segments: list[engine_pb2.Segment] = field(default_factory=list)
    reasoning_tokens: int = 0
    scores: scores_pb2.TokenScores = field(default_factory=scores_pb2.TokenScores)
    prompt_scores: list[scores_pb2.PromptScores] = field(default_factory=list)
    cached_tokens: int | None = None
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

    def __init__(self, call: Call, tokenizer: Tokenizer = TOKENIZER) -> None:
        self.call = call
        self.tokenizer = tokenizer
        self.told: dict[int, Told] = {}
        self.first_lanes: dict[int, int] = {}
        self.messages: list[engine_pb2.StepEvents] = []

    async def send(
        self,
        *start: engine_pb2.Execution,
        abort_lanes: Sequence[int] = (),
        grant: int = 0,
    ) -> None:
        for execution in start:
            for lane in (execution.lane, *execution.more_lanes):
                self.told[lane] = Told()
                self.first_lanes[lane] = execution.lane
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
        for prefilled in events.prefilled:
            told = self.told[prefilled.lane]
            assert told.cached_tokens is None
            assert not told.token_ids
            told.cached_tokens = prefilled.cached_tokens
        for prompt in events.prompt_scores:
            assert not self.told[prompt.lane].token_ids
            self.told[prompt.lane].prompt_scores.append(prompt.scores)
        self._take_rows(events)
        for ended in events.ended:
            told = self.told[ended.lane]
            assert told.ended is None
            told.ended = ended
        for lane in events.lanes:
            told = self.told[lane]
            if told.segments:
                continue
            spelled = spell(told.token_ids, self.tokenizer)
            if told.ended is not None and told.ended.end.stop_sequence:
                assert spelled.startswith(told.text), "of the last token a part may be visible"
            else:
                assert told.text == spelled, "text and tokens agree, always"

    def _take_rows(self, events: engine_pb2.StepEvents) -> None:
        counts = list(events.token_counts) or [1] * len(events.lanes)
        assert len(counts) == len(events.lanes) == len(events.texts)
        assert len(set(events.lanes)) == len(events.lanes)
        assert sum(counts) == len(events.token_ids)
        segments = {found.row: found for found in events.segments}
        scores = {found.row: found.scores for found in events.scores}
        place = 0
        for row, (lane, count, text) in enumerate(
            zip(events.lanes, counts, events.texts, strict=True)
        ):
            told = self.told[lane]
            assert self.told[self.first_lanes[lane]].input_tokens is not None
            assert told.ended is None
            assert count > 0
            token_ids = events.token_ids[place : place + count]
            place += count
            told.token_ids.extend(token_ids)
            told.text += text
            if row in segments:
                assert not text
                told.segments.extend(segments[row].segments)
                told.reasoning_tokens += segments[row].reasoning_tokens
            if row in scores:
                assert scores[row].token_ids == token_ids
                told.scores.MergeFrom(scores[row])


def spell(token_ids: Sequence[int], tokenizer: Tokenizer = TOKENIZER) -> str:
    return b"".join(map(tokenizer.token_bytes, token_ids)).decode("utf-8", "replace")


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
    tokenizer: Tokenizer = TOKENIZER,
    chat_template: str | None = None,
    settings: TextSettings = AS_THE_MODEL_SAYS,
    adapters_dir: Path | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
    patience: Patience | None = None,
) -> AsyncIterator[Worker]:
    """Runs a worker until the block is left; with patience, a watchdog in it."""
    clock = clock if clock is not None else SystemClock()
    engine = engine if engine is not None else make_engine(clock)
    callers = Callers()
    methods = [f"{SERVICE.full_name}/{method.name}" for method in SERVICE.methods]
    server = Server(ANY_PORT, callers.identity({method: ["gateway"] for method in methods}))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.stop)
        info = await engine.start()
        watchdog = None if patience is None else Watchdog(engine, info, patience, clock)
        engine = watchdog or engine
        threads = stack.enter_context(ThreadPoolExecutor(1))
        adapters = Adapters(
            engine,
            adapters_dir,
            form=AdapterForm.NONE if adapters_dir is None else AdapterForm.FILE,
            threads=threads,
            load_within_s=PATIENCE_S,
        )
        model = make_model(
            tokenizer,
            info,
            settings if chat_template is None else TextSettings(chat_template=chat_template),
            bos_id=None,
            has_adapters=True,
            now=clock.now,
        )
        assembly = assemble(
            engine,
            info,
            model,
            adapters=adapters,
            preparation=Preparation(threads),
            clock=clock,
            worker=WORKER,
            versions=[MODEL_VERSION],
            max_waiting=MAX_WAITING,
        )
        assembly.reports.open()
        server.add(assembly.service, SERVICE)
        endpoint = await stack.enter_async_context(serving(server))
        background = await stack.enter_async_context(Background(on_failure))
        background.start(assembly.executions.pump(), name="pump")
        background.start(assembly.executions.watch(), name="watch")
        if watchdog is not None:
            background.start(watchdog.run(assembly.executions.die), name="watchdog")
        peer = Peer(endpoint, callers.tokens["gateway"], [SERVICE])
        yield Worker(
            endpoint=endpoint,
            callers=callers,
            engine=engine,
            executions=assembly.executions,
            reports=assembly.reports,
            peer=await stack.enter_async_context(peer),
            stub=engine_service_pb2_grpc.EngineServiceStub(peer.channel),
            server=server,
            tokenizer=tokenizer,
        )


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
    more_lanes: Sequence[int] = (),
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
        more_lanes=more_lanes,
    )
    if more_lanes:
        made.output.count = 1 + len(more_lanes)
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
