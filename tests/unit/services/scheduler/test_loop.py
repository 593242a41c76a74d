"""The loop: facts to steps, commands to answers; who is cancelled when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from libs.errors import DeadlineExceeded, Reason, ResourceExhausted, Unavailable
from libs.process import Background
from libs.testing import FakeClock
from services.scheduler import metrics
from services.scheduler.core.messages import (
    ExecutionsReported,
    Grant,
    SlotAsked,
    WorkerHeard,
)
from services.scheduler.loop import OBSERVE_S, TICK_S, Connection, Scheduler
from tests.unit.services.scheduler.core.driver import VERSION, registration, settings


def _ask(execution_id: str, *, max_wait_s: float = 30.0, spares: tuple[str, ...] = ()) -> SlotAsked:
    return SlotAsked(
        execution_id=execution_id,
        model_version=VERSION,
        max_wait_s=max_wait_s,
        spare_execution_ids=spares,
    )


class Rig:
    """A scheduler with one worker of one slot, which tests may cut off."""

    def __init__(self, *, queue_length_max: int = 10) -> None:
        self.clock = FakeClock()
        self.scheduler = Scheduler(
            settings(queue_length_max=queue_length_max), self.clock, instance="test"
        )
        self.cuts: list[int] = []
        self.connections: list[Connection] = []

    def connect(self, epoch: int = 1, *, capacity: int = 1) -> _Block:
        return _Block(self, epoch, capacity)

    def end(self, execution_id: str) -> None:
        self.scheduler.hear(ExecutionsReported(worker="workers/a", epoch=1, ended=(execution_id,)))

    def acquire(self, execution_id: str) -> asyncio.Task[Grant]:
        return asyncio.create_task(self.scheduler.acquire(_ask(execution_id)))

    @property
    def slots(self) -> list[str]:
        return list(self.scheduler._state.slots)

    @property
    def queued(self) -> list[str]:
        return list(self.scheduler._state.waiting)


class _Block:
    """`with rig.connect():` has the worker registered."""

    def __init__(self, rig: Rig, epoch: int, capacity: int) -> None:
        self._rig = rig
        self._block = rig.scheduler.connect(
            registration(capacity=capacity), epoch, cut=lambda: rig.cuts.append(epoch)
        )

    def __enter__(self) -> Connection:
        return self._block.__enter__()

    def __exit__(self, *error: object) -> None:
        self._block.__exit__(None, None, None)


async def _turn() -> None:
    """Lets every task that is ready run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_free_slot_is_granted_without_suspending() -> None:
    rig = Rig()
    with rig.connect():
        coroutine = rig.scheduler.acquire(_ask("e1"))

        with pytest.raises(StopIteration) as caught:
            coroutine.send(None)

    assert caught.value.value.target.worker == "workers/a"


async def test_who_waits_is_answered_when_a_slot_becomes_free() -> None:
    rig = Rig()
    with rig.connect():
        await rig.acquire("e1")
        call = rig.acquire("e2")
        await _turn()
        assert not call.done()

        rig.end("e1")

        assert (await call).execution_id == "e2"


async def test_a_cancelled_caller_leaves_the_queue() -> None:
    rig = Rig()
    with rig.connect():
        await rig.acquire("e1")
        call = rig.acquire("e2")
        await _turn()

        call.cancel()
        await _turn()

        assert rig.queued == []
        assert rig.scheduler._callers == {}


async def test_a_slot_that_comes_when_its_caller_was_just_cancelled_goes_on() -> None:
    """The caller's task is cancelled and has not run yet when the slot is granted to it."""
    rig = Rig()
    with rig.connect():
        await rig.acquire("e1")
        gone = rig.acquire("e2")
        await _turn()
        call = rig.acquire("e3")
        await _turn()

        gone.cancel()
        rig.end("e1")
        await _turn()

        assert gone.cancelled()
        assert (await call).execution_id == "e3"
        assert rig.slots == ["e3"]


