"""The floor of the suite's shape: two bare grpc.aio servers with an ExecuteMany stream between.

    python -m tests.bench.two_hops worker
    python -m tests.bench.two_hops gateway WORKER_PORT

A request to the gateway becomes a start on the one stream to the worker, which answers with an
acceptance and then a message for each token; the gateway sends started, deltas and finished, each
as a frame of its own, in messages of the suite's contracts. What comes up within one turn of the
event loop shares a message between the two, as in the suite. No key, no money, no engine, no
check, no journal, no log: what is dearer in the suite is not its shape. Prints its port and serves
until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import grpc
from maas.engine.v1 import engine_pb2, engine_service_pb2_grpc
from maas.engine.v1 import engine_service_pb2 as engine_pb
from maas.inference.v1 import generation_pb2
from maas.inference.v1 import generation_service_pb2 as pb

from libs.loop import EventLoop
from tests.bench.floor import TEXTS, frame

if TYPE_CHECKING:
    from grpc.aio import ServicerContext, StreamStreamCall

    Context = ServicerContext[Any, Any]
    Stream = StreamStreamCall[engine_pb.ExecuteManyRequest, engine_pb.ExecuteManyResponse]


async def execute_many(_: object, context: Context) -> None:
    """The worker's side: accepts, then makes a token of every lane with each message."""
    await context.send_initial_metadata(())
    left: dict[int, int] = {}
    begun: dict[int, int] = {}
    due = asyncio.Event()

    async def write() -> None:
        while True:
            await due.wait()
            response = engine_pb.ExecuteManyResponse()
            events = response.events
            for lane, count in list(left.items()):
                events.lanes.append(lane)
                events.token_ids.append(count)
                events.texts.append(TEXTS[count % len(TEXTS)])
                left[lane] = count - 1
                if count == 1:
                    del left[lane]
                    events.ended.append(engine_pb2.Ended(lane=lane))
            events.accepted.extend(engine_pb2.Accepted(lane=lane) for lane in begun)
            left.update(begun)
            begun.clear()
            if not left:
                due.clear()
            await context.write(response)

    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(write())
        while isinstance(request := await context.read(), engine_pb.ExecuteManyRequest):
            begun.update((start.lane, start.stop.max_output_tokens) for start in request.start)
            due.set()
        writing.cancel()


class Gateway:
    """The gateway's side: lanes on the one stream, a queue of events for each."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._lanes: dict[int, asyncio.Queue[int]] = {}
        self._count = 0
        self._starts: list[engine_pb2.Execution] = []
        self._due = asyncio.Event()

    async def read(self) -> None:
        """Hands the worker's events to their lanes: -1 for an acceptance, 0 for an end."""
        while isinstance(response := await self._stream.read(), engine_pb.ExecuteManyResponse):
            events = response.events
            for item in events.accepted:
                self._lanes[item.lane].put_nowait(-1)
            for lane, token_id in zip(events.lanes, events.token_ids, strict=True):
                self._lanes[lane].put_nowait(token_id)
            for ended in events.ended:
                self._lanes.pop(ended.lane).put_nowait(0)

    async def write(self) -> None:
        """Sends what is to be started."""
        while True:
            await self._due.wait()
            self._due.clear()
            starts, self._starts = self._starts, []
            await self._stream.write(engine_pb.ExecuteManyRequest(start=starts))

    async def stream(self, request: pb.StreamGenerateRequest, context: Context) -> None:
        """StreamGenerate."""
        self._count += 1
        lane, events = self._count, asyncio.Queue[int]()
        self._lanes[lane] = events
        spec = request.spec
        execution = engine_pb2.Execution(lane=lane, tokens=spec.tokens, stop=spec.stop)
        self._starts.append(execution)
        self._due.set()
        await events.get()
        started = generation_pb2.Started(generation_id=f"gen_{lane}", offering=spec.model)
        first = generation_pb2.GenerationFrame(sequence=1, started=started)
        await context.write(pb.StreamGenerateResponse(frame=first))
        number = 0
        while await events.get():
            number += 1
            await context.write(frame(number))
        last = generation_pb2.GenerationFrame(finished=generation_pb2.Finished())
        await context.write(pb.StreamGenerateResponse(frame=last))


async def _serve(service: str, name: str, method: grpc.RpcMethodHandler[Any, Any]) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handler = grpc.method_handlers_generic_handler(service, {name: method})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


async def worker() -> None:
    """Serves ExecuteMany."""
    method = grpc.stream_stream_rpc_method_handler(
        execute_many,
        request_deserializer=engine_pb.ExecuteManyRequest.FromString,
        response_serializer=engine_pb.ExecuteManyResponse.SerializeToString,
    )
    await _serve("maas.engine.v1.EngineService", "ExecuteMany", method)


async def gateway(worker_port: str) -> None:
    """Serves StreamGenerate, from a worker."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{worker_port}") as channel:
        stream = engine_service_pb2_grpc.EngineServiceStub(channel).ExecuteMany()
        served = Gateway(stream)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(served.read()), tasks.create_task(served.write())]
            method = grpc.unary_stream_rpc_method_handler(
                served.stream,
                request_deserializer=pb.StreamGenerateRequest.FromString,
                response_serializer=pb.StreamGenerateResponse.SerializeToString,
            )
            await _serve("maas.inference.v1.GenerationService", "StreamGenerate", method)
            for task in running:
                task.cancel()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(worker() if sys.argv[1] == "worker" else gateway(sys.argv[2]))
