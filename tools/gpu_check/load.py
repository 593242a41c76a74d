"""A client of the suite under load: python -m tools.gpu_check.load, one process for some streams.

Reads a job from the first line of standard input, says "ready", waits for another line, and writes
one line with the outcome. Looks into as few frames as it can: the client shares the machine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import grpc
from maas.inference.v1 import generation_pb2
from maas.inference.v1.generation_service_pb2 import StreamGenerateRequest, StreamGenerateResponse

from tools.gpu_check.workload import Outcome, Workload

if TYPE_CHECKING:
    from grpc.aio import UnaryStreamMultiCallable

READY = "ready"
_METHOD = "/maas.inference.v1.GenerationService/StreamGenerate"
_WARM_TOKENS = 8


class Client:
    """Some of the streams of one run.

    Args:
        job: endpoint, key, model, work, streams of the run, and which of them are its own.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        fields = {**job["work"], "streams": tuple(job["work"]["streams"])}
        self._work = Workload(**fields)
        self._prompts = [self._work.prompts(job["streams"], number) for number in job["own"]]
        self.tokens = 0
        self.firsts: list[float] = []
        self.failures: dict[str, int] = {}

    async def warm(self, channel: grpc.aio.Channel) -> None:
        """Opens the connection and lets every stream say something short."""
        async with asyncio.timeout(self._job["limit_s"]):
            await asyncio.gather(
                *(self._request(channel, own[-1], _WARM_TOKENS) for own in self._prompts)
            )
        self.tokens, self.firsts, self.failures = 0, [], {}

    async def run(self, channel: grpc.aio.Channel) -> None:
        """All streams at the same time, each with its requests one after the other."""
        await asyncio.gather(*(self._stream(channel, own[:-1]) for own in self._prompts))

    async def _stream(self, channel: grpc.aio.Channel, prompts: list[list[int]]) -> None:
        for prompt in prompts:
            await self._request(channel, prompt, self._work.output_tokens)

    async def _request(self, channel: grpc.aio.Channel, prompt: list[int], tokens: int) -> None:
        spec = generation_pb2.GenerationSpec(
            model=self._job["model"],
            tokens=generation_pb2.TokenIds(ids=prompt),
            sampling=generation_pb2.SamplingOptions(temperature=1, top_p=1, top_k=0, seed=1),
            stop=generation_pb2.StopOptions(max_output_tokens=tokens, ignore_eos=True),
        )
        method: UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(_METHOD)
        call = method(
            StreamGenerateRequest(spec=spec).SerializeToString(),
            metadata=(("authorization", f"Bearer {self._job['key']}"),),
            timeout=self._job["limit_s"],
        )
        started_s = time.perf_counter()
        last = b""
        has_begun = False
        try:
            async for last in call:
                if not has_begun:
                    frame = StreamGenerateResponse.FromString(last).frame
                    has_begun = frame.HasField("delta")
                    if has_begun:
                        self.firsts.append(time.perf_counter() - started_s)
        except grpc.aio.AioRpcError as error:
            self._fail(error.code().name)
            return
        finished = StreamGenerateResponse.FromString(last).frame.finished
        self.tokens += finished.usage.output_tokens

    def _fail(self, reason: str) -> None:
        self.failures[reason] = self.failures.get(reason, 0) + 1


async def main() -> None:
    """Makes the job."""
    job = json.loads(await asyncio.to_thread(sys.stdin.readline))
    client = Client(job)
    async with grpc.aio.insecure_channel(job["endpoint"]) as channel:
        await client.warm(channel)
        print(READY, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        # The clock of the whole machine: other processes have the same.
        started_s = time.perf_counter()
        await client.run(channel)
        outcome = Outcome(
            started_s=started_s,
            ended_s=time.perf_counter(),
            tokens=client.tokens,
            firsts=client.firsts,
            failures=client.failures,
        )
    print(json.dumps(dataclasses.asdict(outcome)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