async def test_a_caller_cancelled_just_after_its_slot_came_gives_it_on() -> None:
    """The slot is granted, and the caller is cancelled before it has run to see it."""
    rig = Rig()
    with rig.connect():
        await rig.acquire("e1")
        gone = rig.acquire("e2")
        await _turn()
        call = rig.acquire("e3")
        await _turn()

        rig.end("e1")
        gone.cancel()
        await _turn()

        assert gone.cancelled()
        assert (await call).execution_id == "e3"
        assert rig.slots == ["e3"]


async def test_a_caller_cancelled_just_after_its_refusal_changes_nothing() -> None:
    rig = Rig()
    block = rig.connect()
    with block:
        await rig.acquire("e1")
        gone = rig.acquire("e2")
        await _turn()
    gone.cancel()
    await _turn()

    assert gone.cancelled()
    assert rig.slots == rig.queued == []


async def test_two_callers_of_one_execution_get_one_slot() -> None:
    rig = Rig()
    with rig.connect():
        await rig.acquire("e1")
        first, second = rig.acquire("e2"), rig.acquire("e2")
        await _turn()

        rig.end("e1")

        assert (await first).slot_id == (await second).slot_id


async def test_one_of_two_callers_may_leave() -> None:
    rig = Rig()
    with rig.connect():
        await rig.acquire("e1")
        first, second = rig.acquire("e2"), rig.acquire("e2")
        await _turn()
        first.cancel()
        await _turn()
        assert rig.queued == ["e2"]

        rig.end("e1")

        assert (await second).execution_id == "e2"


async def test_refusals_are_typed_errors() -> None:
    rig = Rig(queue_length_max=1)
    with pytest.raises(Unavailable) as away:
        await rig.scheduler.acquire(_ask("e0"))
    with rig.connect():
        await rig.acquire("e1")
        waiting = rig.acquire("e2")
        await _turn()
        with pytest.raises(ResourceExhausted) as full:
            await rig.scheduler.acquire(_ask("e3"))
        with pytest.raises(DeadlineExceeded) as late:
            await rig.scheduler.acquire(_ask("e4", max_wait_s=0.0))
    with pytest.raises(Unavailable):
        await waiting

    assert away.value.reason is Reason.NO_READY_WORKER
    assert away.value.metadata == {"modelVersion": VERSION}
    assert full.value.reason is Reason.QUEUE_FULL
    assert late.value.reason is Reason.QUEUE_TIMEOUT
    assert None not in {away.value.retry_after_s, full.value.retry_after_s}


async def test_spares_come_without_suspending_and_are_counted() -> None:
    granted = metrics.SPARES_GRANTED._value.get()
    taken_back = metrics.SPARES_TAKEN_BACK._value.get()
    rig = Rig()
    with rig.connect(capacity=5):
        coroutine = rig.scheduler.acquire(_ask("e1", spares=("s0", "s1")))
        with pytest.raises(StopIteration) as caught:
            coroutine.send(None)
        assert [spare.execution_id for spare in caught.value.value.spares] == ["s0"]

        for number in range(4):
            await rig.acquire(f"f{number}")

    assert metrics.SPARES_GRANTED._value.get() == granted + 1
    assert metrics.SPARES_TAKEN_BACK._value.get() == taken_back + 1


async def test_leaving_the_block_loses_the_worker() -> None:
    rig = Rig()
    with rig.connect():
        await rig.acquire("e1")

    assert rig.slots == []
    assert rig.scheduler._connections == {}


async def test_a_replaced_stream_is_cut_once_and_its_end_changes_nothing() -> None:
    rig = Rig()
    older = rig.connect(1)
    with older as connection:
        newer = rig.connect(2)
        newer.__enter__()
        await rig.acquire("e1")
        connection.end(Unavailable("again"))

    assert rig.cuts == [1]
    assert connection.error is not None
    assert connection.error.reason is Reason.FENCED
    assert rig.slots == ["e1"]
    newer.__exit__()


async def test_a_stream_that_comes_after_a_newer_one_is_cut() -> None:
    rig = Rig()
    with rig.connect(2), rig.connect(1) as late:
        assert rig.cuts == [1]
        assert late.error is not None
        assert late.error.metadata == {"epoch": "1", "currentEpoch": "2"}


