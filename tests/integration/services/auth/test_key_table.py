"""services/auth: WatchKeys, from PostgreSQL to the tables of other services."""

from __future__ import annotations

from pathlib import Path

import pytest
from maas.auth.v1 import key_table_service_pb2 as pb
from maas.auth.v1 import tenancy_pb2

from libs.auth import KeyTable, key_id_of, sha256_of
from libs.clock import SystemClock
from libs.errors import MaasError, Reason, Unavailable
from libs.limits import KEY_TABLE_AGE_MAX_S
from libs.process import Background
from libs.rpc.key_watch import follow_keys
from libs.testing import eventually
from libs.testing.relay import Relay
from tests.conftest import DatabaseFactory
from tests.integration.services.auth.harness import Auth, running_auth

REVOKED_EVERYWHERE_S = 2.0


async def test_snapshot_holds_revoked_keys_too(auth: Auth) -> None:
    await auth.prepare_project()
    active = await auth.create_key()
    revoked = await auth.create_key()
    await auth.revoke_key(revoked.api_key.name)

    async with auth.watching() as watcher:
        records = await watcher.snapshot()

    admin, first, second = records
    assert admin.key_id == key_id_of(auth.callers.admin)
    assert first == pb.KeyRecord(
        key_id=key_id_of(active.secret),
        secret_sha256=sha256_of(active.secret),
        role=tenancy_pb2.ROLE_TENANT,
        state=tenancy_pb2.API_KEY_STATE_ACTIVE,
        project="projects/demo",
        organization="organizations/acme",
        revision=first.revision,
    )
    assert second.state == tenancy_pb2.API_KEY_STATE_REVOKED
    assert admin.revision < first.revision < second.revision


async def test_changes_arrive_with_growing_revisions(auth: Auth) -> None:
    await auth.prepare_project()
    async with auth.watching() as watcher:
        await watcher.snapshot()

        made = await auth.create_key()
        (created,) = await watcher.change()
        await auth.revoke_key(made.api_key.name)
        (revoked,) = await watcher.change()

    assert created.key_id == revoked.key_id == key_id_of(made.secret)
    assert created.revision < revoked.revision
    assert revoked.state == tenancy_pb2.API_KEY_STATE_REVOKED


async def test_signs_of_life_come_without_changes(auth: Auth) -> None:
    async with auth.watching() as watcher:
        await watcher.snapshot()

        assert [await watcher.read() for _ in range(2)] == [pb.WatchKeysResponse()] * 2


async def test_table_of_another_service_follows(auth: Auth) -> None:
    await auth.prepare_project()
    table = KeyTable()
    clock = SystemClock()
    async with Background() as background:
        background.start(follow_keys(auth.gateway, table, clock), name="follow keys")

        made = await auth.create_key()
        await eventually(lambda: reason_of_refusal(table, made.secret) is None)
        await auth.revoke_key(made.api_key.name)
        started_s = clock.monotonic_s()
        await eventually(
            lambda: reason_of_refusal(table, made.secret) is Reason.CREDENTIALS_REVOKED
        )

    assert clock.monotonic_s() - started_s < REVOKED_EVERYWHERE_S


def reason_of_refusal(table: KeyTable, secret: str) -> Reason | None:
    try:
        table.authenticate(secret, SystemClock().monotonic_s())
    except MaasError as error:
        return error.reason
    return None


async def test_replicas_hear_of_each_others_changes(database: DatabaseFactory) -> None:
    dsn = await database("auth")
    async with running_auth(dsn) as one, running_auth(dsn) as other:
        await one.prepare_project()
        made = await one.create_key()

        async def is_known() -> bool:
            return await other.refusal(made.secret) is None

        await eventually(is_known)
        async with other.watching() as watcher:
            await watcher.snapshot()

            await one.revoke_key(made.api_key.name)

            (change,) = await watcher.change()
            assert change.state == tenancy_pb2.API_KEY_STATE_REVOKED

        async def is_revoked() -> bool:
            refusal = await other.refusal(made.secret)
            return refusal is not None and refusal.reason is Reason.CREDENTIALS_REVOKED

        await eventually(is_revoked)


async def test_outage_of_the_database_ends_by_itself(
    database: DatabaseFactory, tmp_path: Path
) -> None:
    async with Relay(await database("auth"), tmp_path) as relay, running_auth(relay.dsn) as auth:
        await auth.prepare_project()
        await relay.take_away()
        # Keys are still checked, from the table; what needs the database says so.
        with pytest.raises(Unavailable) as caught:
            await auth.create_key()
        assert caught.value.metadata == {"dependency": "postgresql"}
        with pytest.raises(Unavailable):
            await watch_once(auth)

        await relay.bring_back()
        made = await auth.create_key()
        assert (await auth.caller_info(made.secret)).api_key == made.api_key
        async with auth.watching() as watcher:
            assert len(await watcher.snapshot()) == 2


async def test_server_that_cannot_look_for_too_long_refuses_everybody(
    database: DatabaseFactory, tmp_path: Path
) -> None:
    async with Relay(await database("auth"), tmp_path) as relay, running_auth(relay.dsn) as auth:
        await relay.take_away()
        auth.clock.advance(KEY_TABLE_AGE_MAX_S + 1)
        with pytest.raises(Unavailable) as caught:
            await auth.store.get_revision()
        assert caught.value.metadata == {"dependency": "postgresql"}
        refusal = await auth.refusal(auth.callers.admin)
        assert isinstance(refusal, Unavailable)
        assert refusal.metadata == {"dependency": "auth"}

        await relay.bring_back()
        await auth.prepare_tenant()
        assert await auth.refusal(auth.callers.admin) is None


async def watch_once(auth: Auth) -> None:
    async with auth.watching() as watcher:
        await watcher.read()
