"""A whole worker over an engine under check: its text layer and its contract, on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import grpc
from maas.engine.v1 import engine_pb2, engine_service_pb2_grpc
from maas.engine.v1 import engine_service_pb2 as pb
from maas.inference.v1 import generation_pb2

from libs.clock import SystemClock
from libs.process import Background
from libs.rpc import Peer, Server
from libs.testing.rpc import ANY_PORT, Callers, serving
from services.worker.adapters import AdapterForm, Adapters
from services.worker.assembly import assemble
from services.worker.model import TextSettings, make_model
from services.worker.preparation import Preparation
from tools.conformance.engine.harness import PATIENCE_S, PROMPT, Harness
from tools.conformance.verdict import Mismatch, expect

if TYPE_CHECKING:
    from grpc.aio import StreamStreamCall
    from maas.engine.v1.engine_service_pb2_grpc import EngineServiceAsyncStub

    Call = StreamStreamCall[pb.ExecuteManyRequest, pb.ExecuteManyResponse]

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["EngineService"]
_VERSION: Final = "models/conformance/versions/1"
_WAITING_MAX: Final = 256
_GRANT: Final = 1 << 20


@dataclass
class Said:
    """What a worker said in one execution.

    Attributes:
        text: released so far.
        token_ids: likewise.
        ended: how it ended; None while it runs.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    ended: engine_pb2.Ended | None = None

    @property
    def end(self) -> generation_pb2.OutputEnd:
        """How it ended well.

        Raises:
            Mismatch: it did not.
        """
        if self.ended is None or not self.ended.HasField("end"):
            reason = "nothing" if self.ended is None else self.ended.failure.reason
            raise Mismatch(f"expected a good end, got {reason}")
        return self.ended.end


class Speaker:
    """One gateway's stream on a worker."""

    def __init__(self, call: Call, peer: Peer, stub: EngineServiceAsyncStub) -> None:
        self._call = call
        self._peer = peer
        self._stub = stub
        self._said: dict[int, Said] = {}
        self._lanes = 0

    async def say(self, *executions: engine_pb2.Execution) -> list[Said]:
        """Runs executions side by side until all have ended; gives them lanes of their own.

        Raises:
            Mismatch: the worker says nothing for too long, or contradicts itself.
        """
        found = []
        for execution in executions:
            self._lanes += 1
            execution.lane = self._lanes
            execution.execution_id = f"execution-{self._lanes}"
            self._said[self._lanes] = said = Said()
            found.append(said)
        await self._call.write(pb.ExecuteManyRequest(start=executions))
        while any(said.ended is None for said in found):
            await self._read()
        return found

    async def tokens_of(self, text: str) -> Sequence[int]:
        """Text to token ids."""
        request = pb.TokenizeRequest(model_version=_VERSION, text=text)
        return (await self._peer.call(self._stub.Tokenize, request)).token_ids

    async def text_of(self, token_ids: Sequence[int]) -> str:
        """Token ids to text."""
        request = pb.DetokenizeRequest(
            model_version=_VERSION, tokens=generation_pb2.TokenIds(ids=token_ids)
        )
        return (await self._peer.call(self._stub.Detokenize, request)).text

    async def grant(self) -> None:
        """Lets the worker send."""
        await self._call.write(pb.ExecuteManyRequest(grant=_GRANT))

    async def _read(self) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                response = await self._call.read()
        except TimeoutError:
            raise Mismatch(f"the worker said nothing for {PATIENCE_S:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise Mismatch(f"the worker's stream broke with {error.code().name}") from None
        if not isinstance(response, pb.ExecuteManyResponse):
            raise Mismatch("the worker ended the stream")
        self._take(response.events)

    def _take(self, events: engine_pb2.StepEvents) -> None:
        counts = list(events.token_counts) or [1] * len(events.lanes)
        place = 0
        for lane, count, text in zip(events.lanes, counts, events.texts, strict=True):
            said = self._said[lane]
            expect(said.ended is None, "text came behind the end")
            said.text += text
            said.token_ids += events.token_ids[place : place + count]
            place += count
        for ended in events.ended:
            expect(self._said[ended.lane].ended is None, "an execution ended twice")
            self._said[ended.lane].ended = ended


@asynccontextmanager
async def speaking(harness: Harness) -> AsyncIterator[Speaker]:
    """Runs a worker over the engine until the block is left; the engine goes on."""
    clock = SystemClock()
    callers = Callers()
    methods = {f"{_SERVICE.full_name}/{method.name}": ["gateway"] for method in _SERVICE.methods}
    server = Server(ANY_PORT, callers.identity(methods))
    async with AsyncExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(1))
        adapters = Adapters(
            harness.engine,
            None,
            form=AdapterForm.NONE,
            threads=threads,
            load_within_s=PATIENCE_S,
        )
        model = make_model(
            harness.tokenizer,
            harness.info,
            TextSettings(),
            bos_id=harness.row.bos_id,
            has_adapters=False,
            now=clock.now,
        )
        assembly = assemble(
            harness.engine,
            harness.info,
            model,
            adapters=adapters,
            preparation=Preparation(threads),
            clock=clock,
            worker="workers/w1",
            versions=[_VERSION],
            max_waiting=_WAITING_MAX,
        )
        assembly.reports.open()
        server.add(assembly.service, _SERVICE)
        endpoint = await stack.enter_async_context(serving(server))
        background = await stack.enter_async_context(Background(None))
        background.start(assembly.executions.pump(), name="pump")
        peer = await stack.enter_async_context(
            Peer(endpoint, callers.tokens["gateway"], [_SERVICE])
        )
        stub = engine_service_pb2_grpc.EngineServiceStub(peer.channel)
        call = await stack.enter_async_context(peer.both_ways(stub.ExecuteMany))
        speaker = Speaker(call, peer, stub)
        await speaker.grant()
        yield speaker


def execution(
    tokens: int,
    *,
    prompt: Sequence[int] = PROMPT,
    stops: Sequence[str] = (),
    regex: str = "",
    seed: int | None = None,
) -> engine_pb2.Execution:
    """Makes an execution as a gateway would.

    Args:
        tokens: most output tokens.
        prompt: its token ids.
        stops: texts at which it ends.
        regex: what the output has to match; empty for anything.
        seed: of chance; None for the likeliest tokens.
    """
    temperature = 0 if seed is None else 1
    made = engine_pb2.Execution(
        model_version=_VERSION,
        sampling=generation_pb2.SamplingOptions(
            temperature=temperature, top_p=1, top_k=0, seed=seed or 0
        ),
        stop=generation_pb2.StopOptions(max_output_tokens=tokens, stop_sequences=stops),
    )
    made.tokens.ids.extend(prompt)
    if regex:
        made.constraint.regex = regex
    return made
