"""Messages to domain values and back. Pure; limits of single fields are checked before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from maas.catalog.v1 import (
    adapter_service_pb2,
    model_pb2,
    model_service_pb2,
    offering_service_pb2,
)

from libs import ids
from services.catalog.domain import (
    OUTPUT_TOKENS_DEFAULT,
    Adapter,
    BoundOffering,
    Model,
    ModelVersion,
    Offering,
    StoredAdapter,
)

MODEL_NAME = "models/*"
VERSION_NAME = "models/*/versions/*"
OFFERING_NAME = "offerings/*"
ADAPTER_NAME = "adapters/*"
PROJECT_NAME = "projects/*"


def model_from_pb(request: model_service_pb2.CreateModelRequest, now: datetime) -> Model:
    """Reads the model that is to be created."""
    return Model(
        model_id=request.model_id,
        display_name=request.display_name,
        license=request.license,
        description=request.description,
        create_time=now,
    )


def model_to_pb(model: Model) -> model_pb2.Model:
    """Writes a model."""
    message = model_pb2.Model(
        name=f"models/{model.model_id}",
        display_name=model.display_name,
        license=model.license,
        description=model.description,
    )
    message.create_time.FromDatetime(model.create_time)
    return message


def version_from_pb(
    request: model_service_pb2.CreateModelVersionRequest, now: datetime
) -> ModelVersion:
    """Reads the version that is to be created.

    Raises:
        InvalidArgument: `parent` is no name of a model.
    """
    (model_id,) = ids.parse_name(request.parent, MODEL_NAME, field="parent")
    message = request.model_version
    return ModelVersion(
        model_id=model_id,
        version_id=request.model_version_id,
        digest=message.digest,
        context_length=message.context_length,
        prompt_overhead_tokens=message.prompt_overhead_tokens,
        message_overhead_tokens=message.message_overhead_tokens,
        create_time=now,
    )


def version_to_pb(version: ModelVersion) -> model_pb2.ModelVersion:
    """Writes a version."""
    message = model_pb2.ModelVersion(
        name=version.name,
        digest=version.digest,
        context_length=version.context_length,
        prompt_overhead_tokens=version.prompt_overhead_tokens,
        message_overhead_tokens=version.message_overhead_tokens,
    )
    message.create_time.FromDatetime(version.create_time)
    return message


def offering_from_pb(
    request: offering_service_pb2.CreateOfferingRequest, now: datetime
) -> Offering:
    """Reads the offering that is to be created; 512 output tokens where it says none.

    Raises:
        InvalidArgument: `model_version` is no name of a version, or the display name is too long.
    """
    message = request.offering
    model_id, version_id = ids.parse_name(
        message.model_version, VERSION_NAME, field="offering.model_version"
    )
    return Offering(
        offering_id=request.offering_id,
        display_name=message.display_name,
        model_id=model_id,
        version_id=version_id,
        default_max_output_tokens=message.default_max_output_tokens or OUTPUT_TOKENS_DEFAULT,
        default_temperature=(
            message.default_temperature if message.HasField("default_temperature") else None
        ),
        default_top_p=message.default_top_p if message.HasField("default_top_p") else None,
        default_top_k=message.default_top_k if message.HasField("default_top_k") else None,
        create_time=now,
    )


def offering_to_pb(bound: BoundOffering) -> model_pb2.Offering:
    """Writes an offering, with what its version says."""
    offering = bound.offering
    message = model_pb2.Offering(
        name=f"offerings/{offering.offering_id}",
        display_name=offering.display_name,
        model_version=offering.version_name,
        default_max_output_tokens=offering.default_max_output_tokens,
        default_temperature=offering.default_temperature,
        default_top_p=offering.default_top_p,
        default_top_k=offering.default_top_k,
        context_length=bound.version.context_length,
        prompt_overhead_tokens=bound.version.prompt_overhead_tokens,
        message_overhead_tokens=bound.version.message_overhead_tokens,
    )
    message.create_time.FromDatetime(offering.create_time)
    return message


def changes_to_pb(
    offerings: Sequence[BoundOffering], *, completes_snapshot: bool
) -> offering_service_pb2.WatchOfferingsResponse:
    """Writes one response of a watch."""
    return offering_service_pb2.WatchOfferingsResponse(
        offerings=[offering_to_pb(item) for item in offerings],
        snapshot_complete=completes_snapshot,
    )


def adapter_from_pb(request: adapter_service_pb2.CreateAdapterRequest, now: datetime) -> Adapter:
    """Reads the adapter that is to be created.

    Raises:
        InvalidArgument: `model_version` is no name of a version, or `project` none of a project.
    """
    message = request.adapter
    model_id, version_id = ids.parse_name(
        message.model_version, VERSION_NAME, field="adapter.model_version"
    )
    project_id = ""
    if message.project:
        (project_id,) = ids.parse_name(message.project, PROJECT_NAME, field="adapter.project")
    return Adapter(
        adapter_id=request.adapter_id,
        model_id=model_id,
        version_id=version_id,
        path=message.path,
        digest=message.digest,
        project_id=project_id,
        create_time=now,
    )


def adapter_to_pb(adapter: Adapter) -> model_pb2.Adapter:
    """Writes an adapter."""
    message = model_pb2.Adapter(
        name=f"adapters/{adapter.adapter_id}",
        model_version=adapter.version_name,
        path=adapter.path,
        digest=adapter.digest,
        project=f"projects/{adapter.project_id}" if adapter.project_id else "",
    )
    message.create_time.FromDatetime(adapter.create_time)
    return message


def adapter_changes_to_pb(
    adapters: Sequence[StoredAdapter], *, completes_snapshot: bool
) -> adapter_service_pb2.WatchAdaptersResponse:
    """Writes one response of a watch."""
    return adapter_service_pb2.WatchAdaptersResponse(
        adapters=[adapter_to_pb(item.adapter) for item in adapters if not item.is_deleted],
        deleted_names=[
            f"adapters/{item.adapter.adapter_id}" for item in adapters if item.is_deleted
        ],
        snapshot_complete=completes_snapshot,
    )
