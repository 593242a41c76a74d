"""The pool of slots leased in advance, against a small scheduler that keeps the truth."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from libs.errors import unavailable
from libs.process import Background
from libs.testing import FakeClock, eventually
from services.gateway.spares import (
    CLOSE_WAIT_S,
    MARGIN_S,
    SPARES_MAX,
    SWEEP_S,
    Lease,
    Order,
    Spare,
    Spares,
)
from services.gateway.tables import Worker, Workers

VERSION = "models/m/versions/1"
OTHER = "models/m/versions/2"
START_WITHIN_S = 5.0


@dataclass
class Scheduler:
    """Gives spares on its workers in turn, as long as there is room.

    Attributes:
        room: spares that it still gives.
        asked: ids of each question for spares alone.
        open: slots given and not given back.
    """

    workers: list[str] = field(default_factory=lambda: ["workers/a"])
    room: int = 1000
    asked: list[list[str]] = field(default_factory=list)
    open: set[str] = field(default_factory=set)
    is_away: bool = False
    gate: asyncio.Event | None = None

    def give(self, ids: list[str]) -> Lease:
        given = ids[: self.room]
        self.room -= len(given)
        self.open.update(f"slot-{name}" for name in given)
        spares = tuple(
            Spare(
                slot_id=f"slot-{name}",
                execution_id=name,
                worker=self.workers[index % len(self.workers)],
                endpoint="host:1",
                epoch=1,
            )
            for index, name in enumerate(given)
        )
        return Lease(spares=spares, start_within_s=START_WITHIN_S)

    async def lease(self, model_version: str, ids: list[str]) -> Lease:
        assert model_version in {VERSION, OTHER}
        self.asked.append(ids)
        if self.gate is not None:
            await self.gate.wait()
        if self.is_away:
            raise unavailable("scheduler")
        return self.give(ids)

    async def release(self, slot_ids: list[str]) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.is_away:
            raise unavailable("scheduler")
        self.open.difference_update(slot_ids)


class Rig:
    """A pool, its scheduler and time that the test moves."""

    def __init__(self, scheduler: Scheduler, background: Background) -> None:
        self.clock = FakeClock()
        self.scheduler = scheduler
        self.workers = Workers()
        for name in ("workers/a", "workers/b"):
            self.know(name)
        self.spares = Spares(
            lease=scheduler.lease,
            release=scheduler.release,
            workers=self.workers,
            clock=self.clock,
            id_prefix="g1.x",
        )
        self.background = background

    def know(self, name: str, *, epoch: int = 1) -> None:
        versions = frozenset({VERSION, OTHER})
        self.workers.put(Worker(name=name, endpoint="host:1", epoch=epoch, model_versions=versions))

    async def start(self) -> None:
        """Runs the pool and waits until it sleeps."""
        self.background.start(self.spares.run(), name="spares")
        await eventually(lambda: len(self.clock._sleepers) == 1)

    def request(self, version: str = VERSION) -> Spare | None:
        """A request comes; without a spare it asks for a slot and for spares with it."""
        spare = self.spares.take(version)
        if spare is None:
            self.ask(version)
        return spare

    def ask(self, version: str = VERSION) -> Order:
        with self.spares.order(version) as order:
            if order.ids:
                order.lease = self.scheduler.give(order.ids)
        return order

    async def pass_time(self, seconds: float) -> None:
        """Moves time in sweeps, each of which runs to its end."""
        for _ in range(round(seconds / SWEEP_S)):
            self.clock.advance(SWEEP_S)
            await eventually(lambda: len(self.clock._sleepers) == 1)


async def _turn() -> None:
    """Lets every task that is ready run."""
    for _ in range(6):
        await asyncio.sleep(0)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Background() as background:
        yield Rig(Scheduler(), background)


async def test_a_lone_request_leases_nothing(rig: Rig) -> None:
    for _ in range(5):
        assert rig.request() is None
        rig.clock.advance(1.0)

    assert rig.scheduler.open == set()


async def test_as_many_spares_are_asked_for_as_requests_came_in_the_last_second(rig: Rig) -> None:
    for _ in range(10):
        rig.spares.take(VERSION)
        rig.clock.advance(0.125)

    assert len(rig.ask().ids) == 7


async def test_spares_are_bounded(rig: Rig) -> None:
    for _ in range(10 * SPARES_MAX):
        rig.spares.take(VERSION)

    assert len(rig.ask().ids) == SPARES_MAX
    assert rig.spares.count(VERSION) == SPARES_MAX
    assert rig.ask().ids == []


async def test_ids_are_never_used_twice(rig: Rig) -> None:
    rig.scheduler.room = 0
    seen: list[str] = []
    for version in (VERSION, OTHER):
        for _ in range(20):
            rig.spares.take(version)
            seen += rig.ask(version).ids

    assert len(seen) == len(set(seen)) > 20
    assert all(name.startswith("g1.x.") for name in seen)


async def test_the_oldest_spare_is_used_first_and_each_once(rig: Rig) -> None:
    for _ in range(4):
        rig.spares.take(VERSION)
    ids = rig.ask().ids

    got = [rig.spares.take(VERSION) for _ in range(5)]

    assert [None if spare is None else spare.execution_id for spare in got] == [*ids, None]


async def test_versions_have_pools_of_their_own(rig: Rig) -> None:
    for _ in range(3):
        rig.request(VERSION)

    assert rig.spares.count(VERSION) > 0
    assert rig.spares.take(OTHER) is None


async def test_a_steady_stream_never_waits_for_the_scheduler(rig: Rig) -> None:
    await rig.start()
    missed = []

    for number in range(500):
        if rig.request() is None:
            missed.append(number)
        rig.clock.advance(0.01)
        await _turn()

    assert missed == [0, 1]
    # Each question brings several, and asks for two or more.
    assert len(rig.scheduler.asked) < 100
    assert min(len(ids) for ids in rig.scheduler.asked) >= 2


async def test_one_refill_of_a_version_is_under_way_at_a_time(rig: Rig) -> None:
    await rig.start()
    for _ in range(10):
        rig.spares.take(VERSION)
    rig.ask()
    rig.scheduler.gate = asyncio.Event()

    for _ in range(9):
        rig.spares.take(VERSION)
        await _turn()
    assert len(rig.scheduler.asked) == 1
    # Nor does a request ask for spares meanwhile.
    assert rig.ask().ids == []

    rig.scheduler.gate.set()
    await eventually(lambda: rig.spares.count(VERSION) > 1)


async def test_a_scheduler_without_room_is_asked_for_less_and_less_and_then_more_again(
    rig: Rig,
) -> None:
    for _ in range(SPARES_MAX):
        rig.spares.take(VERSION)
    sizes = []
    for room in (16, 4, 0, 0, 1000, 1000):
        rig.scheduler.room = room
        sizes.append(len(rig.ask().ids))

    assert sizes == [64, 32, 8, 1, 1, SPARES_MAX - 21]


async def test_a_refused_refill_is_not_repeated_with_each_request(rig: Rig) -> None:
    await rig.start()
    for _ in range(32):
        rig.spares.take(VERSION)
    rig.ask()
    rig.scheduler.is_away = True

    for _ in range(32):
        assert rig.spares.take(VERSION) is not None
        await _turn()

    assert 1 < len(rig.scheduler.asked) <= 6


async def test_a_spare_whose_time_is_over_is_not_used(rig: Rig) -> None:
    for _ in range(4):
        rig.spares.take(VERSION)
    rig.ask()

    rig.clock.advance(START_WITHIN_S - MARGIN_S - 0.01)
    assert rig.spares.take(VERSION) is not None
    rig.clock.advance(0.01)
    assert rig.spares.take(VERSION) is None


async def test_time_counts_from_the_question(rig: Rig) -> None:
    for _ in range(4):
        rig.spares.take(VERSION)
    with rig.spares.order(VERSION) as order:
        rig.clock.advance(3.0)
        order.lease = rig.scheduler.give(order.ids)

    rig.clock.advance(1.0)

    assert rig.spares.take(VERSION) is None


async def test_spares_on_workers_that_are_gone_or_registered_anew_are_not_used(rig: Rig) -> None:
    rig.scheduler.workers = ["workers/a", "workers/b"]
    for _ in range(4):
        rig.spares.take(VERSION)
    rig.ask()
    rig.scheduler.room = 0
    rig.workers.drop("workers/a")

    found = rig.spares.take(VERSION)
    assert found is not None
    assert found.worker == "workers/b"
    rig.know("workers/b", epoch=2)
    assert rig.spares.take(VERSION) is None

    # What is of no use goes back.
    await rig.start()
    await rig.pass_time(SWEEP_S)
    assert rig.scheduler.open == {found.slot_id}


async def test_a_request_that_excludes_a_worker_leaves_its_spares_to_others(rig: Rig) -> None:
    rig.scheduler.workers = ["workers/a", "workers/b"]
    for _ in range(4):
        rig.spares.take(VERSION)
    ids = rig.ask().ids

    picked = rig.spares.take(VERSION, {"workers/a"})
    both = rig.spares.take(VERSION, {"workers/a", "workers/b"})
    rest = [rig.spares.take(VERSION) for _ in range(3)]

    assert picked is not None
    assert picked.worker == "workers/b"
    assert both is None
    assert [spare.execution_id for spare in rest if spare is not None] == [ids[0], ids[2], ids[3]]


async def test_what_is_not_used_in_time_is_given_back_before_it_runs_out(rig: Rig) -> None:
    await rig.start()
    for _ in range(4):
        rig.spares.take(VERSION)
    rig.ask()
    assert len(rig.scheduler.open) == 4

    await rig.pass_time(START_WITHIN_S - MARGIN_S - SWEEP_S)
    assert len(rig.scheduler.open) == 4
    await rig.pass_time(SWEEP_S)

    assert rig.scheduler.open == set()
    await rig.pass_time(SWEEP_S)
    assert rig.spares._pools == {}


async def test_everything_is_given_back_at_the_end(rig: Rig) -> None:
    async with Background() as background:
        rig.background = background
        await rig.start()
        for _ in range(4):
            rig.spares.take(VERSION)
        rig.ask()

    assert rig.scheduler.open == set()
    assert rig.spares.take(VERSION) is None
    assert rig.ask().ids == []


async def test_spares_that_come_after_the_end_go_back_too(rig: Rig) -> None:
    for _ in range(4):
        rig.spares.take(VERSION)
    with rig.spares.order(VERSION) as order:
        async with Background() as background:
            rig.background = background
            await rig.start()
        order.lease = rig.scheduler.give(order.ids)

    assert rig.spares.take(VERSION) is None
    assert set(rig.spares._returns) == rig.scheduler.open


async def test_a_scheduler_that_is_away_at_the_end_holds_up_nobody(rig: Rig) -> None:
    rig.scheduler.is_away = True
    async with Background() as background:
        rig.background = background
        await rig.start()
        for _ in range(4):
            rig.spares.take(VERSION)
        rig.ask()
    assert len(rig.scheduler.open) == 4


async def test_a_scheduler_that_hangs_at_the_end_is_left_in_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.spares.CLOSE_WAIT_S", CLOSE_WAIT_S / 100)
    async with Background() as background:
        rig.background = background
        await rig.start()
        for _ in range(4):
            rig.spares.take(VERSION)
        rig.ask()
        rig.scheduler.gate = asyncio.Event()

    assert len(rig.scheduler.open) == 4


async def test_an_order_that_fails_counts_as_no_spares(rig: Rig) -> None:
    for _ in range(40):
        rig.spares.take(VERSION)
    with pytest.raises(ValueError, match="refused"), rig.spares.order(VERSION):
        raise ValueError("refused")

    assert len(rig.ask().ids) == 1
