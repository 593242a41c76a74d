"""A scheduler for each test."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.conftest import DatabaseFactory
from tests.integration.services.scheduler.harness import Running, running_scheduler


@pytest.fixture
async def suite(database: DatabaseFactory) -> AsyncIterator[Running]:
    """A running scheduler without any workers."""
    async with running_scheduler(await database("scheduler")) as running:
        yield running


@pytest.fixture
def tmp_path_short() -> Iterator[Path]:
    """A folder whose path leaves room for a Unix socket's name."""
    with tempfile.TemporaryDirectory(prefix="maas-relay-") as folder:
        yield Path(folder)
