"""Keeps a service's table of API keys fresh from the auth service."""

from __future__ import annotations

from maas.auth.v1 import key_table_service_pb2, key_table_service_pb2_grpc, tenancy_pb2

from libs.auth import KeyRecord, KeyTable, Role
from libs.clock import Clock
from libs.ids import last_part
from libs.rpc.client import Peer
from libs.rpc.watch import follow

SERVICES = [key_table_service_pb2.DESCRIPTOR.services_by_name["KeyTableService"]]

_ROLES = {
    tenancy_pb2.ROLE_TENANT: Role.TENANT,
    tenancy_pb2.ROLE_ADMINISTRATOR: Role.ADMINISTRATOR,
}


def record_from_pb(message: key_table_service_pb2.KeyRecord) -> KeyRecord:
    """Reads a record of the key table."""
    return KeyRecord(
        key_id=message.key_id,
        secret_sha256=message.secret_sha256,
        role=_ROLES[message.role],
        is_active=message.state == tenancy_pb2.API_KEY_STATE_ACTIVE,
        project=last_part(message.project),
        organization=last_part(message.organization),
        revision=message.revision,
    )


async def follow_keys(peer: Peer, table: KeyTable, clock: Clock) -> None:
    """Feeds the table for ever. It counts as fresh once the first listing is complete."""
    is_complete = False

    def apply(response: key_table_service_pb2.WatchKeysResponse, is_snapshot: bool) -> None:  # noqa: FBT001 - signature of follow
        nonlocal is_complete
        # A role that this build does not know grants nothing: the key stays unknown.
        table.apply(record_from_pb(item) for item in response.keys if item.role in _ROLES)
        is_complete = response.snapshot_complete or not is_snapshot
        if is_complete:
            table.touch(clock.monotonic_s())

    stub = key_table_service_pb2_grpc.KeyTableServiceStub(peer.channel)
    await follow(peer, stub.WatchKeys, key_table_service_pb2.WatchKeysRequest(), apply)
