"""The gateway's spares and a real scheduler: over gRPC, with its own rules of ample room."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from libs.clock import SystemClock
from libs.errors import DeadlineExceeded, Reason
from libs.process import Background
from libs.testing import eventually
from services.gateway.clients import SchedulerClient
from services.gateway.placement import Wanted
from services.gateway.spares import Lease, Spares
from services.gateway.tables import Worker, Workers
from tests.conftest import DatabaseFactory
from tests.integration.services.scheduler.harness import VERSION, Running, running_scheduler


@dataclass
class Rig:
    """A pool of spares, its client, and the scheduler behind it."""

    suite: Running
    client: SchedulerClient
    spares: Spares
    table: Workers

    def know(self, epoch: int) -> None:
        """Has a worker in the gateway's table."""
        versions = frozenset({VERSION})
        self.table.put(
            Worker(name="workers/a", endpoint="a:50055", epoch=epoch, model_versions=versions)
        )

    async def ask(self, execution_id: str) -> None:
        """Asks for a slot as the placer does."""
        with self.spares.order(VERSION) as order:
            wanted = Wanted(
                execution_id=execution_id,
                model_version=VERSION,
                project="projects/p",
                max_wait_s=5.0,
                spare_ids=tuple(order.ids),
            )
            slot = await self.client.acquire(wanted, execution_id, [])
            order.lease = Lease(spares=slot.spares, start_within_s=slot.start_within_s)


@pytest.fixture
async def rig(database: DatabaseFactory) -> AsyncIterator[Rig]:
    async with running_scheduler(await database("scheduler")) as suite, Background() as background:
        client = SchedulerClient(suite.gateway, background)
        table = Workers()
        spares = Spares(
            lease=client.lease,
            release=client.release_all,
            workers=table,
            clock=SystemClock(),
            id_prefix="g1.x",
        )
        yield Rig(suite=suite, client=client, spares=spares, table=table)


async def test_spares_come_with_a_slot_are_refilled_and_go_back_at_the_end(rig: Rig) -> None:
    async with rig.suite.registered(capacity=40) as worker:
        rig.know(worker.epoch)
        async with Background() as background:
            background.start(rig.spares.run(), name="spares")
            for _ in range(20):
                rig.spares.take(VERSION)

            await rig.ask("e1")
            # A quarter of the room that is left, rounded down.
            assert rig.spares.count(VERSION) == 9
            for _ in range(5):
                used = rig.spares.take(VERSION)
                assert used is not None
                assert (used.worker, used.endpoint) == ("workers/a", "a:50055")
                assert used.epoch == worker.epoch
                await worker.report(started=[used.execution_id], ended=[used.execution_id])
            await eventually(lambda: rig.spares.count(VERSION) > 4)
            known = rig.suite.scheduler.workers()[0].spares
            await eventually(lambda: known.keys() == _kept(rig))
        await eventually(lambda: rig.suite.slots() == ["e1"])


def _kept(rig: Rig) -> set[str]:
    return {kept.spare.execution_id for kept in rig.spares._pools[VERSION].kept}


async def test_a_scheduler_without_ample_room_refuses_a_lease_without_keeping_it(rig: Rig) -> None:
    async with rig.suite.registered(capacity=3):
        with pytest.raises(DeadlineExceeded) as caught:
            await rig.client.lease(VERSION, ["s0", "s1"])

        assert caught.value.reason is Reason.QUEUE_TIMEOUT
        assert rig.suite.slots() == []
