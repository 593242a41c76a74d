"""A scripted server for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.libs.rpc.scripted import Reached, reached


@pytest.fixture
async def scripted() -> AsyncIterator[Reached]:
    """A running server that does what the test says."""
    async with reached() as running:
        yield running
