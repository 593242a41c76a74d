"""services/auth: API keys, from the wire to PostgreSQL and to the server's own table."""

from __future__ import annotations

from typing import Any

import pytest
from maas.auth.v1 import api_key_service_pb2 as pb
from maas.auth.v1 import tenancy_pb2
from structlog.testing import capture_logs

from libs.auth import Role, key_id_of
from libs.errors import FieldRule, InvalidArgument, NotFound, Reason, Unauthenticated
from libs.testing.clock import START
from tests.conftest import DatabaseFactory
from tests.integration.services.auth.harness import Auth, running_auth

DEMO = "projects/demo"


async def get_key(auth: Auth, name: str) -> tenancy_pb2.ApiKey:
    request = pb.GetApiKeyRequest(name=name)
    return (await auth.admin.call(auth.api_keys.GetApiKey, request)).api_key


async def list_keys(auth: Auth, project: str = "", page_token: str = "") -> pb.ListApiKeysResponse:
    request = pb.ListApiKeysRequest(page_size=2, project=project, page_token=page_token)
    return await auth.admin.call(auth.api_keys.ListApiKeys, request)


async def test_created_key_is_read_back_without_its_secret(auth: Auth) -> None:
    await auth.prepare_project()

    made = await auth.create_key(display_name="Demo")

    key_id = key_id_of(made.secret)
    want = tenancy_pb2.ApiKey(
        name=f"apiKeys/{key_id}",
        project=DEMO,
        display_name="Demo",
        role=tenancy_pb2.ROLE_TENANT,
        state=tenancy_pb2.API_KEY_STATE_ACTIVE,
        prefix=f"mk_{key_id}_",
    )
    want.create_time.FromDatetime(START)
    assert made.api_key == want
    assert made.secret.startswith(want.prefix)
    assert await get_key(auth, want.name) == want


async def test_every_create_makes_another_key(auth: Auth) -> None:
    await auth.prepare_project()

    made = [await auth.create_key() for _ in range(3)]

    assert len({item.secret for item in made}) == 3


async def test_database_never_sees_a_secret(auth: Auth) -> None:
    await auth.prepare_project()

    made = await auth.create_key()

    rows = await auth.database.fetch("SELECT api_key::text AS row FROM api_key")
    secret = made.secret.rpartition("_")[2]
    assert rows
    assert not [row for row in rows if secret in row["row"] or secret.encode().hex() in row["row"]]


async def test_new_key_is_accepted_at_once(auth: Auth) -> None:
    await auth.prepare_project()

    made = await auth.create_key()

    got = await auth.caller_info(made.secret)
    assert got == pb.GetCallerInfoResponse(api_key=made.api_key, organization="organizations/acme")


async def test_administrator_has_no_organization(auth: Auth) -> None:
    got = await auth.caller_info(auth.callers.admin)

    assert got.api_key.role == tenancy_pb2.ROLE_ADMINISTRATOR
    assert (got.api_key.project, got.organization) == ("", "")


async def test_administrators_make_administrators(auth: Auth) -> None:
    made = await auth.create_key(project="", role=tenancy_pb2.ROLE_ADMINISTRATOR)

    assert (await auth.caller_info(made.secret)).api_key == made.api_key


async def test_role_and_project_have_to_match(auth: Auth) -> None:
    await auth.prepare_project()
    unknown: Any = 7
    wanted = [
        ("", tenancy_pb2.ROLE_TENANT, "project", FieldRule.REQUIRED),
        (DEMO, tenancy_pb2.ROLE_ADMINISTRATOR, "project", FieldRule.CONFLICTING),
        (DEMO, tenancy_pb2.ROLE_UNSPECIFIED, "role", FieldRule.REQUIRED),
        (DEMO, unknown, "role", FieldRule.UNKNOWN_ENUM),
        ("demo", tenancy_pb2.ROLE_TENANT, "project", FieldRule.BAD_FORMAT),
    ]
    for project, role, field, rule in wanted:
        with pytest.raises(InvalidArgument) as caught:
            await auth.create_key(project, role)
        assert [(item.field, item.rule) for item in caught.value.violations] == [(field, rule)]

    assert len((await list_keys(auth)).api_keys) == 1


