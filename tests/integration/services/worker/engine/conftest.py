"""Every engine, started, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.integration.services.worker.engine.contract import ENGINES, PATIENCE_S, Harness


@pytest.fixture(params=list(ENGINES))
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    row = ENGINES[request.param]
    engine = row.make()
    info = await engine.start()
    try:
        yield Harness(engine, info, row)
    finally:
        async with asyncio.timeout(PATIENCE_S):
            await engine.stop()
