"""The methods of auth: parse, one call, build."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from maas.auth.v1 import api_key_service_pb2 as key_pb
from maas.auth.v1 import (
    api_key_service_pb2_grpc,
    key_table_service_pb2_grpc,
    tenancy_service_pb2_grpc,
)
from maas.auth.v1 import key_table_service_pb2 as table_pb
from maas.auth.v1 import tenancy_service_pb2 as tenancy_pb
from typing_extensions import override

from libs import ids, paging
from libs.clock import Clock
from libs.limits import WATCH_BOOKMARK_S
from libs.rpc import Hub, current_call
from libs.rpc.feed import changes
from services.auth import convert
from services.auth.operations import Actor, KeyOperations
from services.auth.store import AuthStore

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]


class TenancyService(tenancy_service_pb2_grpc.TenancyServiceServicer):
    """Customers and their projects: maas.auth.v1.TenancyService."""

    def __init__(self, store: AuthStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    @override
    async def CreateOrganization(
        self, request: tenancy_pb.CreateOrganizationRequest, _: Context
    ) -> tenancy_pb.CreateOrganizationResponse:
        """Creates an organization."""
        wanted = convert.organization_from_pb(request, self._clock.now())
        organization = convert.organization_to_pb(await self._store.create_organization(wanted))
        return tenancy_pb.CreateOrganizationResponse(organization=organization)

    @override
    async def GetOrganization(
        self, request: tenancy_pb.GetOrganizationRequest, _: Context
    ) -> tenancy_pb.GetOrganizationResponse:
        """Reads an organization."""
        (wanted,) = ids.parse_name(request.name, convert.ORGANIZATION_NAME, field="name")
        organization = convert.organization_to_pb(await self._store.get_organization(wanted))
        return tenancy_pb.GetOrganizationResponse(organization=organization)

    @override
    async def ListOrganizations(
        self, request: tenancy_pb.ListOrganizationsRequest, _: Context
    ) -> tenancy_pb.ListOrganizationsResponse:
        """Lists organizations by name."""
        page = paging.page_of(request.page_size, request.page_token)
        found = await self._store.list_organizations(page)
        items, token = paging.cut_named([convert.organization_to_pb(item) for item in found], page)
        return tenancy_pb.ListOrganizationsResponse(organizations=items, next_page_token=token)

    @override
    async def CreateProject(
        self, request: tenancy_pb.CreateProjectRequest, _: Context
    ) -> tenancy_pb.CreateProjectResponse:
        """Creates a project."""
        wanted = convert.project_from_pb(request, self._clock.now())
        project = convert.project_to_pb(await self._store.create_project(wanted))
        return tenancy_pb.CreateProjectResponse(project=project)

    @override
    async def GetProject(
        self, request: tenancy_pb.GetProjectRequest, _: Context
    ) -> tenancy_pb.GetProjectResponse:
        """Reads a project."""
        (wanted,) = ids.parse_name(request.name, convert.PROJECT_NAME, field="name")
        project = convert.project_to_pb(await self._store.get_project(wanted))
        return tenancy_pb.GetProjectResponse(project=project)

    @override
    async def ListProjects(
        self, request: tenancy_pb.ListProjectsRequest, _: Context
    ) -> tenancy_pb.ListProjectsResponse:
        """Lists projects by name, of one organization or of all."""
        page = paging.page_of(request.page_size, request.page_token)
        organization_id = convert.optional_id(
            request.organization, convert.ORGANIZATION_NAME, field="organization"
        )
        found = await self._store.list_projects(organization_id, page)
        items, token = paging.cut_named([convert.project_to_pb(item) for item in found], page)
        return tenancy_pb.ListProjectsResponse(projects=items, next_page_token=token)


class ApiKeyService(api_key_service_pb2_grpc.ApiKeyServiceServicer):
    """API keys: maas.auth.v1.ApiKeyService."""

    def __init__(self, store: AuthStore, operations: KeyOperations) -> None:
        self._store = store
        self._operations = operations

    @override
    async def CreateApiKey(
        self, request: key_pb.CreateApiKeyRequest, _: Context
    ) -> key_pb.CreateApiKeyResponse:
        """Creates a key and shows its secret, this once."""
        wanted = convert.key_request_from_pb(request)
        stored, secret = await self._operations.create(wanted, _actor())
        return key_pb.CreateApiKeyResponse(api_key=convert.key_to_pb(stored), secret=secret)

    @override
    async def GetApiKey(
        self, request: key_pb.GetApiKeyRequest, _: Context
    ) -> key_pb.GetApiKeyResponse:
        """Reads a key, without its secret."""
        (key_id,) = ids.parse_name(request.name, convert.KEY_NAME, field="name")
        stored = await self._store.get_key(key_id)
        return key_pb.GetApiKeyResponse(api_key=convert.key_to_pb(stored))

    @override
    async def ListApiKeys(
        self, request: key_pb.ListApiKeysRequest, _: Context
    ) -> key_pb.ListApiKeysResponse:
        """Lists keys by name, of one project or of all."""
        page = paging.page_of(request.page_size, request.page_token)
        project_id = convert.optional_id(request.project, convert.PROJECT_NAME, field="project")
        found = await self._store.list_keys(project_id, page)
        items, token = paging.cut_named([convert.key_to_pb(item) for item in found], page)
        return key_pb.ListApiKeysResponse(api_keys=items, next_page_token=token)

    @override
    async def RevokeApiKey(
        self, request: key_pb.RevokeApiKeyRequest, _: Context
    ) -> key_pb.RevokeApiKeyResponse:
        """Revokes a key for ever."""
        (key_id,) = ids.parse_name(request.name, convert.KEY_NAME, field="name")
        stored = await self._operations.revoke(key_id, _actor())
        return key_pb.RevokeApiKeyResponse(api_key=convert.key_to_pb(stored))

    @override
    async def GetCallerInfo(
        self, _request: key_pb.GetCallerInfoRequest, _: Context
    ) -> key_pb.GetCallerInfoResponse:
        """Tells who the caller is."""
        stored = await self._store.get_key(current_call().require_principal().key_id)
        return convert.caller_to_pb(stored)


class KeyTableService(key_table_service_pb2_grpc.KeyTableServiceServicer):
    """Feeds the key table of every service: maas.auth.v1.KeyTableService.

    Args:
        store: where keys are kept.
        hub: wakes watchers when a key has changed.
        bookmark_s: longest time between two responses of a watch.
    """

    def __init__(self, store: AuthStore, hub: Hub, *, bookmark_s: float = WATCH_BOOKMARK_S) -> None:
        self._store = store
        self._hub = hub
        self._bookmark_s = bookmark_s

    @override
    async def WatchKeys(
        self, _request: table_pb.WatchKeysRequest, _: Context
    ) -> AsyncGenerator[table_pb.WatchKeysResponse, None]:
        """Streams every key, then each change, then signs of life."""
        read_after = self._store.list_keys_after
        async with aclosing(changes(self._hub, read_after, bookmark_s=self._bookmark_s)) as feed:
            async for item in feed:
                yield convert.changes_to_pb(item.items, completes_snapshot=item.completes_snapshot)


def _actor() -> Actor:
    call = current_call()
    return Actor(key_id=call.require_principal().key_id, request_id=call.request_id)
