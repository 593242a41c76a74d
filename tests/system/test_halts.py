"""Processes that stand still for seconds, and clients that do not wait for them.

A client that reads pays for at most 64 tokens more than it has read, and one that stays gets all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import grpc
import pytest
from maas.billing.v1 import usage_service_pb2
from maas.billing.v1.usage_service_pb2_grpc import UsageServiceStub
from maas.inference.v1 import generation_pb2
from maas.inference.v1 import generation_service_pb2 as generations
from maas.inference.v1.generation_service_pb2_grpc import GenerationServiceStub

from tests.system.suite import Client, Suite, eventually_settled, new_suite

if TYPE_CHECKING:
    from grpc.aio import Channel, UnaryStreamCall

    Call = UnaryStreamCall[generations.StreamGenerateRequest, generations.StreamGenerateResponse]

OVER_MAX = 64
STEP = "10ms"
HALT_S = 1.5
EACH = 4
TOKENS = 250
BEGUN = 20
# Long enough for a gateway to release all that it finds, if it did that.
BUSY_S = 0.02


@pytest.fixture(scope="module")
def paced_suite() -> Iterator[Suite]:
    """A suite whose engine makes 100 tokens/s of each stream."""
    with new_suite() as suite:
        suite.start("--step", STEP)
        yield suite


class Reading:
    """One stream, read as fast as it comes until it is left.

    Attributes:
        frames: read so far.
    """

    def __init__(self, client: Client, channel: Channel) -> None:
        request = generations.StreamGenerateRequest(
            spec=generation_pb2.GenerationSpec(
                model=client.variables["MAAS_MODEL"],
                text="Once upon a time",
                stop=generation_pb2.StopOptions(max_output_tokens=TOKENS, ignore_eos=True),
            )
        )
        metadata = (("authorization", f"Bearer {client.variables['MAAS_API_KEY']}"),)
        stub = GenerationServiceStub(channel)
        self._call: Call = stub.StreamGenerate(request, metadata=metadata, timeout=60)
        self.frames: list[generation_pb2.GenerationFrame] = []
        self._has_begun = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    @property
    def tokens(self) -> int:
        """Output tokens read so far."""
        return self.frames[-1].output_tokens if self.frames else 0

    @property
    def generation_id(self) -> str:
        """From `started`."""
        return self.frames[0].started.generation_id

    async def begun(self) -> None:
        """Waits until BEGUN tokens were read."""
        async with asyncio.timeout(20):
            await self._has_begun.wait()

    def leave(self) -> None:
        """Cancels the call; nothing is read any more."""
        self._call.cancel()

    async def rest(self) -> None:
        """Waits until there is nothing more to read."""
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _read(self) -> None:
        async for response in self._call:
            self.frames.append(response.frame)
            if self.tokens >= BEGUN:
                self._has_begun.set()


@contextlib.asynccontextmanager
async def halted(pid: int) -> AsyncIterator[None]:
    """Has a process stand still for HALT_S; the block runs in the middle of that."""
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(HALT_S / 2)
        yield
        await asyncio.sleep(HALT_S / 2)
    finally:
        os.kill(pid, signal.SIGCONT)


async def counted(client: Client) -> dict[str, int]:
    """Output tokens of each settled generation."""
    service = usage_service_pb2.DESCRIPTOR.services_by_name["UsageService"]
    async with client.connect("billing", service) as peer:
        request = usage_service_pb2.ListUsageRecordsRequest(
            parent=client.variables["MAAS_ACCOUNT"], page_size=1000
        )
        response = await peer.call(UsageServiceStub(peer.channel).ListUsageRecords, request)
    return {item.generation_id: item.usage.output_tokens for item in response.usage_records}


@pytest.mark.parametrize("name", ["gateway", "worker-1"])
async def test_a_halt_costs_no_more_than_is_promised(paced_suite: Suite, name: str) -> None:
    """Some leave during the halt, some as it ends, some a little later, and some stay."""
    client = Client(paced_suite)
    async with grpc.aio.insecure_channel(client.variables["MAAS_ENDPOINT"]) as channel:
        readings = [Reading(client, channel) for _ in range(4 * EACH)]
        early, late, soon, staying = (readings[n * EACH : (n + 1) * EACH] for n in range(4))
        for reading in readings:
            await reading.begun()

        async with halted(paced_suite.pids()[name]):
            for reading in early:
                reading.leave()
        # As a client that is busy with something else: it reads nothing, and then leaves.
        time.sleep(BUSY_S)  # noqa: ASYNC251 - that is what is tried
        for reading in late:
            reading.leave()
        for reading in soon:
            await asyncio.sleep(BUSY_S)
            reading.leave()
        for reading in readings:
            await reading.rest()

    assert [reading.tokens for reading in staying] == [TOKENS] * EACH
    await eventually_settled(client)
    counts = await counted(client)
    over = [counts[reading.generation_id] - reading.tokens for reading in readings]
    assert min(over) >= 0
    assert max(over) <= OVER_MAX, over
    assert over[-EACH:] == [0] * EACH
