"""Organizations, projects and API keys. Pure: no gRPC, no SQL, no clock, no chance."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from datetime import datetime

from libs.auth import KeyRecord, NewKey, Role, key_id_of, sha256_of
from libs.errors import FieldRule, invalid_field


@dataclass(frozen=True, slots=True, kw_only=True)
class Organization:
    """A customer, who pays.

    Attributes:
        organization_id: last part of its name.
        display_name: name for people.
        create_time: when it was created.
    """

    organization_id: str
    display_name: str
    create_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A unit of work inside an organization.

    Attributes:
        project_id: last part of its name.
        organization_id: who pays.
        display_name: name for people.
        create_time: when it was created.
    """

    project_id: str
    organization_id: str
    display_name: str
    create_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A credential that is to be stored. Holds no secret.

    Attributes:
        key_id: public part.
        secret_sha256: of the whole key, 32 bytes.
        role: what it may do.
        project_id: its project; empty for an administrator's key.
        display_name: name for people.
        create_time: when it was created.
        revoke_time: when it was revoked; None while it is accepted.
    """

    key_id: str
    secret_sha256: bytes
    role: Role
    project_id: str
    display_name: str
    create_time: datetime
    revoke_time: datetime | None = None

    @property
    def prefix(self) -> str:
        """Start of the secret, to recognise a key by."""
        return f"mk_{self.key_id}_"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKey:
    """A key, with who pays for it.

    Attributes:
        api_key: the key.
        organization_id: who pays; empty for an administrator's key.
        revision: grows with every change of any key.
    """

    api_key: ApiKey
    organization_id: str
    revision: int

    @property
    def record(self) -> KeyRecord:
        """What a service needs to check a credential."""
        return KeyRecord(
            key_id=self.api_key.key_id,
            secret_sha256=self.api_key.secret_sha256,
            role=self.api_key.role,
            is_active=self.api_key.revoke_time is None,
            project=self.api_key.project_id,
            organization=self.organization_id,
            revision=self.revision,
        )


class FirstKey(enum.Enum):
    """What became of the administrator's key in the configuration at a start."""

    STORED = "stored"
    KNOWN = "known"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRequest:
    """What a new key shall be.

    Attributes:
        role: what it may do.
        project_id: its project; empty for an administrator's key.
        display_name: name for people.

    Raises:
        InvalidArgument: a tenant's key without a project, or an administrator's with one.
    """

    role: Role
    project_id: str
    display_name: str

    def __post_init__(self) -> None:
        if self.role is Role.TENANT and not self.project_id:
            raise invalid_field("project", FieldRule.REQUIRED, "is required for ROLE_TENANT")
        if self.role is Role.ADMINISTRATOR and self.project_id:
            raise invalid_field(
                "project", FieldRule.CONFLICTING, "must be empty for ROLE_ADMINISTRATOR"
            )


def key_from(request: KeyRequest, made: NewKey, now: datetime) -> ApiKey:
    """Makes what is stored of a new key."""
    return ApiKey(
        key_id=made.key_id,
        secret_sha256=sha256_of(made.secret),
        role=request.role,
        project_id=request.project_id,
        display_name=request.display_name,
        create_time=now,
    )


def first_key_from(secret: str, now: datetime) -> ApiKey:
    """Makes what is stored of the administrator's key in the configuration.

    Raises:
        ValueError: the text is no key.
    """
    made = NewKey(key_id_of(secret), secret)
    request = KeyRequest(role=Role.ADMINISTRATOR, project_id="", display_name="bootstrap")
    return key_from(request, made, now)


Created = Organization | Project
"""What Create calls make, and repeat without harm."""


def is_repeat(wanted: Created, stored: Created) -> bool:
    """Tells whether creating `wanted` again asks for what is stored, whenever that was made."""
    return dataclasses.replace(wanted, create_time=stored.create_time) == stored
