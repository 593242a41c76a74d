"""Billing on a fresh database; the ledger is audited after every test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.conftest import DatabaseFactory
from tests.integration.services.billing.audit import audit
from tests.integration.services.billing.world import Billing, running


@pytest.fixture
async def billing(database: DatabaseFactory) -> AsyncIterator[Billing]:
    """A billing service of its own for the test."""
    async with running(await database("billing")) as world:
        yield world
        await audit(world.connection)
