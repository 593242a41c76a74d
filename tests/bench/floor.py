"""The floor: one grpc.aio server that streams one-token messages, and does nothing else.

    python -m tests.bench.floor INTERVAL_S

Serves StreamGenerate in the messages of the suite's own contract, so that the same client reads
both: for each output token one frame with one delta. Each stream is paced by its own timer; an
interval of 0 writes as fast as the transport takes it. No key, no money, no engine, no other hop.
Prints its port and serves until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import grpc
import uvloop
from maas.inference.v1 import generation_pb2
from maas.inference.v1 import generation_service_pb2 as pb

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

TEXTS = (" the", " fox", " in", " the", " snow", ".", " and", " then")


def frame(number: int) -> pb.StreamGenerateResponse:
    """Makes the message of one token; the first is 1."""
    output = generation_pb2.OutputDelta(text=TEXTS[number % len(TEXTS)])
    return pb.StreamGenerateResponse(
        frame=generation_pb2.GenerationFrame(
            sequence=number,
            delta=generation_pb2.Delta(outputs=[output]),
            output_tokens=number,
        )
    )


def handler(interval_s: float) -> grpc.GenericRpcHandler:
    """Makes the one method that is served; `interval_s` is between two tokens of one stream."""

    async def stream(request: pb.StreamGenerateRequest, context: Context) -> None:
        # Writes by itself, which is faster than an iterator.
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        for number in range(1, request.spec.stop.max_output_tokens + 1):
            if interval_s:
                due_s += interval_s
                await asyncio.sleep(due_s - loop.time())
            await context.write(frame(number))

    method = grpc.unary_stream_rpc_method_handler(
        stream,
        request_deserializer=pb.StreamGenerateRequest.FromString,
        response_serializer=pb.StreamGenerateResponse.SerializeToString,
    )
    service = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
    return grpc.method_handlers_generic_handler(service, {"StreamGenerate": method})


async def main(interval_s: float) -> None:
    """Serves until the standard input is closed."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((handler(interval_s),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    uvloop.run(main(float(sys.argv[1])))
