"""services/auth: every method against every kind of caller."""

from __future__ import annotations

from libs.testing.rpc import Kind, expected_outcome, outcomes
from tests.integration.services.auth.harness import SERVICES, Auth


async def test_only_the_right_callers_get_in(auth: Auth) -> None:
    await auth.prepare_tenant()
    methods = [method for service in SERVICES for method in service.methods]

    for kind in Kind:
        credential = auth.callers.credential(kind, right="gateway", wrong="worker")
        got = await outcomes(auth.endpoint, SERVICES, credential)
        assert got == {method: expected_outcome(method, kind) for method in methods}, kind

    assert len(methods) == 12
