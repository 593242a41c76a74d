"""An auth service in this process: real gRPC on loopback, real PostgreSQL."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
from maas.auth.v1 import (
    api_key_service_pb2,
    api_key_service_pb2_grpc,
    key_table_service_pb2,
    key_table_service_pb2_grpc,
    tenancy_pb2,
    tenancy_service_pb2,
    tenancy_service_pb2_grpc,
)

from libs import postgres
from libs.auth import KeyTable, NewKey, Role, key_id_of
from libs.clock import SystemClock
from libs.config import PostgresSection
from libs.errors import MaasError
from libs.limits import WATCH_POLL_S
from libs.postgres import Database
from libs.process import Background
from libs.rpc import Hub, Peer, Server
from libs.rpc.feed import poll_revision
from libs.rpc.status import error_of
from libs.testing import FakeClock
from libs.testing.rpc import (
    ANY_PORT,
    TENANT_ORGANIZATION,
    TENANT_PROJECT,
    Callers,
    serving,
)
from services.auth.domain import KeyRequest, Organization, Project, key_from
from services.auth.operations import KeyOperations
from services.auth.service import ApiKeyService, KeyTableService, TenancyService
from services.auth.store import AuthStore

if TYPE_CHECKING:
    from grpc.aio import UnaryStreamCall

    WatchCall = UnaryStreamCall[
        key_table_service_pb2.WatchKeysRequest, key_table_service_pb2.WatchKeysResponse
    ]

TENANCY = tenancy_service_pb2.DESCRIPTOR.services_by_name["TenancyService"]
API_KEYS = api_key_service_pb2.DESCRIPTOR.services_by_name["ApiKeyService"]
KEY_TABLE = key_table_service_pb2.DESCRIPTOR.services_by_name["KeyTableService"]
SERVICES = [TENANCY, API_KEYS, KEY_TABLE]
WATCH = "maas.auth.v1.KeyTableService/WatchKeys"
BOOKMARK_S = 0.05
POLL_S = 0.02
PATIENCE_S = 5.0


@dataclasses.dataclass(slots=True, kw_only=True)
class Auth:
    """A running auth service and its callers."""

    endpoint: str
    database: Database
    store: AuthStore
    clock: FakeClock
    callers: Callers
    operations: KeyOperations
    admin: Peer
    gateway: Peer

    @property
    def tenancy(self) -> tenancy_service_pb2_grpc.TenancyServiceAsyncStub:
        return tenancy_service_pb2_grpc.TenancyServiceStub(self.admin.channel)

    @property
    def api_keys(self) -> api_key_service_pb2_grpc.ApiKeyServiceAsyncStub:
        return api_key_service_pb2_grpc.ApiKeyServiceStub(self.admin.channel)

    @property
    def key_table(self) -> key_table_service_pb2_grpc.KeyTableServiceAsyncStub:
        return key_table_service_pb2_grpc.KeyTableServiceStub(self.gateway.channel)

    async def create_organization(
        self, organization_id: str, display_name: str = ""
    ) -> tenancy_pb2.Organization:
        request = tenancy_service_pb2.CreateOrganizationRequest(
            organization_id=organization_id, display_name=display_name
        )
        return (await self.admin.call(self.tenancy.CreateOrganization, request)).organization

    async def create_project(
        self, project_id: str, organization: str, display_name: str = ""
    ) -> tenancy_pb2.Project:
        request = tenancy_service_pb2.CreateProjectRequest(
            project_id=project_id, organization=organization, display_name=display_name
        )
        return (await self.admin.call(self.tenancy.CreateProject, request)).project

    async def create_key(
        self,
        project: str = f"projects/{TENANT_PROJECT}",
        role: tenancy_pb2.Role.ValueType = tenancy_pb2.ROLE_TENANT,
        display_name: str = "",
    ) -> api_key_service_pb2.CreateApiKeyResponse:
        request = api_key_service_pb2.CreateApiKeyRequest(
            project=project, role=role, display_name=display_name
        )
        return await self.admin.call(self.api_keys.CreateApiKey, request)

    async def revoke_key(self, name: str) -> tenancy_pb2.ApiKey:
        request = api_key_service_pb2.RevokeApiKeyRequest(name=name)
        return (await self.admin.call(self.api_keys.RevokeApiKey, request)).api_key

    async def caller_info(self, credential: str) -> api_key_service_pb2.GetCallerInfoResponse:
        async with Peer(self.endpoint, credential, SERVICES) as peer:
            stub = api_key_service_pb2_grpc.ApiKeyServiceStub(peer.channel)
            request = api_key_service_pb2.GetCallerInfoRequest()
            return await peer.call(stub.GetCallerInfo, request)

    async def refusal(self, credential: str) -> MaasError | None:
        """Why the server does not let this credential in, at the first attempt; None if it does."""
        async with grpc.aio.insecure_channel(self.endpoint) as channel:
            stub = api_key_service_pb2_grpc.ApiKeyServiceStub(channel)
            try:
                await stub.GetCallerInfo(
                    api_key_service_pb2.GetCallerInfoRequest(),
                    metadata=(("authorization", f"Bearer {credential}"),),
                )
            except grpc.aio.AioRpcError as failure:
                return error_of(failure)
        return None

    async def prepare_project(self) -> None:
        """Creates organization "acme" with project "demo"."""
        now = self.clock.now()
        await self.store.create_organization(
            Organization(organization_id=TENANT_ORGANIZATION, display_name="", create_time=now)
        )
        await self.store.create_project(
            Project(
                project_id=TENANT_PROJECT,
                organization_id=TENANT_ORGANIZATION,
                display_name="",
                create_time=now,
            )
        )

    async def prepare_tenant(self) -> None:
        """Stores the tenant's key of `callers`, and waits until the server knows it."""
        await self.prepare_project()
        secret = self.callers.tenant
        wanted = KeyRequest(role=Role.TENANT, project_id=TENANT_PROJECT, display_name="")
        made = NewKey(key_id_of(secret), secret)
        await self.store.create_key(key_from(wanted, made, self.clock.now()))
        while await self.refusal(secret) is not None:
            # A table that waits for its database sleeps on this clock.
            self.clock.advance(WATCH_POLL_S)
            await asyncio.sleep(0.005)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[Watcher]:
        """Opens a watch as the gateway does."""
        request = key_table_service_pb2.WatchKeysRequest()
        async with self.gateway.stream(self.key_table.WatchKeys, request) as stream:
            yield Watcher(stream)


