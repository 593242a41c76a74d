"""Messages to domain values and back. Pure; limits of single fields are checked before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from maas.auth.v1 import (
    api_key_service_pb2,
    key_table_service_pb2,
    tenancy_pb2,
    tenancy_service_pb2,
)

from libs import ids
from libs.auth import Role
from services.auth.domain import KeyRequest, Organization, Project, StoredKey

ORGANIZATION_NAME = "organizations/*"
PROJECT_NAME = "projects/*"
KEY_NAME = "apiKeys/*"

_ROLES_TO_PB = {
    Role.TENANT: tenancy_pb2.ROLE_TENANT,
    Role.ADMINISTRATOR: tenancy_pb2.ROLE_ADMINISTRATOR,
}
_ROLES_FROM_PB = {number: role for role, number in _ROLES_TO_PB.items()}


def optional_id(name: str, pattern: str, *, field: str) -> str:
    """Returns the id in a name that may be empty.

    Raises:
        InvalidArgument: the name is not empty and has another form.
    """
    return ids.parse_name(name, pattern, field=field)[0] if name else ""


def _optional_name(collection: str, resource_id: str) -> str:
    return f"{collection}/{resource_id}" if resource_id else ""


def organization_from_pb(
    request: tenancy_service_pb2.CreateOrganizationRequest, now: datetime
) -> Organization:
    """Reads the organization that is to be created."""
    return Organization(
        organization_id=request.organization_id,
        display_name=request.display_name,
        create_time=now,
    )


def organization_to_pb(organization: Organization) -> tenancy_pb2.Organization:
    """Writes an organization."""
    message = tenancy_pb2.Organization(
        name=f"organizations/{organization.organization_id}",
        display_name=organization.display_name,
    )
    message.create_time.FromDatetime(organization.create_time)
    return message


def project_from_pb(request: tenancy_service_pb2.CreateProjectRequest, now: datetime) -> Project:
    """Reads the project that is to be created.

    Raises:
        InvalidArgument: `organization` is no name of one.
    """
    (organization_id,) = ids.parse_name(
        request.organization, ORGANIZATION_NAME, field="organization"
    )
    return Project(
        project_id=request.project_id,
        organization_id=organization_id,
        display_name=request.display_name,
        create_time=now,
    )


def project_to_pb(project: Project) -> tenancy_pb2.Project:
    """Writes a project."""
    message = tenancy_pb2.Project(
        name=f"projects/{project.project_id}",
        organization=f"organizations/{project.organization_id}",
        display_name=project.display_name,
    )
    message.create_time.FromDatetime(project.create_time)
    return message


def key_request_from_pb(request: api_key_service_pb2.CreateApiKeyRequest) -> KeyRequest:
    """Reads what a new key shall be.

    Raises:
        InvalidArgument: `project` is no name of one, or does not go with the role.
    """
    return KeyRequest(
        role=_ROLES_FROM_PB[request.role],
        project_id=optional_id(request.project, PROJECT_NAME, field="project"),
        display_name=request.display_name,
    )


def key_to_pb(stored: StoredKey) -> tenancy_pb2.ApiKey:
    """Writes a key, without its secret and without its hash."""
    key = stored.api_key
    message = tenancy_pb2.ApiKey(
        name=f"apiKeys/{key.key_id}",
        project=_optional_name("projects", key.project_id),
        display_name=key.display_name,
        role=_ROLES_TO_PB[key.role],
        state=_state_to_pb(is_active=key.revoke_time is None),
        prefix=key.prefix,
    )
    message.create_time.FromDatetime(key.create_time)
    if key.revoke_time is not None:
        message.revoke_time.FromDatetime(key.revoke_time)
    return message


def caller_to_pb(stored: StoredKey) -> api_key_service_pb2.GetCallerInfoResponse:
    """Writes who a caller is."""
    return api_key_service_pb2.GetCallerInfoResponse(
        api_key=key_to_pb(stored),
        organization=_optional_name("organizations", stored.organization_id),
    )


def changes_to_pb(
    keys: Sequence[StoredKey], *, completes_snapshot: bool
) -> key_table_service_pb2.WatchKeysResponse:
    """Writes one response of a watch."""
    return key_table_service_pb2.WatchKeysResponse(
        keys=[_record_to_pb(item) for item in keys], snapshot_complete=completes_snapshot
    )


def _record_to_pb(stored: StoredKey) -> key_table_service_pb2.KeyRecord:
    record = stored.record
    return key_table_service_pb2.KeyRecord(
        key_id=record.key_id,
        secret_sha256=record.secret_sha256,
        role=_ROLES_TO_PB[record.role],
        state=_state_to_pb(is_active=record.is_active),
        project=_optional_name("projects", record.project),
        organization=_optional_name("organizations", record.organization),
        revision=record.revision,
    )


def _state_to_pb(*, is_active: bool) -> tenancy_pb2.ApiKeyState.ValueType:
    return tenancy_pb2.API_KEY_STATE_ACTIVE if is_active else tenancy_pb2.API_KEY_STATE_REVOKED
