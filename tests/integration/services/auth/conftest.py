"""An auth service for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.conftest import DatabaseFactory
from tests.integration.services.auth.harness import Auth, running_auth


@pytest.fixture
async def auth(database: DatabaseFactory) -> AsyncIterator[Auth]:
    """A running auth service that knows one administrator's key and nothing else."""
    async with running_auth(await database("auth")) as running:
        yield running