class Watcher:
    """Reads a watch."""

    def __init__(self, stream: WatchCall) -> None:
        self._stream = stream

    async def read(self) -> key_table_service_pb2.WatchKeysResponse:
        async with asyncio.timeout(PATIENCE_S):
            response = await self._stream.read()
        assert isinstance(response, key_table_service_pb2.WatchKeysResponse)
        return response

    async def snapshot(self) -> list[key_table_service_pb2.KeyRecord]:
        """The first listing."""
        records: list[key_table_service_pb2.KeyRecord] = []
        while True:
            response = await self.read()
            records += response.keys
            if response.snapshot_complete:
                return records

    async def change(self) -> list[key_table_service_pb2.KeyRecord]:
        """The next response that has any."""
        while True:
            response = await self.read()
            assert not response.snapshot_complete
            if response.keys:
                return list(response.keys)


@asynccontextmanager
async def running_auth(dsn: str) -> AsyncIterator[Auth]:
    """Runs one process's worth of auth on a migrated database, with an administrator's key."""
    callers = Callers()
    clock = FakeClock()
    hub = Hub()
    keys = KeyTable()
    config = PostgresSection(dsn=dsn, connections_max=4)
    async with (
        await postgres.connect(config, schema="auth") as database,
        Background() as background,
    ):
        store = AuthStore(database)
        chance = random.Random(dsn).getrandbits  # noqa: S311 - the same keys in every run
        operations = KeyOperations(store, keys, hub, clock, random_bits=chance)
        await operations.put_first(callers.admin)
        await operations.fill_table()
        poll = poll_revision(hub, store.get_revision, SystemClock(), interval_s=POLL_S)
        background.start(poll, name="poll revision")
        background.start(operations.keep_table(), name="keep table")
        server = Server(ANY_PORT, callers.identity({WATCH: ["gateway"]}, keys), clock=clock)
        server.add(TenancyService(store, clock), TENANCY)
        server.add(ApiKeyService(store, operations), API_KEYS)
        server.add(KeyTableService(store, hub, bookmark_s=BOOKMARK_S), KEY_TABLE)
        async with (
            serving(server) as endpoint,
            Peer(endpoint, callers.admin, SERVICES) as admin,
            Peer(endpoint, callers.tokens["gateway"], SERVICES) as gateway,
        ):
            yield Auth(
                endpoint=endpoint,
                database=database,
                store=store,
                clock=clock,
                callers=callers,
                operations=operations,
                admin=admin,
                gateway=gateway,
            )
