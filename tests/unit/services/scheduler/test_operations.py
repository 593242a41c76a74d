"""A registration waits for a database that is away, within bounds."""

from __future__ import annotations

import asyncio
from datetime import datetime

import pytest
from typing_extensions import override

from libs.errors import Unavailable, unavailable
from libs.testing import FakeClock
from services.scheduler import operations
from services.scheduler.core.messages import Registration
from services.scheduler.store import SchedulerStore
from tests.unit.services.scheduler.core.driver import registration


class Store(SchedulerStore):
    """Fails some times, then gives epoch 7."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    @override
    async def next_epoch(self, registration: Registration, now: datetime) -> int:
        del registration, now
        self.calls += 1
        if self.calls <= self.failures:
            raise unavailable("postgresql")
        return 7


async def _run(store: Store, *, within_s: float, advances: int) -> int:
    clock = FakeClock()
    call = operations.next_epoch(store, clock, registration(), within_s=within_s)
    task = asyncio.create_task(call)
    for _ in range(advances):
        await asyncio.sleep(0)
        clock.advance(1.0)
    return await task


async def test_a_database_that_is_there_is_asked_once() -> None:
    store = Store(0)

    assert await _run(store, within_s=10.0, advances=0) == 7
    assert store.calls == 1


async def test_a_database_that_comes_back_is_asked_again() -> None:
    store = Store(5)

    assert await _run(store, within_s=10.0, advances=6) == 7
    assert store.calls == 6


async def test_a_database_that_stays_away_is_given_up() -> None:
    store = Store(1000)

    with pytest.raises(Unavailable):
        await _run(store, within_s=3.0, advances=20)

    assert store.calls < 10
