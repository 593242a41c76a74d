"""services/auth: every method against every kind of caller."""

from __future__ import annotations

import pytest

from libs.testing.rpc import Kind, expected_outcome, outcomes
from tests.integration.services.auth.harness import SERVICES, Auth


@pytest.mark.parametrize("kind", Kind)
async def test_only_the_right_callers_get_in(auth: Auth, kind: Kind) -> None:
    await auth.prepare_tenant()
    credential = auth.callers.credential(kind, right="gateway", wrong="worker")

    got = await outcomes(auth.endpoint, SERVICES, credential)

    methods = [method for service in SERVICES for method in service.methods]
    assert got == {method: expected_outcome(method, kind) for method in methods}
    assert len(got) == 12
