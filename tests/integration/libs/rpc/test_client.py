"""libs/rpc/client.py: calls to another service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from maas.catalog.v1 import offering_service_pb2 as pb
from maas.catalog.v1 import offering_service_pb2_grpc
from maas.scheduler.v1 import worker_registry_service_pb2 as registry
from maas.scheduler.v1 import worker_registry_service_pb2_grpc

from libs.errors import (
    DeadlineExceeded,
    NotFound,
    Unauthenticated,
    Unavailable,
    not_found,
    unavailable,
)
from libs.rpc import Peer, Server
from libs.testing.rpc import ANY_PORT, serving
from tests.integration.libs.rpc.scripted import CALLERS, OFFERINGS, Reached


async def test_error_of_the_service_is_raised_here(scripted: Reached) -> None:
    async def behave(_: Any) -> Any:
        raise not_found("offerings/x")

    scripted.servicer.get = behave

    with pytest.raises(NotFound) as caught:
        await scripted.get()
    assert caught.value.metadata == {"resource": "offerings/x"}


async def test_service_that_is_not_there_is_unavailable(scripted: Reached) -> None:
    await scripted.server.stop(0)

    with pytest.raises(Unavailable):
        await read_once(scripted)


async def read_once(scripted: Reached) -> None:
    # A watch is not repeated by the library.
    async with scripted.watch() as stream:
        await stream.read()


class Registry:
    """Nobody gets past its door here."""

    async def Connect(self, *_: object) -> None:  # noqa: N802 - as in the contract
        raise AssertionError


async def test_a_stream_refused_at_the_door_says_why_however_busily_it_is_written_to() -> None:
    """A write that comes just behind the refusal fails, and the library makes up a status."""
    service = registry.DESCRIPTOR.services_by_name["WorkerRegistryService"]
    server = Server(ANY_PORT, CALLERS.identity({f"{service.full_name}/Connect": ["worker"]}))
    server.add(Registry(), service)

    async def write_on(peer: Peer) -> None:
        stub = worker_registry_service_pb2_grpc.WorkerRegistryServiceStub(peer.channel)
        async with peer.both_ways(stub.Connect) as call:
            with contextlib.suppress(asyncio.InvalidStateError):
                for _ in range(40):
                    await call.write(registry.ConnectRequest())
            await call.read()

    async with serving(server) as endpoint, Peer(endpoint, "ms_nobody", [service]) as peer:
        ends = await asyncio.gather(*(write_on(peer) for _ in range(60)), return_exceptions=True)

    assert {type(end) for end in ends} == {Unauthenticated}


async def test_call_carries_the_default_deadline_of_its_method(scripted: Reached) -> None:
    seen: list[float] = []

    async def behave(context: Any) -> pb.GetOfferingResponse:
        seen.append(context.time_remaining())
        return pb.GetOfferingResponse()

    scripted.servicer.get = behave
    await scripted.get()
    await scripted.get(timeout_s=3)

    default, given = seen
    # gRPC rounds a little up.
    assert 8 < default < 10.5
    assert 2 < given < 3.5


async def test_deadline_of_the_caller_holds(scripted: Reached) -> None:
    async def behave(_: Any) -> Any:
        await asyncio.Event().wait()

    scripted.servicer.get = behave

    with pytest.raises(DeadlineExceeded):
        await scripted.get(timeout_s=0.05)


async def test_safe_method_is_repeated_while_unavailable(scripted: Reached) -> None:
    async def behave(_: Any) -> pb.GetOfferingResponse:
        if scripted.servicer.calls < 3:
            raise unavailable("postgresql", retry_after_s=0.001)
        return pb.GetOfferingResponse()

    scripted.servicer.get = behave
    await scripted.get()

    assert scripted.servicer.calls == 3


async def test_repeats_are_bounded(scripted: Reached) -> None:
    async def behave(_: Any) -> Any:
        raise unavailable("postgresql", retry_after_s=0.001)

    scripted.servicer.get = behave

    with pytest.raises(Unavailable) as caught:
        await scripted.get()
    assert scripted.servicer.calls == 4
    assert caught.value.metadata == {"dependency": "postgresql"}


async def test_other_errors_are_not_repeated(scripted: Reached) -> None:
    async def behave(_: Any) -> Any:
        raise not_found("offerings/x")

    scripted.servicer.get = behave

    with pytest.raises(NotFound):
        await scripted.get()
    assert scripted.servicer.calls == 1


async def test_leaving_a_stream_cancels_it(scripted: Reached) -> None:
    ended = asyncio.Event()

    async def behave(_: Any) -> AsyncIterator[pb.WatchOfferingsResponse]:
        try:
            while True:
                yield pb.WatchOfferingsResponse()
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    scripted.servicer.watch = behave
    with pytest.raises(KeyError):
        await leave_by_an_exception(scripted)

    async with asyncio.timeout(1):
        await ended.wait()


async def leave_by_an_exception(scripted: Reached) -> None:
    async with scripted.watch() as stream:
        async for _ in stream:
            raise KeyError


async def test_stream_of_a_service_that_goes_away_is_unavailable(scripted: Reached) -> None:
    async def behave(_: Any) -> AsyncIterator[pb.WatchOfferingsResponse]:
        yield pb.WatchOfferingsResponse()
        await asyncio.Event().wait()

    scripted.servicer.watch = behave

    with pytest.raises(Unavailable):
        await read_until_the_server_stops(scripted)


async def read_until_the_server_stops(scripted: Reached) -> None:
    async with scripted.watch() as stream:
        await stream.read()
        await scripted.server.stop(0)
        await stream.read()


async def test_closing_cancels_what_runs(scripted: Reached) -> None:
    started = asyncio.Event()
    ended = asyncio.Event()

    async def behave(_: Any) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    scripted.servicer.get = behave
    async with Peer(scripted.endpoint, CALLERS.tenant, [OFFERINGS]) as peer:
        stub = offering_service_pb2_grpc.OfferingServiceStub(peer.channel)
        call = stub.GetOffering(
            pb.GetOfferingRequest(name="offerings/x"), metadata=peer._metadata, timeout=5
        )
        waiting = asyncio.ensure_future(_code_of(call))
        async with asyncio.timeout(1):
            await started.wait()

    async with asyncio.timeout(1):
        await ended.wait()
    await waiting


async def _code_of(call: Any) -> Any:
    return await call.code()
