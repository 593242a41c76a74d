"""Servers under test: callers of every kind, and a real listener on loopback.

callers = Callers()
server = Server(ANY_PORT, callers.identity(allow={method: ["gateway"]}))
server.add(...)
async with serving(server) as endpoint, Peer(endpoint, callers.admin, SERVICES) as peer: ...
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from libs.auth import KeyRecord, KeyTable, Role, key_id_of, new_key, sha256_of
from libs.clock import Clock, SystemClock
from libs.config import ServerSection
from libs.rpc import Server
from libs.rpc.identity import Identity
from libs.rpc.policy import Audience, policy_of
from libs.rpc.status import error_of

ANY_PORT = ServerSection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0")
SERVICE_NAMES = ("catalog", "auth", "billing", "scheduler", "gateway", "worker")
TENANT_PROJECT = "demo"
TENANT_ORGANIZATION = "acme"
ALLOWED = "allowed"


class Callers:
    """Credentials of every kind, the same in every test.

    Attributes:
        admin: an administrator's key.
        tenant: key of project "demo" of organization "acme".
        stranger: a well-formed key that no table knows.
        tokens: token of each service, by name.
    """

    def __init__(self) -> None:
        self.admin = new_key(1, 101).secret
        self.tenant = new_key(2, 102).secret
        self.stranger = new_key(3, 103).secret
        self.tokens = {name: f"ms_{name}" for name in SERVICE_NAMES}

    def credential(self, kind: Kind, *, right: str, wrong: str) -> str | None:
        """Returns what a caller of some kind shows; `right` and `wrong` are names of services."""
        return {
            Kind.NOBODY: None,
            Kind.MALFORMED: "mk_nonsense",
            Kind.STRANGER: self.stranger,
            Kind.TENANT: self.tenant,
            Kind.ADMINISTRATOR: self.admin,
            Kind.WRONG_SERVICE: self.tokens[wrong],
            Kind.RIGHT_SERVICE: self.tokens[right],
        }[kind]

    def table(self, clock: Clock | None = None) -> KeyTable:
        """Makes a fresh table that knows both keys."""
        table = KeyTable()
        table.apply(
            [
                _record(self.admin, Role.ADMINISTRATOR, "", ""),
                _record(self.tenant, Role.TENANT, TENANT_PROJECT, TENANT_ORGANIZATION),
            ]
        )
        table.touch((clock or SystemClock()).monotonic_s())
        return table

    def identity(
        self, allow: Mapping[str, Sequence[str]] | None = None, keys: KeyTable | None = None
    ) -> Identity:
        """Makes what a server checks callers with.

        Args:
            allow: for each internal method, the services that may call it.
            keys: table of keys; None takes `table()`.
        """
        return Identity(
            keys if keys is not None else self.table(),
            {sha256_of(token): name for name, token in self.tokens.items()},
            {method: frozenset(names) for method, names in (allow or {}).items()},
        )


def _record(secret: str, role: Role, project: str, organization: str) -> KeyRecord:
    return KeyRecord(
        key_id=key_id_of(secret),
        secret_sha256=sha256_of(secret),
        role=role,
        is_active=True,
        project=project,
        organization=organization,
        revision=1,
    )


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[str]:
    """Starts a server, gives its address, and stops it without grace."""
    port = await server.start()
    await server.set_serving(True)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


class Kind(enum.Enum):
    """Kinds of callers."""

    NOBODY = "without a credential"
    MALFORMED = "with a text that is no key"
    STRANGER = "with a well-formed key that nobody made"
    TENANT = "with a tenant's key"
    ADMINISTRATOR = "with an administrator's key"
    WRONG_SERVICE = "with the token of a service that is not on the list"
    RIGHT_SERVICE = "with the token of a service that is on the list"


_WELCOME = {
    Audience.PUBLIC: {Kind.TENANT, Kind.ADMINISTRATOR},
    Audience.ADMIN: {Kind.ADMINISTRATOR},
    Audience.INTERNAL: {Kind.RIGHT_SERVICE},
}
# Their credential is good, but not for this.
_KNOWN: dict[Audience, set[Kind]] = {
    Audience.PUBLIC: set(),
    Audience.ADMIN: {Kind.TENANT},
    Audience.INTERNAL: {Kind.WRONG_SERVICE},
}


def expected_outcome(method: MethodDescriptor, kind: Kind) -> str:
    """Says what has to happen at the door, from the audience alone; see `outcomes`.

    For services without generation methods: there an administrator may do whatever a tenant may.
    """
    audience = policy_of(method).audience
    if kind is Kind.NOBODY:
        return "CREDENTIALS_MISSING"
    if kind in _WELCOME[audience]:
        return ALLOWED
    return "PERMISSION_DENIED" if kind in _KNOWN[audience] else "CREDENTIALS_INVALID"


async def outcomes(
    endpoint: str, services: Sequence[ServiceDescriptor], credential: str | None
) -> dict[MethodDescriptor, str]:
    """Calls every method with an empty request, only to see who gets past the door.

    Returns:
        For each method "allowed", or the reason of the refusal, as "CREDENTIALS_MISSING".
    """
    async with grpc.aio.insecure_channel(endpoint) as channel:
        return {
            method: await _outcome(channel, method, credential)
            for service in services
            for method in service.methods
        }


async def _outcome(
    channel: grpc.aio.Channel, method: MethodDescriptor, credential: str | None
) -> str:
    path = f"/{method.containing_service.full_name}/{method.name}"
    metadata = () if credential is None else (("authorization", f"Bearer {credential}"),)
    try:
        await _first_answer(channel, path, method, metadata)
    except grpc.aio.AioRpcError as failure:
        error = error_of(failure)
        if failure.code() in {
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.PERMISSION_DENIED,
        }:
            return error.reason.value
    return ALLOWED


async def _first_answer(
    channel: grpc.aio.Channel,
    path: str,
    method: MethodDescriptor,
    metadata: tuple[tuple[str, str], ...],
) -> None:
    assert not method.client_streaming, "not needed so far"
    if not method.server_streaming:
        unary: Any = channel.unary_unary(path)
        await unary(b"", metadata=metadata, timeout=5)
        return
    streaming: Any = channel.unary_stream(path)
    call = streaming(b"", metadata=metadata, timeout=5)
    try:
        await call.read()
    finally:
        call.cancel()