@pytest.fixture
async def running() -> AsyncIterator[Rig]:
    rig = Rig()
    async with Background() as background:
        background.start(rig.scheduler.run(), name="loop")
        await _turn()
        yield rig


async def _advance(rig: Rig, seconds: float) -> None:
    rig.clock.advance(seconds)
    await _turn()


async def test_time_passes_in_ticks(running: Rig) -> None:
    with running.connect() as connection:
        await running.acquire("e1")
        call = running.acquire("e2")
        await _turn()
        await _advance(running, TICK_S)
        running.scheduler.hear(WorkerHeard(worker="workers/a", epoch=1))

        await _advance(running, 5.0 - TICK_S)
        assert (await call).queued_s == pytest.approx(5.0)

        await _advance(running, 5.0)
        assert connection.error is not None
        assert connection.error.reason is Reason.WORKER_LOST
        assert running.cuts == [1]


async def test_the_gauges_show_the_state_once_a_second(running: Rig) -> None:
    with running.connect():
        await running.acquire("e1")
        call = running.acquire("e2")
        await _turn()
        await _advance(running, OBSERVE_S)

        shown = metrics.GAUGES.latest
        call.cancel()

    assert shown.queued == {VERSION: 1}
    assert shown.slots_in_use == {"workers/a": 1}
    assert shown.workers == {"loading": 0, "ready": 1, "draining": 0, "lost": 0}
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in metrics.GAUGES.collect()
        for sample in family.samples
    }
    assert samples["maas_scheduler_queue_length", VERSION] == 1
    assert samples["maas_scheduler_slots_in_use", "workers/a"] == 1
    assert samples["maas_scheduler_workers", "ready"] == 1


async def test_an_idle_scheduler_recounts_and_counts_what_is_wrong(running: Rig) -> None:
    before = metrics.INTEGRITY_FAILURES._value.get()
    with running.connect():
        await running.acquire("e1")
        running.scheduler._state.unstarted.clear()
        running.scheduler.hear(WorkerHeard(worker="workers/a", epoch=1))
        await _advance(running, OBSERVE_S)
        assert metrics.INTEGRITY_FAILURES._value.get() == before, "it was not idle"

        await _advance(running, OBSERVE_S)

    assert metrics.INTEGRITY_FAILURES._value.get() == before + 1


async def test_a_scheduler_that_closes_sends_everybody_away() -> None:
    rig = Rig()
    with rig.connect():
        await rig.acquire("e1")
        first, second, other = rig.acquire("e2"), rig.acquire("e2"), rig.acquire("e3")
        await _turn()

        await rig.scheduler.close()

        for call in (first, second, other):
            with pytest.raises(Unavailable) as caught:
                await call
            assert caught.value.reason is Reason.SERVICE_UNAVAILABLE
        assert rig.queued == []


async def test_watchers_are_woken_by_changes_of_workers_alone() -> None:
    rig = Rig()
    with rig.connect():
        version = rig.scheduler.hub.version
        await rig.acquire("e1")
        rig.end("e1")
        assert rig.scheduler.hub.version == version

    assert rig.scheduler.hub.version > version


async def test_workers_after_a_revision_come_in_its_order() -> None:
    rig = Rig()
    scheduler = rig.scheduler
    names = ("c", "a", "b")
    blocks = [
        scheduler.connect(registration(name), number, cut=lambda: None)
        for number, name in enumerate(names, start=1)
    ]
    for block in blocks:
        block.__enter__()

    def after(revision: int, count: int) -> list[str]:
        return [item.registration.endpoint[0] for item in scheduler.workers_after(revision, count)]

    assert after(0, 10) == ["c", "a", "b"]
    assert after(0, 2) == ["c", "a"]
    assert after(1, 10) == ["a", "b"]
    assert [item.name for item in scheduler.workers()] == [
        "workers/a",
        "workers/b",
        "workers/c",
    ]
    for block in blocks:
        block.__exit__(None, None, None)
