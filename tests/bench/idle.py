"""A client that opens streams and lets them stand, for the memory of each.

    python -m tests.bench.idle ENDPOINT API_KEY MODEL STREAMS

STREAMS is how many there will be at most, for which connections are made. Reads a line of JSON,
does it and answers a line: {"do": "attach" | "detach" | "finish", "count": streams}. An attached
stream stays open; a detached one is left by its caller once it has started, and goes on; a finished
one has one token and can be repeated until its window is over.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from typing import TYPE_CHECKING

import uvloop
from maas.inference.v1 import generation_service_pb2 as pb

from tests.bench.client import Client

if TYPE_CHECKING:
    from tests.bench.client import Call

AT_ONCE = 64
TOKENS = 256


class Opener:
    """Opens streams, a bounded number at a time."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._numbers = itertools.count()
        # Streams end when nobody holds their calls.
        self._calls: list[Call] = []

    async def do(self, what: str, count: int) -> None:
        """Opens or finishes streams; returns when all of them are that far."""
        act = {"attach": self._attach, "detach": self._detach, "finish": self._finish}[what]
        left = iter(range(count))

        async def some() -> None:
            for _ in left:
                await act(next(self._numbers))

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))

    async def _attach(self, number: int) -> None:
        call = self._client.call(number, self._client.request(number, TOKENS))
        self._calls.append(call)
        await call.read()

    async def _detach(self, number: int) -> None:
        request = self._client.request(number, TOKENS)
        request.stream.on_disconnect = pb.DISCONNECT_POLICY_CONTINUE
        call = self._client.call(number, request)
        await call.read()
        call.cancel()

    async def _finish(self, number: int) -> None:
        request = self._client.request(number, 1)
        request.request_id = f"bench-{number}"
        async for _ in self._client.call(number, request):
            pass


async def main(arguments: list[str]) -> None:
    """Does what it is told until its input ends."""
    endpoint, api_key, model, streams = arguments
    client = Client(endpoint, api_key, model, int(streams))
    opener = Opener(client)
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        await opener.do(order["do"], order["count"])
        sys.stdout.write("done\n")
        sys.stdout.flush()
    await client.close()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