async def test_key_of_an_unknown_project_is_refused(auth: Auth) -> None:
    with pytest.raises(NotFound) as caught:
        await auth.create_key("projects/none")

    assert caught.value.metadata == {"resource": "projects/none"}


async def test_keys_are_listed_of_one_project_or_of_all(auth: Auth) -> None:
    await auth.prepare_project()
    made = [(await auth.create_key()).api_key for _ in range(3)]
    in_order = sorted(made, key=lambda item: item.name)

    first = await list_keys(auth, DEMO)
    rest = await list_keys(auth, DEMO, first.next_page_token)
    assert [*first.api_keys, *rest.api_keys] == in_order
    assert rest.next_page_token == ""
    everything = await list_keys(auth, page_token=(await list_keys(auth)).next_page_token)
    assert len(everything.api_keys) == 2


async def test_revoked_key_is_refused_at_once(auth: Auth) -> None:
    await auth.prepare_project()
    made = await auth.create_key()
    auth.clock.advance(7)

    revoked = await auth.revoke_key(made.api_key.name)

    assert revoked.state == tenancy_pb2.API_KEY_STATE_REVOKED
    assert revoked.revoke_time.ToSeconds() - revoked.create_time.ToSeconds() == 7
    assert await get_key(auth, revoked.name) == revoked
    with pytest.raises(Unauthenticated) as caught:
        await auth.caller_info(made.secret)
    assert caught.value.reason is Reason.CREDENTIALS_REVOKED


async def test_revoking_twice_changes_nothing(auth: Auth) -> None:
    await auth.prepare_project()
    made = await auth.create_key()
    first = await auth.revoke_key(made.api_key.name)
    revision = await auth.store.get_revision()
    auth.clock.advance(7)

    assert await auth.revoke_key(made.api_key.name) == first
    assert await auth.store.get_revision() == revision


async def test_unknown_keys_are_not_found(auth: Auth) -> None:
    for call in (auth.revoke_key("apiKeys/none"), get_key(auth, "apiKeys/none")):
        with pytest.raises(NotFound) as caught:
            await call
        assert caught.value.metadata == {"resource": "apiKeys/none"}


async def test_each_change_of_a_key_is_audited_once(auth: Auth) -> None:
    await auth.prepare_project()

    with capture_logs() as logs:
        made = await auth.create_key(display_name="Demo")
        await auth.revoke_key(made.api_key.name)
        await auth.revoke_key(made.api_key.name)

    events = [event for event in logs if event["event"] == "audit"]
    assert [event["action"] for event in events] == ["apiKeys.create", "apiKeys.revoke"]
    for event in events:
        assert event["actor"] == key_id_of(auth.callers.admin)
        assert event["request_id"]
        assert {key: event[key] for key in ("key", "role", "project", "organization")} == {
            "key": key_id_of(made.secret),
            "role": Role.TENANT.value,
            "project": "demo",
            "organization": "acme",
        }


async def test_no_secret_is_ever_logged(auth: Auth) -> None:
    await auth.prepare_project()

    with capture_logs() as logs:
        made = await auth.create_key()
        await auth.caller_info(made.secret)
        await auth.revoke_key(made.api_key.name)
        with pytest.raises(Unauthenticated):
            await auth.caller_info(made.secret)
        with pytest.raises(Unauthenticated):
            await auth.caller_info(auth.callers.stranger)

    text = repr(logs)
    assert "apiKeys.revoke" in text
    for secret in (made.secret, auth.callers.admin, auth.callers.stranger):
        assert secret.rpartition("_")[2] not in text


async def test_restart_keeps_keys_and_revocations(database: DatabaseFactory) -> None:
    dsn = await database("auth")
    async with running_auth(dsn) as first:
        await first.prepare_project()
        kept = await first.create_key()
        gone = await first.create_key()
        await first.revoke_key(gone.api_key.name)

    async with running_auth(dsn) as second:
        assert (await second.caller_info(kept.secret)).api_key == kept.api_key
        with pytest.raises(Unauthenticated) as caught:
            await second.caller_info(gone.secret)
    assert caught.value.reason is Reason.CREDENTIALS_REVOKED
