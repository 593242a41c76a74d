"""libs/auth/principal.py: what roles may do, against the contract."""

from __future__ import annotations

from libs.auth import Role, permits
from libs.auth.principal import _NOT_ADMINISTRATOR, _TENANT
from libs.rpc.policy import Audience
from tests.unit.libs.rpc.contract import policies


def test_tenants_may_do_what_is_public_and_nothing_else() -> None:
    for policy in policies():
        if policy.audience is Audience.INTERNAL:
            continue
        is_public = policy.audience is Audience.PUBLIC
        assert permits(Role.TENANT, policy.permission) is is_public, policy.method


def test_administrators_may_do_everything_but_generate_and_embed() -> None:
    for policy in policies():
        if policy.audience is Audience.INTERNAL:
            continue
        is_charged = policy.permission.startswith(("generations.", "embeddings."))
        assert permits(Role.ADMINISTRATOR, policy.permission) is not is_charged, policy.method


def test_roles_name_no_permission_that_the_contract_does_not_have() -> None:
    known = {policy.permission for policy in policies()}

    assert known >= _TENANT
    assert known >= _NOT_ADMINISTRATOR
