"""A catalog for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.conftest import DatabaseFactory
from tests.integration.services.catalog.harness import Catalog, running_catalog


@pytest.fixture
async def catalog(database: DatabaseFactory) -> AsyncIterator[Catalog]:
    """A running catalog without any models."""
    async with running_catalog(await database("catalog")) as running:
        yield running
