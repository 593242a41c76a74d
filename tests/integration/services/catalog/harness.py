"""A catalog in this process: real gRPC on loopback, real PostgreSQL."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from maas.catalog.v1 import (
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    offering_service_pb2,
    offering_service_pb2_grpc,
)

from libs import postgres
from libs.clock import SystemClock
from libs.config import PostgresSection
from libs.postgres import Database
from libs.process import Background
from libs.rpc import Hub, Peer, Server
from libs.rpc.feed import poll_revision
from libs.testing import FakeClock
from libs.testing.rpc import ANY_PORT, Callers, serving
from services.catalog.service import AdapterService, ModelService, OfferingService
from services.catalog.store import AdapterStore, CatalogStore

if TYPE_CHECKING:
    from grpc.aio import UnaryStreamCall

    WatchCall = UnaryStreamCall[
        offering_service_pb2.WatchOfferingsRequest, offering_service_pb2.WatchOfferingsResponse
    ]
    AdapterWatchCall = UnaryStreamCall[
        adapter_service_pb2.WatchAdaptersRequest, adapter_service_pb2.WatchAdaptersResponse
    ]

MODELS = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
OFFERINGS = offering_service_pb2.DESCRIPTOR.services_by_name["OfferingService"]
ADAPTERS = adapter_service_pb2.DESCRIPTOR.services_by_name["AdapterService"]
WATCH = "maas.catalog.v1.OfferingService/WatchOfferings"
LOOK_UP = "maas.catalog.v1.ModelService/LookUpModelVersion"
WATCH_ADAPTERS = "maas.catalog.v1.AdapterService/WatchAdapters"
BOOKMARK_S = 0.05
POLL_S = 0.02
PATIENCE_S = 5.0


@dataclasses.dataclass(slots=True, kw_only=True)
class Catalog:
    """A running catalog and its callers."""

    endpoint: str
    database: Database
    server: Server
    clock: FakeClock
    callers: Callers
    admin: Peer
    tenant: Peer
    gateway: Peer

    @property
    def models(self) -> model_service_pb2_grpc.ModelServiceAsyncStub:
        return model_service_pb2_grpc.ModelServiceStub(self.admin.channel)

    @property
    def offerings(self) -> offering_service_pb2_grpc.OfferingServiceAsyncStub:
        return offering_service_pb2_grpc.OfferingServiceStub(self.admin.channel)

    @property
    def watches(self) -> offering_service_pb2_grpc.OfferingServiceAsyncStub:
        return offering_service_pb2_grpc.OfferingServiceStub(self.gateway.channel)

    @property
    def adapters(self) -> adapter_service_pb2_grpc.AdapterServiceAsyncStub:
        return adapter_service_pb2_grpc.AdapterServiceStub(self.admin.channel)

    async def create_model(self, model_id: str, **fields: str) -> model_pb2.Model:
        request = model_service_pb2.CreateModelRequest(model_id=model_id, **fields)
        return (await self.admin.call(self.models.CreateModel, request)).model

    async def create_version(
        self, model_id: str, version_id: str, version: model_pb2.ModelVersion | None = None
    ) -> model_pb2.ModelVersion:
        request = model_service_pb2.CreateModelVersionRequest(
            parent=f"models/{model_id}",
            model_version_id=version_id,
            model_version=version or model_pb2.ModelVersion(context_length=1024),
        )
        return (await self.admin.call(self.models.CreateModelVersion, request)).model_version

    async def create_offering(
        self, offering_id: str, offering: model_pb2.Offering | None = None
    ) -> model_pb2.Offering:
        request = offering_service_pb2.CreateOfferingRequest(
            offering_id=offering_id,
            offering=offering or model_pb2.Offering(model_version="models/tiny/versions/1"),
        )
        return (await self.admin.call(self.offerings.CreateOffering, request)).offering

    async def create_adapter(
        self, adapter_id: str, adapter: model_pb2.Adapter | None = None
    ) -> model_pb2.Adapter:
        request = adapter_service_pb2.CreateAdapterRequest(
            adapter_id=adapter_id, adapter=adapter or an_adapter()
        )
        return (await self.admin.call(self.adapters.CreateAdapter, request)).adapter

    async def delete_adapter(self, adapter_id: str) -> None:
        request = adapter_service_pb2.DeleteAdapterRequest(name=f"adapters/{adapter_id}")
        await self.admin.call(self.adapters.DeleteAdapter, request)

    @asynccontextmanager
    async def watching_adapters(self) -> AsyncIterator[AdapterWatcher]:
        """Opens a watch of adapters as the gateway does."""
        request = adapter_service_pb2.WatchAdaptersRequest()
        stub = adapter_service_pb2_grpc.AdapterServiceStub(self.gateway.channel)
        async with self.gateway.stream(stub.WatchAdapters, request) as stream:
            yield AdapterWatcher(stream)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[Watcher]:
        """Opens a watch as the gateway does."""
        request = offering_service_pb2.WatchOfferingsRequest()
        async with self.gateway.stream(self.watches.WatchOfferings, request) as stream:
            yield Watcher(stream)

    async def prepare_version(self) -> None:
        """Creates models/tiny/versions/1, which offerings of these tests are bound to."""
        await self.create_model("tiny")
        await self.create_version("tiny", "1")

    async def insert_offerings(self, count: int) -> None:
        """Adds offerings o-00001, ... at once, as if they had been created one by one."""
        async with self.database.transaction() as connection:
            await connection.execute(
                """
                WITH next AS (UPDATE revision SET value = value + $1 RETURNING value - $1 AS old)
                INSERT INTO offering (
                    offering_id, display_name, model_id, version_id, default_max_output_tokens,
                    create_time, revision
                )
                SELECT 'o-' || to_char(n, 'FM00000'), '', 'tiny', '1', 512, '2026-01-01', old + n
                  FROM next, generate_series(1, $1) AS n
                """,
                count,
            )


class Watcher:
    """Reads a watch."""

    def __init__(self, stream: WatchCall) -> None:
        self._stream = stream

    async def read(self) -> offering_service_pb2.WatchOfferingsResponse:
        async with asyncio.timeout(PATIENCE_S):
            response = await self._stream.read()
        assert isinstance(response, offering_service_pb2.WatchOfferingsResponse)
        return response

    async def snapshot(self) -> list[str]:
        """Names of the first listing."""
        names: list[str] = []
        while True:
            response = await self.read()
            names += [item.name for item in response.offerings]
            if response.snapshot_complete:
                return names

    async def change(self) -> list[model_pb2.Offering]:
        """The next response that has any."""
        while True:
            response = await self.read()
            assert not response.snapshot_complete
            if response.offerings:
                return list(response.offerings)


class AdapterWatcher:
    """Reads a watch of adapters."""

    def __init__(self, stream: AdapterWatchCall) -> None:
        self._stream = stream

    async def read(self) -> adapter_service_pb2.WatchAdaptersResponse:
        async with asyncio.timeout(PATIENCE_S):
            response = await self._stream.read()
        assert isinstance(response, adapter_service_pb2.WatchAdaptersResponse)
        return response

    async def change(self) -> adapter_service_pb2.WatchAdaptersResponse:
        """The next response that says anything."""
        while True:
            response = await self.read()
            if response.ByteSize():
                return response


def an_adapter(
    *,
    model_version: str = "models/tiny/versions/1",
    path: str = "fox.gguf",
    digest: str = f"sha256:{'a' * 64}",
    project: str = "",
    name: str = "",
) -> model_pb2.Adapter:
    """An adapter that is fine, but for what the test changes."""
    return model_pb2.Adapter(
        model_version=model_version, path=path, digest=digest, project=project, name=name
    )


@asynccontextmanager
async def running_catalog(dsn: str) -> AsyncIterator[Catalog]:
    """Runs one process's worth of catalog on a migrated database."""
    callers = Callers()
    clock = FakeClock()
    hub = Hub()
    config = PostgresSection(dsn=dsn, connections_max=4)
    async with await postgres.connect(config, schema="catalog") as database:
        store = CatalogStore(database)
        server = Server(
            ANY_PORT,
            callers.identity(
                {WATCH: ["gateway"], WATCH_ADAPTERS: ["gateway"], LOOK_UP: ["gateway"]}
            ),
        )
        server.add(ModelService(store, clock), MODELS)
        server.add(OfferingService(store, hub, clock, bookmark_s=BOOKMARK_S), OFFERINGS)
        adapters = AdapterStore(database)
        server.add(AdapterService(adapters, hub, clock, bookmark_s=BOOKMARK_S), ADAPTERS)
        poll = poll_revision(hub, store.get_revision, SystemClock(), interval_s=POLL_S)
        services = [MODELS, OFFERINGS, ADAPTERS]
        async with Background() as background, serving(server) as endpoint:
            background.start(poll, name="poll revision")
            async with (
                Peer(endpoint, callers.admin, services) as admin,
                Peer(endpoint, callers.tenant, services) as tenant,
                Peer(endpoint, callers.tokens["gateway"], services) as gateway,
            ):
                yield Catalog(
                    endpoint=endpoint,
                    database=database,
                    server=server,
                    clock=clock,
                    callers=callers,
                    admin=admin,
                    tenant=tenant,
                    gateway=gateway,
                )
