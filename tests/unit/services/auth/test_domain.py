"""services/auth/domain.py: what keys are."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest

from libs.auth import KeyTable, Role, new_key, sha256_of
from libs.errors import FieldRule, InvalidArgument, Unauthenticated
from services.auth.domain import (
    KeyRequest,
    Organization,
    StoredKey,
    first_key_from,
    is_repeat,
    key_from,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MADE = new_key(7, 7)
TENANT = KeyRequest(role=Role.TENANT, project_id="demo", display_name="Demo")


@pytest.mark.parametrize(
    ("role", "project_id", "rule"),
    [
        (Role.TENANT, "", FieldRule.REQUIRED),
        (Role.ADMINISTRATOR, "demo", FieldRule.CONFLICTING),
    ],
)
def test_role_and_project_have_to_match(role: Role, project_id: str, rule: FieldRule) -> None:
    with pytest.raises(InvalidArgument) as caught:
        KeyRequest(role=role, project_id=project_id, display_name="")

    assert [(item.field, item.rule) for item in caught.value.violations] == [("project", rule)]


def test_stored_key_holds_a_hash_and_no_secret() -> None:
    key = key_from(TENANT, MADE, NOW)

    assert key.secret_sha256 == sha256_of(MADE.secret)
    assert key.prefix == f"mk_{MADE.key_id}_"
    assert MADE.secret not in repr(key)


def test_record_lets_the_key_in_until_it_is_revoked() -> None:
    key = key_from(TENANT, MADE, NOW)
    table = KeyTable()
    table.touch(0)
    table.apply([StoredKey(api_key=key, organization_id="acme", revision=1).record])
    assert table.authenticate(MADE.secret, 0).organization == "acme"

    revoked = dataclasses.replace(key, revoke_time=NOW)
    table.apply([StoredKey(api_key=revoked, organization_id="acme", revision=2).record])
    with pytest.raises(Unauthenticated):
        table.authenticate(MADE.secret, 0)


def test_first_key_is_an_administrators() -> None:
    key = first_key_from(MADE.secret, NOW)

    assert (key.key_id, key.role, key.project_id) == (MADE.key_id, Role.ADMINISTRATOR, "")
    assert key.secret_sha256 == sha256_of(MADE.secret)


def test_text_that_is_no_key_is_refused_without_being_shown() -> None:
    with pytest.raises(ValueError, match="not an API key") as caught:
        first_key_from(MADE.secret[:-1], NOW)

    assert MADE.secret[:-1] not in str(caught.value)


def test_same_content_at_another_time_is_a_repeat() -> None:
    made = Organization(organization_id="acme", display_name="Acme", create_time=NOW)

    assert is_repeat(dataclasses.replace(made, create_time=NOW + timedelta(days=1)), made)
    assert not is_repeat(dataclasses.replace(made, display_name="Other"), made)
