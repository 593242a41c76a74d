"""The catalog's methods: parse, one call of the store, build."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from maas.catalog.v1 import adapter_service_pb2 as adapter_pb
from maas.catalog.v1 import (
    adapter_service_pb2_grpc,
    model_service_pb2_grpc,
    offering_service_pb2_grpc,
)
from maas.catalog.v1 import model_service_pb2 as model_pb
from maas.catalog.v1 import offering_service_pb2 as offering_pb
from typing_extensions import override

from libs import ids, paging
from libs.auth import Role
from libs.clock import Clock
from libs.limits import WATCH_BOOKMARK_S
from libs.rpc import Hub, current_call
from libs.rpc.feed import changes
from services.catalog import convert
from services.catalog.store import AdapterStore, CatalogStore

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """Models and their versions: maas.catalog.v1.ModelService."""

    def __init__(self, store: CatalogStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    @override
    async def CreateModel(
        self, request: model_pb.CreateModelRequest, _: Context
    ) -> model_pb.CreateModelResponse:
        """Creates a model."""
        model = await self._store.create_model(convert.model_from_pb(request, self._clock.now()))
        return model_pb.CreateModelResponse(model=convert.model_to_pb(model))

    @override
    async def GetModel(
        self, request: model_pb.GetModelRequest, _: Context
    ) -> model_pb.GetModelResponse:
        """Reads a model."""
        (model_id,) = ids.parse_name(request.name, convert.MODEL_NAME, field="name")
        model = await self._store.get_model(model_id)
        return model_pb.GetModelResponse(model=convert.model_to_pb(model))

    @override
    async def ListModels(
        self, request: model_pb.ListModelsRequest, _: Context
    ) -> model_pb.ListModelsResponse:
        """Lists models by name."""
        page = paging.page_of(request.page_size, request.page_token)
        models = await self._store.list_models(page)
        items, token = paging.cut_named([convert.model_to_pb(item) for item in models], page)
        return model_pb.ListModelsResponse(models=items, next_page_token=token)

    @override
    async def CreateModelVersion(
        self, request: model_pb.CreateModelVersionRequest, _: Context
    ) -> model_pb.CreateModelVersionResponse:
        """Creates a version, which never changes afterwards."""
        wanted = convert.version_from_pb(request, self._clock.now())
        version = await self._store.create_version(wanted)
        return model_pb.CreateModelVersionResponse(model_version=convert.version_to_pb(version))

    @override
    async def GetModelVersion(
        self, request: model_pb.GetModelVersionRequest, _: Context
    ) -> model_pb.GetModelVersionResponse:
        """Reads a version."""
        model_id, version_id = ids.parse_name(request.name, convert.VERSION_NAME, field="name")
        version = await self._store.get_version(model_id, version_id)
        return model_pb.GetModelVersionResponse(model_version=convert.version_to_pb(version))

    @override
    async def LookUpModelVersion(
        self, request: model_pb.LookUpModelVersionRequest, _: Context
    ) -> model_pb.LookUpModelVersionResponse:
        """Reads a version, for services."""
        model_id, version_id = ids.parse_name(request.name, convert.VERSION_NAME, field="name")
        version = await self._store.get_version(model_id, version_id)
        return model_pb.LookUpModelVersionResponse(model_version=convert.version_to_pb(version))

    @override
    async def ListModelVersions(
        self, request: model_pb.ListModelVersionsRequest, _: Context
    ) -> model_pb.ListModelVersionsResponse:
        """Lists the versions of a model by name."""
        (model_id,) = ids.parse_name(request.parent, convert.MODEL_NAME, field="parent")
        page = paging.page_of(request.page_size, request.page_token)
        versions = await self._store.list_versions(model_id, page)
        items, token = paging.cut_named([convert.version_to_pb(item) for item in versions], page)
        return model_pb.ListModelVersionsResponse(model_versions=items, next_page_token=token)


class OfferingService(offering_service_pb2_grpc.OfferingServiceServicer):
    """What tenants may call: maas.catalog.v1.OfferingService.

    Args:
        store: where offerings are kept.
        hub: wakes watchers when an offering has changed.
        clock: time of records.
        bookmark_s: longest time between two responses of a watch.
    """

    def __init__(
        self,
        store: CatalogStore,
        hub: Hub,
        clock: Clock,
        *,
        bookmark_s: float = WATCH_BOOKMARK_S,
    ) -> None:
        self._store = store
        self._hub = hub
        self._clock = clock
        self._bookmark_s = bookmark_s

    @override
    async def CreateOffering(
        self, request: offering_pb.CreateOfferingRequest, _: Context
    ) -> offering_pb.CreateOfferingResponse:
        """Creates an offering."""
        wanted = convert.offering_from_pb(request, self._clock.now())
        offering = await self._store.create_offering(wanted)
        self._hub.poke()
        return offering_pb.CreateOfferingResponse(offering=convert.offering_to_pb(offering))

    @override
    async def GetOffering(
        self, request: offering_pb.GetOfferingRequest, _: Context
    ) -> offering_pb.GetOfferingResponse:
        """Reads an offering."""
        (offering_id,) = ids.parse_name(request.name, convert.OFFERING_NAME, field="name")
        offering = await self._store.get_offering(offering_id)
        return offering_pb.GetOfferingResponse(offering=convert.offering_to_pb(offering))

    @override
    async def ListOfferings(
        self, request: offering_pb.ListOfferingsRequest, _: Context
    ) -> offering_pb.ListOfferingsResponse:
        """Lists offerings by name."""
        page = paging.page_of(request.page_size, request.page_token)
        offerings = await self._store.list_offerings(page)
        items, token = paging.cut_named([convert.offering_to_pb(item) for item in offerings], page)
        return offering_pb.ListOfferingsResponse(offerings=items, next_page_token=token)

    @override
    async def WatchOfferings(
        self, _request: offering_pb.WatchOfferingsRequest, _: Context
    ) -> AsyncGenerator[offering_pb.WatchOfferingsResponse, None]:
        """Streams every offering, then each change, then signs of life."""
        read_after = self._store.list_offerings_after
        async with aclosing(changes(self._hub, read_after, bookmark_s=self._bookmark_s)) as feed:
            async for item in feed:
                yield convert.changes_to_pb(item.items, completes_snapshot=item.completes_snapshot)


class AdapterService(adapter_service_pb2_grpc.AdapterServiceServicer):
    """LoRA adapters: maas.catalog.v1.AdapterService.

    Args:
        store: where adapters are kept.
        hub: wakes watchers when an adapter has come or gone.
        clock: time of records.
        bookmark_s: longest time between two responses of a watch.
    """

    def __init__(
        self,
        store: AdapterStore,
        hub: Hub,
        clock: Clock,
        *,
        bookmark_s: float = WATCH_BOOKMARK_S,
    ) -> None:
        self._store = store
        self._hub = hub
        self._clock = clock
        self._bookmark_s = bookmark_s

    @override
    async def CreateAdapter(
        self, request: adapter_pb.CreateAdapterRequest, _: Context
    ) -> adapter_pb.CreateAdapterResponse:
        """Creates an adapter."""
        wanted = convert.adapter_from_pb(request, self._clock.now())
        adapter = await self._store.create_adapter(wanted)
        self._hub.poke()
        return adapter_pb.CreateAdapterResponse(adapter=convert.adapter_to_pb(adapter))

    @override
    async def GetAdapter(
        self, request: adapter_pb.GetAdapterRequest, _: Context
    ) -> adapter_pb.GetAdapterResponse:
        """Reads an adapter that the caller may use."""
        (adapter_id,) = ids.parse_name(request.name, convert.ADAPTER_NAME, field="name")
        adapter = await self._store.get_adapter(adapter_id, _project_of_caller())
        return adapter_pb.GetAdapterResponse(adapter=convert.adapter_to_pb(adapter))

    @override
    async def ListAdapters(
        self, request: adapter_pb.ListAdaptersRequest, _: Context
    ) -> adapter_pb.ListAdaptersResponse:
        """Lists the adapters that the caller may use, by name."""
        page = paging.page_of(request.page_size, request.page_token)
        adapters = await self._store.list_adapters(_project_of_caller(), page)
        items, token = paging.cut_named([convert.adapter_to_pb(item) for item in adapters], page)
        return adapter_pb.ListAdaptersResponse(adapters=items, next_page_token=token)

    @override
    async def DeleteAdapter(
        self, request: adapter_pb.DeleteAdapterRequest, _: Context
    ) -> adapter_pb.DeleteAdapterResponse:
        """Deletes an adapter; deleting it again changes nothing."""
        (adapter_id,) = ids.parse_name(request.name, convert.ADAPTER_NAME, field="name")
        await self._store.delete_adapter(adapter_id, self._clock.now())
        self._hub.poke()
        return adapter_pb.DeleteAdapterResponse()

    @override
    async def WatchAdapters(
        self, _request: adapter_pb.WatchAdaptersRequest, _: Context
    ) -> AsyncGenerator[adapter_pb.WatchAdaptersResponse, None]:
        """Streams every adapter, then each change, then signs of life."""
        read_after = self._store.list_adapters_after
        async with aclosing(changes(self._hub, read_after, bookmark_s=self._bookmark_s)) as feed:
            async for item in feed:
                yield convert.adapter_changes_to_pb(
                    item.items, completes_snapshot=item.completes_snapshot
                )


def _project_of_caller() -> str | None:
    """Id of the tenant's project; None for an administrator, who sees all."""
    caller = current_call().require_principal()
    return None if caller.role is Role.ADMINISTRATOR else caller.project
