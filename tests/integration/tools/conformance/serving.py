"""Serves a stand-in on loopback: all services on one port, errors as statuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc
from maas.auth.v1.api_key_service_pb2_grpc import add_ApiKeyServiceServicer_to_server
from maas.auth.v1.tenancy_service_pb2_grpc import add_TenancyServiceServicer_to_server
from maas.billing.v1.account_service_pb2_grpc import add_AccountServiceServicer_to_server
from maas.billing.v1.price_service_pb2_grpc import add_PriceServiceServicer_to_server
from maas.billing.v1.usage_service_pb2_grpc import add_UsageServiceServicer_to_server
from maas.catalog.v1.adapter_service_pb2_grpc import add_AdapterServiceServicer_to_server
from maas.inference.v1.embedding_service_pb2_grpc import add_EmbeddingServiceServicer_to_server
from maas.inference.v1.generation_service_pb2_grpc import add_GenerationServiceServicer_to_server
from maas.inference.v1.tokenization_service_pb2_grpc import (
    add_TokenizationServiceServicer_to_server,
)
from maas.scheduler.v1.worker_service_pb2_grpc import add_WorkerServiceServicer_to_server

from libs.errors import MaasError
from libs.rpc.status import grpc_code, trailers
from tests.integration.tools.conformance.running import Running
from tools.conformance.deployment import Deployment

REQUEST_BYTES_MAX = 8 * 1024 * 1024


class House(Protocol):
    """What is served."""

    generations: dict[str, Running]

    def deployment(self, endpoint: str) -> Deployment: ...


async def refuse(context: Any, error: MaasError) -> None:
    await context.abort(grpc_code(error.code), error.message, trailers(error, "r"))


@asynccontextmanager
async def refusing(context: Any) -> AsyncIterator[None]:
    """Turns an error into a status."""
    try:
        yield
    except MaasError as error:
        await refuse(context, error)


@asynccontextmanager
async def serving(house: House) -> AsyncIterator[Deployment]:
    """Serves it on loopback."""
    # Every service finds its methods there, and refuses the others.
    as_servicer: Any = Partial(house)
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
        ]
    )
    for add in (
        add_AccountServiceServicer_to_server,
        add_UsageServiceServicer_to_server,
        add_PriceServiceServicer_to_server,
        add_ApiKeyServiceServicer_to_server,
        add_TenancyServiceServicer_to_server,
        add_WorkerServiceServicer_to_server,
        add_GenerationServiceServicer_to_server,
        add_TokenizationServiceServicer_to_server,
        add_EmbeddingServiceServicer_to_server,
        add_AdapterServiceServicer_to_server,
    ):
        add(as_servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield house.deployment(f"127.0.0.1:{port}")
    finally:
        await server.stop(0)
        for running in house.generations.values():
            if running.task is not None:
                running.task.cancel()


class Partial:
    """A servicer of any service: methods that the stand-in lacks are refused as unimplemented."""

    def __init__(self, house: House) -> None:
        self._house = house

    def __getattr__(self, name: str) -> Any:
        return getattr(self._house, name, _unimplemented)


async def _unimplemented(_request: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")
