"""A client in a process of its own, the same for the suite and the floors.

    python -m tests.bench.client ENDPOINT API_KEY MODEL LOAD

LOAD is the JSON of tests.bench.load.Load. Warms up, says so, waits for a line, does its load,
answers a line of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import grpc
import uvloop
from maas.inference.v1 import generation_pb2, generation_service_pb2_grpc
from maas.inference.v1 import generation_service_pb2 as pb

from tests.bench.load import PROMPT_TOKENS, WARM, Load, Result
from tests.bench.measure import Fairness, arrivals

if TYPE_CHECKING:
    Call = grpc.aio.UnaryStreamCall[pb.StreamGenerateRequest, pb.StreamGenerateResponse]

# A server of the suite allows 128 on one connection.
STREAMS_PER_CHANNEL = 64
WARM_TOKENS = 32
ENDLESS_TOKENS = 8000
BEGIN_TIMEOUT_S = 60.0


class Client:
    """Channels with subchannels of their own, enough for the streams."""

    def __init__(self, endpoint: str, api_key: str, model: str, streams: int) -> None:
        self._channels = [
            grpc.aio.insecure_channel(endpoint, options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(-(-streams // STREAMS_PER_CHANNEL))
        ]
        self._stubs = [
            generation_service_pb2_grpc.GenerationServiceStub(channel) for channel in self._channels
        ]
        self._model = model
        self._metadata = (("authorization", f"Bearer {api_key}"),)

    def request(self, index: int, tokens: int) -> pb.StreamGenerateRequest:
        """Makes the request of one stream, which goes on to its last token."""
        spec = generation_pb2.GenerationSpec(
            model=self._model,
            tokens=generation_pb2.TokenIds(ids=range(300, 300 + PROMPT_TOKENS)),
            sampling=generation_pb2.SamplingOptions(temperature=0.0, seed=index),
            stop=generation_pb2.StopOptions(max_output_tokens=tokens, ignore_eos=True),
        )
        return pb.StreamGenerateRequest(spec=spec)

    def call(self, index: int, request: pb.StreamGenerateRequest) -> Call:
        """Starts a stream, on one of the connections in turn."""
        stub = self._stubs[index % len(self._stubs)]
        # Connections are made at the first call of each: as patiently as a tenant would.
        return stub.StreamGenerate(request, metadata=self._metadata, wait_for_ready=True)

    async def close(self) -> None:
        """Closes all connections."""
        for channel in self._channels:
            await channel.close()


class Crowd:
    """Streams that run at the same time, and what they saw."""

    def __init__(self, client: Client, load: Load) -> None:
        self._client = client
        self._load = load
        self._first_token_s = [0.0] * load.count
        self._counts = [0] * load.count
        self._frames = [0] * load.count
        self._last_s = [0.0] * load.count
        self._longest_s = 0.0
        self._begun = 0
        self._all_begun = asyncio.Event()
        self._one_ended = asyncio.Event()

    async def run(self) -> Result:
        """Runs all streams to their ends."""
        started_s = time.perf_counter()
        await asyncio.gather(*(self._stream(index) for index in range(self._load.count)))
        return self._result(time.perf_counter() - started_s)

    async def run_together(self) -> Result:
        """Watches the streams while all of them run, and cancels them.

        Raises:
            RuntimeError: one ended before all had begun.
            grpc.aio.AioRpcError: one was refused.
        """
        started_s = time.perf_counter()
        streams = [asyncio.create_task(self._stream(index)) for index in range(self._load.count)]
        begun = asyncio.create_task(self._all_begun.wait())
        await asyncio.wait(
            [begun, *streams], timeout=BEGIN_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        for stream in streams:
            if stream.done():
                await stream
                raise RuntimeError("a stream ended before all had begun: ask for more tokens")
        begun.cancel()
        # Those that have not begun by now are not waited for; that they have not is told.
        running = [index for index, count in enumerate(self._counts) if count]
        watched_s = time.perf_counter()
        tokens, frames = list(self._counts), sum(self._frames)
        # The wait that runs now counts from here on.
        self._last_s = [watched_s] * self._load.count
        self._longest_s = 0.0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._load.seconds):
                await self._one_ended.wait()
        now_s = time.perf_counter()
        gained = [self._counts[index] - tokens[index] for index in running]
        fairness = Fairness(
            begun=len(running),
            begin_s=watched_s - started_s,
            seconds=now_s - watched_s,
            tokens=sum(gained),
            frames=sum(self._frames) - frames,
            least_tokens=min(gained),
            most_tokens=max(gained),
            longest_s=max(self._longest_s, now_s - min(self._last_s[index] for index in running)),
        )
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        return self._result(now_s - started_s, fairness)

    def _result(self, seconds: float, fairness: Fairness | None = None) -> Result:
        return Result(
            tokens=sum(self._counts),
            frames=sum(self._frames),
            seconds=seconds,
            first_token_s=self._first_token_s,
            fairness=fairness,
        )

    async def _stream(self, index: int) -> None:
        started_s = time.perf_counter()
        request = self._client.request(index, self._load.tokens)
        if self._load.top_logprobs is not None:
            request.spec.output.return_logprobs = True
            request.spec.output.top_logprobs = self._load.top_logprobs
        if self._load.frame_interval_s:
            nanos = int(self._load.frame_interval_s * 1e9)
            request.stream.frame_interval.FromNanoseconds(nanos)
        async for response in self._client.call(index, request):
            count = response.frame.output_tokens
            if count == self._counts[index]:
                continue
            now_s = time.perf_counter()
            if self._counts[index]:
                self._longest_s = max(self._longest_s, now_s - self._last_s[index])
            else:
                self._first_token_s[index] = now_s - started_s
                self._begin()
            self._last_s[index] = now_s
            self._counts[index] = count
            self._frames[index] += 1
        self._one_ended.set()

    def _begin(self) -> None:
        self._begun += 1
        if self._begun == self._load.count:
            self._all_begun.set()


async def first_token_s(client: Client, index: int, tokens: int) -> tuple[int, int, float]:
    """Runs one stream; returns its tokens, its frames and the seconds until its first token."""
    started_s = time.perf_counter()
    found_s = 0.0
    count = frames = 0
    async for response in client.call(index, client.request(index, tokens)):
        if response.frame.output_tokens == count:
            continue
        if not count:
            found_s = time.perf_counter() - started_s
        count = response.frame.output_tokens
        frames += 1
    return count, frames, found_s


async def run_streams(client: Client, load: Load) -> Result:
    """Streams at once."""
    return await Crowd(client, load).run()


async def run_together(client: Client, load: Load) -> Result:
    """Streams at once, watched while all of them run."""
    return await Crowd(client, load).run_together()


async def run_callers(client: Client, load: Load) -> Result:
    """Callers that each ask again as soon as they are answered."""
    left = iter(range(load.requests))
    found: list[tuple[int, int, float]] = []

    async def caller(index: int) -> None:
        # Not all of `left` is this caller's: it takes the next one when it has been answered.
        found.extend([await first_token_s(client, index, load.tokens) for _ in left])

    started_s = time.perf_counter()
    await asyncio.gather(*(caller(index) for index in range(load.count)))
    return _result(found, time.perf_counter() - started_s)


async def run_arrivals(client: Client, load: Load) -> Result:
    """Independent callers beside streams that go on all the time."""
    behind = [
        asyncio.create_task(first_token_s(client, index, ENDLESS_TOKENS))
        for index in range(load.count)
    ]
    if behind:
        await asyncio.sleep(1.0)
    started_s = time.perf_counter()
    tasks = []
    for index, moment_s in enumerate(arrivals(load.requests, load.per_s, load.seed)):
        await asyncio.sleep(started_s + moment_s - time.perf_counter())
        tasks.append(asyncio.create_task(first_token_s(client, index, load.tokens)))
    found = await asyncio.gather(*tasks)
    seconds = time.perf_counter() - started_s
    for task in behind:
        task.cancel()
    await asyncio.gather(*behind, return_exceptions=True)
    return _result(found, seconds)


def _result(found: list[tuple[int, int, float]], seconds: float) -> Result:
    return Result(
        tokens=sum(tokens for tokens, _, _ in found),
        frames=sum(frames for _, frames, _ in found),
        seconds=seconds,
        first_token_s=[first_s for _, _, first_s in found],
    )


_KINDS: dict[str, Callable[[Client, Load], Awaitable[Result]]] = {
    "streams": run_streams,
    "together": run_together,
    "callers": run_callers,
    "arrivals": run_arrivals,
}


async def main(arguments: list[str]) -> None:
    """Warms up, says so, measures, prints."""
    endpoint, api_key, model, text = arguments
    load = Load(**json.loads(text))
    at_once = load.count + (load.at_once if load.kind == "arrivals" else 0)
    client = Client(endpoint, api_key, model, at_once)
    warming = Load(kind="streams", count=at_once, tokens=min(load.tokens, WARM_TOKENS))
    await run_streams(client, warming)
    sys.stdout.write(f"{WARM}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)
    result = await _KINDS[load.kind](client, load)
    sys.stdout.write(f"{result.to_json()}\n")
    sys.stdout.flush()
    await client.close()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
