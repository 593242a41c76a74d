"""services/catalog: every method against every kind of caller."""

from __future__ import annotations

from libs.testing.rpc import Kind, expected_outcome, outcomes
from tests.integration.services.catalog.harness import ADAPTERS, MODELS, OFFERINGS, Catalog

SERVICES = [MODELS, OFFERINGS, ADAPTERS]


async def test_only_the_right_callers_get_in(catalog: Catalog) -> None:
    methods = [method for service in SERVICES for method in service.methods]

    for kind in Kind:
        credential = catalog.callers.credential(kind, right="gateway", wrong="billing")
        got = await outcomes(catalog.endpoint, SERVICES, credential)
        assert got == {method: expected_outcome(method, kind) for method in methods}, kind

    assert len(methods) == 16
