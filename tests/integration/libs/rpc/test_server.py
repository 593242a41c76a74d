"""libs/rpc/server.py: a listener, its limits, health, reflection, its end."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from maas.catalog.v1 import offering_service_pb2 as pb

from libs.config import ConfigError, ServerSection
from libs.errors import NotImplementedHere, Reason
from libs.limits import PUBLIC_REQUEST_BYTES_MAX
from libs.process import StartError
from libs.rpc import Server
from libs.rpc.status import error_of
from libs.testing import eventually
from libs.testing.rpc import ANY_PORT, serving
from tests.integration.libs.rpc.scripted import (
    CALLERS,
    OFFERINGS,
    WATCH,
    Reached,
    Scripted,
    server_of,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(endpoint: str, service: str = "") -> int:
    async with grpc.aio.insecure_channel(endpoint) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


@pytest.mark.parametrize("service", ["", OFFERINGS.full_name, "grpc.health.v1.Health"])
async def test_health_is_open_to_everybody(scripted: Reached, service: str) -> None:
    assert await health(scripted.endpoint, service) == SERVING
    await scripted.server.set_serving(is_serving=False)
    assert await health(scripted.endpoint, service) == NOT_SERVING


async def test_server_is_not_serving_until_it_is_told_so() -> None:
    server = server_of(Scripted())
    port = await server.start()
    try:
        assert await health(f"127.0.0.1:{port}") == NOT_SERVING
    finally:
        await server.stop(0)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_and_describes(scripted: Reached, version: str) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=OFFERINGS.full_name),
    ]
    async with grpc.aio.insecure_channel(scripted.endpoint) as channel:
        method: Any = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        responses = [response async for response in method(iter(requests))]

    listed = {item.name for item in responses[0].list_services_response.service}
    assert {OFFERINGS.full_name, "grpc.health.v1.Health"} <= listed
    assert responses[1].file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize(
    "method", ["maas.catalog.v1.OfferingService/Invent", "other.Service/Method"]
)
async def test_method_that_is_not_served_is_refused_with_a_reason(
    scripted: Reached, method: str
) -> None:
    async with grpc.aio.insecure_channel(scripted.endpoint) as channel:
        call: Any = channel.unary_unary(f"/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", timeout=5)

    got = error_of(caught.value)
    assert isinstance(got, NotImplementedHere)
    assert (got.reason, got.metadata) == (Reason.NOT_IMPLEMENTED, {"method": method})


async def test_request_over_the_limit_is_refused(scripted: Reached) -> None:
    request = pb.GetOfferingRequest(name="x" * (PUBLIC_REQUEST_BYTES_MAX + 1))
    async with scripted.plain() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetOffering(request, timeout=5)

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_port_that_is_taken_stops_the_start(scripted: Reached) -> None:
    config = ServerSection(listen=scripted.endpoint, metrics_listen="127.0.0.1:0")
    second = Server(config, CALLERS.identity())

    with pytest.raises(StartError, match=scripted.endpoint):
        await second.start()
    await second.stop(0)


async def test_internal_method_without_an_allow_list_is_not_served() -> None:
    server = Server(ANY_PORT, CALLERS.identity())

    with pytest.raises(ConfigError, match=WATCH):
        server.add(Scripted(), OFFERINGS)


async def test_servicer_without_a_method_is_not_served() -> None:
    server = Server(ANY_PORT, CALLERS.identity({WATCH: ["gateway"]}))

    with pytest.raises(AttributeError, match="CreateOffering"):
        server.add(object(), OFFERINGS)


async def test_sigterm_drains_and_stops() -> None:
    server = server_of(Scripted())
    endpoint = f"127.0.0.1:{await server.start()}"
    seen: list[int] = []

    async def drain() -> None:
        seen.append(await health(endpoint))

    async def is_serving() -> bool:
        return await health(endpoint) == SERVING

    async def signal_once_serving() -> None:
        await eventually(is_serving)
        os.kill(os.getpid(), signal.SIGTERM)

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(server.serve(drain=drain))
        group.create_task(signal_once_serving())

    assert seen == [NOT_SERVING]


async def test_part_that_fails_ends_the_process() -> None:
    server = server_of(Scripted())
    await server.start()
    server.fail(ValueError("the poll is dead"))

    with pytest.raises(StartError, match="the poll is dead"):
        await server.serve()


async def test_drain_that_takes_too_long_is_cut_off() -> None:
    config = ServerSection.model_validate(
        {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "drain_grace": "10ms"}
    )
    server = Server(config, CALLERS.identity())
    await server.start()

    async def serve() -> None:
        await server.serve(drain=asyncio.Event().wait)  # type: ignore[arg-type] # never returns

    async def stop() -> None:
        await asyncio.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(serve())
        group.create_task(stop())


async def test_stopped_server_frees_its_port() -> None:
    async with serving(server_of(Scripted())) as endpoint:
        pass

    config = ServerSection(listen=endpoint, metrics_listen="127.0.0.1:0")
    again = Server(config, CALLERS.identity())
    await again.start()
    await again.stop(0)
