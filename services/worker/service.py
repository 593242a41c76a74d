"""EngineService: what gateways and the scheduler call. Reads and writes, decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from maas.engine.v1 import engine_pb2, engine_service_pb2_grpc
from maas.engine.v1 import engine_service_pb2 as engine_service_pb
from typing_extensions import override

from libs.errors import MaasError
from services.worker.admission import Admission
from services.worker.convert import load_to_pb
from services.worker.embedding import Embedder
from services.worker.engine.base import Engine
from services.worker.executions import Executions
from services.worker.kv_convert import changes_to_pb
from services.worker.kv_watch import KvLog
from services.worker.preparation import Preparation
from services.worker.prompt import work_of
from services.worker.runs import Stream
from services.worker.vocabulary import Vocabulary

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

T = TypeVar("T")
U = TypeVar("U")

# Short prompts are made on the event loop: after this many, everybody else gets a turn.
STARTS_AT_ONCE = 8


class EngineService(engine_service_pb2_grpc.EngineServiceServicer):
    """The servicer. One reader for each stream; its outbox writes."""

    def __init__(
        self,
        engine: Engine,
        executions: Executions,
        info: engine_pb2.EngineInfo,
        *,
        embedder: Embedder,
        admission: Admission,
        vocabulary: Vocabulary,
        preparation: Preparation,
        kv_log: KvLog,
    ) -> None:
        self._engine = engine
        self._executions = executions
        self._info = info
        self._embedder = embedder
        self._admission = admission
        self._vocabulary = vocabulary
        self._preparation = preparation
        self._kv_log = kv_log

    @override
    async def ExecuteMany(self, _: object, context: Context) -> None:  # type: ignore[override]  # reads and writes by itself (facts.md), where the stub expects iterators
        """Runs executions until the gateway closes the stream or the worker ends it."""
        # At once: until headers come the gateway does not know that the worker is there.
        await context.send_initial_metadata(())
        try:
            async with asyncio.TaskGroup() as tasks:
                with self._executions.stream(tasks) as stream:
                    stream.outbox.attach(context.write)
                    end = tasks.create_task(stream.outbox.wait_over(), name="end of the stream")
                    try:
                        await self._read(stream, context)
                    finally:
                        end.cancel()
        except BaseExceptionGroup as group:
            # What ended the stream: a refusal of the reader, or the end of the worker.
            ends = group.subgroup(MaasError)
            if ends is None:
                raise
            raise ends.exceptions[0] from None

    @override
    async def Abort(
        self, request: engine_service_pb.AbortRequest, _: Context
    ) -> engine_service_pb.AbortResponse:
        """Stops executions, whoever started them."""
        stopped, unknown = self._executions.abort_ids(request.execution_ids)
        return engine_service_pb.AbortResponse(
            aborted_execution_ids=stopped, unknown_execution_ids=unknown
        )

    @override
    async def Embed(
        self, request: engine_service_pb.EmbedRequest, _: Context
    ) -> engine_service_pb.EmbedResponse:
        """Embeds inputs."""
        return await self._embedder.embed(request)

    @override
    async def CountTokens(
        self, request: engine_service_pb.CountTokensRequest, _: Context
    ) -> engine_service_pb.CountTokensResponse:
        """Makes the prompt of an execution, and checks all of it."""
        execution = request.execution
        self._admission.check(execution)
        work = await self._prepared(
            execution.execution_id, work_of(execution), self._admission.work, execution
        )
        return engine_service_pb.CountTokensResponse(input_tokens=work.input_tokens)

    @override
    async def Tokenize(
        self, request: engine_service_pb.TokenizeRequest, _: Context
    ) -> engine_service_pb.TokenizeResponse:
        """Turns text into token ids."""
        self._admission.require_version(request.model_version)
        return await self._prepared("", len(request.text), self._vocabulary.tokenize, request)

    @override
    async def Detokenize(
        self, request: engine_service_pb.DetokenizeRequest, _: Context
    ) -> engine_service_pb.DetokenizeResponse:
        """Turns token ids into text."""
        self._admission.require_version(request.model_version)
        size = len(request.tokens.ids)
        return await self._prepared("", size, self._vocabulary.detokenize, request)

    @override
    async def GetEngineInfo(
        self, _: engine_service_pb.GetEngineInfoRequest, __: Context
    ) -> engine_service_pb.GetEngineInfoResponse:
        """Describes the worker."""
        return engine_service_pb.GetEngineInfoResponse(info=self._info)

    @override
    async def WatchKvEvents(
        self, _: engine_service_pb.WatchKvEventsRequest, __: Context
    ) -> AsyncGenerator[engine_service_pb.WatchKvEventsResponse, None]:
        """Streams what the prefix cache holds, then its changes, then signs of life."""
        async with aclosing(self._kv_log.watch()) as watch:
            async for changes in watch:
                yield changes_to_pb(changes)

    @override
    async def GetLoad(
        self, _: engine_service_pb.GetLoadRequest, __: Context
    ) -> engine_service_pb.GetLoadResponse:
        """Measures the load."""
        return engine_service_pb.GetLoadResponse(
            load=load_to_pb(self._engine.load(), preparing=self._executions.preparing)
        )

    async def _prepared(self, name: str, size: int, make: Callable[[T], U], given: T) -> U:
        """Makes something in the thread, if not too much waits for it."""
        self._preparation.require_room()
        return await self._preparation.run(name, size, make, given)

    async def _read(self, stream: Stream, context: Context) -> None:
        while True:
            request = await context.read()
            if not isinstance(request, engine_service_pb.ExecuteManyRequest):
                return
            if request.grant:
                stream.outbox.grant(request.grant)
            self._executions.abort_lanes(stream, request.abort_lanes)
            for count, execution in enumerate(request.start, start=1):
                self._executions.start(stream, execution)
                if count % STARTS_AT_ONCE == 0:
                    await asyncio.sleep(0)
