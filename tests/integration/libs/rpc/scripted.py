"""A servicer whose methods do what a test says, behind a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from maas.catalog.v1 import offering_service_pb2 as pb
from maas.catalog.v1 import offering_service_pb2_grpc
from typing_extensions import override

from libs.clock import Clock
from libs.rpc import Peer, Server
from libs.testing.rpc import ANY_PORT, Callers, serving

OFFERINGS: ServiceDescriptor = pb.DESCRIPTOR.services_by_name["OfferingService"]
WATCH = f"{OFFERINGS.full_name}/WatchOfferings"
CALLERS = Callers()


class Scripted(offering_service_pb2_grpc.OfferingServiceServicer):
    """Attributes are what the methods do; each counts its calls."""

    def __init__(self) -> None:
        self.get: Callable[[Any], Awaitable[Any]] = self._answer
        self.watch: Callable[[Any], AsyncIterator[Any]] = self._stream
        self.calls = 0

    async def _answer(self, _: Any) -> pb.GetOfferingResponse:
        return pb.GetOfferingResponse()

    async def _stream(self, _: Any) -> AsyncIterator[pb.WatchOfferingsResponse]:
        yield pb.WatchOfferingsResponse(snapshot_complete=True)

    @override
    async def GetOffering(self, _: Any, context: Any) -> Any:
        self.calls += 1
        return await self.get(context)

    @override
    async def CreateOffering(self, _: Any, context: Any) -> Any:
        self.calls += 1
        await self.get(context)
        return pb.CreateOfferingResponse()

    @override
    async def ListOfferings(self, _request: Any, _: Any) -> Any:
        return pb.ListOfferingsResponse()

    @override
    def WatchOfferings(self, _: Any, context: Any) -> Any:
        self.calls += 1
        return self.watch(context)


def server_of(servicer: Scripted, clock: Clock | None = None) -> Server:
    """Puts it behind the stack."""
    server = Server(ANY_PORT, CALLERS.identity({WATCH: ["gateway"]}), clock=clock)
    server.add(servicer, OFFERINGS)
    return server


class Reached:
    """A running server, and ways to call it."""

    def __init__(self, endpoint: str, server: Server, servicer: Scripted, peer: Peer) -> None:
        self.endpoint = endpoint
        self.server = server
        self.servicer = servicer
        self.peer = peer

    async def get(self, timeout_s: float | None = None) -> pb.GetOfferingResponse:
        """Calls GetOffering as a tenant, through a Peer."""
        stub = offering_service_pb2_grpc.OfferingServiceStub(self.peer.channel)
        request = pb.GetOfferingRequest(name="offerings/x")
        return await self.peer.call(stub.GetOffering, request, timeout_s=timeout_s)

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[Any]:
        """Calls WatchOfferings as the gateway, through a Peer."""
        async with Peer(self.endpoint, CALLERS.tokens["gateway"], [OFFERINGS]) as peer:
            stub = offering_service_pb2_grpc.OfferingServiceStub(peer.channel)
            async with peer.stream(stub.WatchOfferings, pb.WatchOfferingsRequest()) as stream:
                yield stream

    @asynccontextmanager
    async def plain(self) -> AsyncIterator[offering_service_pb2_grpc.OfferingServiceAsyncStub]:
        """A stub on a channel without retries, deadlines or credentials."""
        async with grpc.aio.insecure_channel(self.endpoint) as channel:
            yield offering_service_pb2_grpc.OfferingServiceStub(channel)


@asynccontextmanager
async def reached(clock: Clock | None = None) -> AsyncIterator[Reached]:
    """Runs a scripted server and a tenant's peer."""
    servicer = Scripted()
    server = server_of(servicer, clock)
    async with (
        serving(server) as endpoint,
        Peer(endpoint, CALLERS.tenant, [OFFERINGS]) as peer,
    ):
        yield Reached(endpoint, server, servicer, peer)
