"""The same load through the whole path, by a client of its own process.

    python -m tests.bench.client ENDPOINT API_KEY MODEL STREAMS TOKENS

Runs the load twice, the first to warm up, and prints the second as JSON.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time

import grpc
import uvloop
from maas.inference.v1 import generation_pb2, generation_service_pb2, generation_service_pb2_grpc

from tests.bench.measure import Measurement

# The server allows 128 on one connection.
STREAMS_PER_CHANNEL = 64


def request(model: str, seed: int, tokens: int) -> generation_service_pb2.StreamGenerateRequest:
    """Makes one request of the load."""
    return generation_service_pb2.StreamGenerateRequest(
        spec=generation_pb2.GenerationSpec(
            model=model,
            tokens=generation_pb2.TokenIds(ids=range(300, 332)),
            sampling=generation_pb2.SamplingOptions(temperature=0.0, seed=seed),
            stop=generation_pb2.StopOptions(max_output_tokens=tokens, ignore_eos=True),
        )
    )


class Client:
    """Channels with subchannels of their own, enough for the streams."""

    def __init__(self, endpoint: str, api_key: str, streams: int) -> None:
        count = -(-streams // STREAMS_PER_CHANNEL)
        self.channels = [
            grpc.aio.insecure_channel(endpoint, options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(count)
        ]
        self._stubs = [
            generation_service_pb2_grpc.GenerationServiceStub(channel) for channel in self.channels
        ]
        self._metadata = (("authorization", f"Bearer {api_key}"),)

    async def stream(self, index: int, model: str, tokens: int) -> tuple[int, float]:
        """Runs one stream; returns its tokens and the seconds to its first."""
        stub = self._stubs[index % len(self._stubs)]
        started = time.perf_counter()
        first_s = 0.0
        count = 0
        call = stub.StreamGenerate(request(model, index, tokens), metadata=self._metadata)
        async for response in call:
            if not count and response.frame.output_tokens:
                first_s = time.perf_counter() - started
            count = response.frame.output_tokens
        return count, first_s

    async def load(self, model: str, streams: int, tokens: int) -> Measurement:
        """Runs the streams at once."""
        started = time.perf_counter()
        results = await asyncio.gather(
            *(self.stream(index, model, tokens) for index in range(streams))
        )
        return Measurement(
            sum(count for count, _ in results),
            time.perf_counter() - started,
            statistics.median(first_s for _, first_s in results),
        )


async def main(arguments: list[str]) -> None:
    """Warms up, says so, measures, prints."""
    endpoint, api_key, model, streams, tokens = arguments
    client = Client(endpoint, api_key, int(streams))
    await client.load(model, int(streams), min(int(tokens), 64))
    sys.stdout.write("warm\n")
    sys.stdout.flush()
    sys.stdin.readline()
    result = await client.load(model, int(streams), int(tokens))
    sys.stdout.write(result.to_json() + "\n")
    for channel in client.channels:
        await channel.close()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
