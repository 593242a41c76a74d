"""From an execution to a worker that accepts it: with a spare, without, and when either fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest
from maas.engine.v1 import engine_pb2

from libs.clock import SystemClock
from libs.errors import Code, Reason, ResourceExhausted, Unavailable, unavailable
from libs.process import Background
from services.gateway.links import LinkPool
from services.gateway.placement import Placed, Placer, Slot, Target, Wanted
from services.gateway.spares import Lease, Spare, Spares
from services.gateway.tables import Worker as KnownWorker
from services.gateway.tables import Workers, no_ready_worker
from tests.integration.services.gateway.harness import TOKEN, Worker, served

VERSION = "models/m/versions/1"


@dataclass
class Scheduler:
    """Names workers in the order of the test, and spares on the first of them.

    Attributes:
        targets: workers there are.
        asked: execution ids of requests for a slot.
        excluded: workers that each of them left out.
        wanted: what each of them wanted.
        released: slots given back.
    """

    targets: list[Target] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    excluded: list[list[str]] = field(default_factory=list)
    wanted: list[Wanted] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    is_away: bool = False

    async def acquire(self, wanted: Wanted, execution_id: str, exclude: list[str]) -> Slot:
        if self.is_away:
            raise unavailable("scheduler")
        self.asked.append(execution_id)
        self.excluded.append(list(exclude))
        self.wanted.append(wanted)
        targets = [target for target in self.targets if target.worker not in exclude]
        if not targets:
            raise no_ready_worker(wanted.model_version)
        spares = self.give(list(wanted.spare_ids))
        return Slot(
            slot_id=f"slot-{execution_id}", targets=targets, spares=spares, start_within_s=60.0
        )

    def give(self, ids: list[str]) -> tuple[Spare, ...]:
        first = self.targets[0]
        return tuple(
            Spare(
                slot_id=f"slot-{name}",
                execution_id=name,
                worker=first.worker,
                endpoint=first.endpoint,
                epoch=first.epoch,
            )
            for name in ids
        )

    async def lease(self, _: str, ids: list[str]) -> Lease:
        if self.is_away:
            raise unavailable("scheduler")
        return Lease(spares=self.give(ids), start_within_s=60.0)

    async def release_all(self, slot_ids: list[str]) -> None:
        self.released += slot_ids


class Rig:
    """A placer, two workers that the test drives, and a scheduler that knows both."""

    def __init__(self, links: LinkPool) -> None:
        self.scheduler = Scheduler()
        self.table = Workers()
        self.workers: dict[str, Worker] = {}
        self.spares = Spares(
            lease=self.scheduler.lease,
            release=self.scheduler.release_all,
            workers=self.table,
            clock=SystemClock(),
            id_prefix="g1",
        )
        self.placer = Placer(
            acquire=self.scheduler.acquire,
            release=self.scheduler.released.append,
            workers=self.table,
            links=links,
            spares=self.spares,
        )

    def know(self, name: str, endpoint: str, worker: Worker) -> None:
        self.workers[name] = worker
        self.scheduler.targets.append(Target(worker=name, endpoint=endpoint, epoch=7))
        self.table.put(
            KnownWorker(name=name, endpoint=endpoint, epoch=7, model_versions=frozenset({VERSION}))
        )

    def lease(self, count: int) -> list[str]:
        """Puts spares on the first worker into the pool; returns their execution ids."""
        pool = self.spares
        for _ in range(count):
            assert pool.take(VERSION) is None
        with pool.order(VERSION) as order:
            order.lease = Lease(spares=self.scheduler.give(order.ids), start_within_s=60.0)
        assert pool.count(VERSION) == count
        return order.ids

    def place(self, *, excluded: frozenset[str] = frozenset()) -> asyncio.Task[Placed]:
        wanted = Wanted(
            execution_id="gen_1",
            model_version=VERSION,
            project="projects/p",
            max_wait_s=5.0,
            excluded=excluded,
        )
        return asyncio.create_task(self.placer.place(wanted, _execution))


def _execution(execution_id: str, epoch: int) -> engine_pb2.Execution:
    return engine_pb2.Execution(
        execution_id=execution_id, epoch=epoch, model_version=VERSION, text="x"
    )


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        background = await stack.enter_async_context(Background())
        links = LinkPool(TOKEN, background)
        made = Rig(links)
        for name in ("workers/a", "workers/b"):
            worker = Worker()
            endpoint = await stack.enter_async_context(served(worker))
            made.know(name, endpoint, worker)
            await links.get(name, endpoint).ready(5)
        yield made


async def test_a_spare_is_used_without_asking_the_scheduler(rig: Rig) -> None:
    ids = rig.lease(2)
    worker = rig.workers["workers/a"]

    placing = rig.place()
    execution = await worker.next_start()
    worker.accept(execution.lane)
    placed = await placing

    assert (execution.execution_id, execution.epoch) == (ids[0], 7)
    assert placed.link.worker == "workers/a"
    assert rig.scheduler.asked == rig.scheduler.released == []


async def test_without_a_spare_the_scheduler_is_asked_for_some_along_with_the_slot(
    rig: Rig,
) -> None:
    worker = rig.workers["workers/a"]
    for _ in range(2):
        placing = rig.place()
        worker.accept((await worker.next_start()).lane)
        await placing

    assert [len(wanted.spare_ids) for wanted in rig.scheduler.wanted] == [0, 2]
    assert len(set(rig.scheduler.asked)) == 2
    assert rig.spares.count(VERSION) == 2

    placing = rig.place()
    execution = await worker.next_start()
    assert execution.execution_id == rig.scheduler.wanted[1].spare_ids[0]
    worker.accept(execution.lane)
    await placing


async def test_when_the_worker_of_a_spare_fails_the_scheduler_names_another(rig: Rig) -> None:
    ids = rig.lease(2)
    first, second = rig.workers["workers/a"], rig.workers["workers/b"]

    placing = rig.place()
    failed = await first.next_start()
    first.fail(failed.lane, Code.UNAVAILABLE.value, Reason.WORKER_DRAINING.value)
    execution = await second.next_start()
    second.accept(execution.lane)
    placed = await placing

    assert placed.link.worker == "workers/b"
    assert execution.execution_id not in ids
    assert rig.scheduler.excluded == [["workers/a"]]
    assert rig.scheduler.released == [f"slot-{ids[0]}"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [(Code.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL), (Code.FAILED_PRECONDITION, Reason.FENCED)],
)
async def test_a_worker_may_be_named_again_when_only_the_spare_was_stale(
    rig: Rig, code: Code, reason: Reason
) -> None:
    """The scheduler had taken the spare back, or has registered the worker anew since."""
    rig.lease(2)
    worker = rig.workers["workers/a"]

    placing = rig.place()
    worker.fail((await worker.next_start()).lane, code.value, reason.value)
    worker.accept((await worker.next_start()).lane)
    await placing

    assert rig.scheduler.excluded == [[]]


async def test_a_refusal_that_any_worker_would_give_ends_the_search_and_frees_the_spare(
    rig: Rig,
) -> None:
    ids = rig.lease(2)
    worker = rig.workers["workers/a"]

    placing = rig.place()
    failed = await worker.next_start()
    worker.fail(failed.lane, Code.INVALID_ARGUMENT.value, Reason.INVALID_FIELD.value)
    with pytest.raises(Exception, match=Reason.INVALID_FIELD.value):
        await placing

    assert rig.scheduler.asked == []
    assert rig.scheduler.released == [f"slot-{ids[0]}"]


async def test_a_request_that_is_cancelled_gives_its_spare_back(rig: Rig) -> None:
    ids = rig.lease(2)
    worker = rig.workers["workers/a"]

    placing = rig.place()
    execution = await worker.next_start()
    placing.cancel()

    assert await worker.next_abort() == execution.lane
    assert rig.scheduler.released == [f"slot-{ids[0]}"]


async def test_excluded_workers_are_left_out_from_the_first_round_on(rig: Rig) -> None:
    ids = rig.lease(2)
    worker = rig.workers["workers/b"]

    placing = rig.place(excluded=frozenset({"workers/a"}))
    execution = await worker.next_start()
    worker.accept(execution.lane)

    assert (await placing).link.worker == "workers/b"
    assert execution.execution_id not in ids
    assert rig.scheduler.excluded == [["workers/a"]]
    with pytest.raises(Unavailable) as caught:
        await rig.place(excluded=frozenset({"workers/a", "workers/b"}))
    assert caught.value.reason is Reason.NO_READY_WORKER


async def test_the_workers_own_refusal_is_told_when_no_other_is_left(rig: Rig) -> None:
    for name in ("workers/a", "workers/b"):
        rig.table.drop(name)
    rig.scheduler.targets = rig.scheduler.targets[:1]
    worker = rig.workers["workers/a"]

    placing = rig.place()
    failed = await worker.next_start()
    worker.fail(failed.lane, Code.RESOURCE_EXHAUSTED.value, Reason.QUEUE_FULL.value)
    with pytest.raises(ResourceExhausted):
        await placing


async def test_that_workers_registered_anew_is_nothing_their_callers_hear_of(rig: Rig) -> None:
    """Told to a client, FENCED would be a fault of its own that no repeat can mend."""
    placing = rig.place()
    for name in ("workers/a", "workers/b"):
        lane = (await rig.workers[name].next_start()).lane
        rig.workers[name].fail(lane, Code.FAILED_PRECONDITION.value, Reason.FENCED.value)

    with pytest.raises(Unavailable) as caught:
        await placing

    assert caught.value.reason is Reason.WORKER_LOST
    assert caught.value.retry_after_s


async def test_a_worker_that_has_gone_while_it_refused_is_not_connected_to_anew(rig: Rig) -> None:
    """Nobody would end such a link before another worker comes or goes."""
    links = rig.placer._links
    rig.scheduler.targets = rig.scheduler.targets[:1]
    worker = rig.workers["workers/a"]
    placing = rig.place()
    lane = (await worker.next_start()).lane

    links.retain(set())
    rig.scheduler.targets = []
    worker.fail(lane, Code.FAILED_PRECONDITION.value, Reason.FENCED.value)
    with pytest.raises((Unavailable, ResourceExhausted)):
        await placing

    assert links._links == {}


async def test_while_the_scheduler_is_away_spares_and_then_the_table_serve(rig: Rig) -> None:
    ids = rig.lease(2)
    rig.scheduler.is_away = True
    rig.table.drop("workers/b")
    worker = rig.workers["workers/a"]
    started: list[str] = []

    for _ in range(3):
        placing = rig.place()
        execution = await worker.next_start()
        started.append(execution.execution_id)
        worker.accept(execution.lane)
        await placing
        worker.end(execution.lane)

    assert started[:2] == ids
    assert started[2] not in ids


async def test_execution_ids_differ_however_often_a_generation_is_placed(rig: Rig) -> None:
    worker = rig.workers["workers/a"]
    seen: set[str] = set()
    for _ in range(4):
        placing = rig.place()
        execution = await worker.next_start()
        seen.add(execution.execution_id)
        worker.accept(execution.lane)
        await placing

    assert len(seen) == 4
