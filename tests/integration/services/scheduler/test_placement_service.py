"""Slots over real gRPC: granted, waited for, refused, given back."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest
from maas.inference.v1 import generation_pb2

from libs.errors import (
    DeadlineExceeded,
    InvalidArgument,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from tests.conftest import DatabaseFactory
from tests.integration.services.scheduler.harness import (
    CONFIG,
    VERSION,
    Running,
    running_scheduler,
    until,
)


async def test_a_slot_says_where_to_run(suite: Running) -> None:
    async with suite.registered("a") as first, suite.registered("b") as second:
        slot = await suite.acquire("e1")

        assert slot.slot_id
        assert (slot.target.worker, slot.target.endpoint) == ("workers/a", "a:50055")
        assert slot.target.epoch == first.epoch
        assert [item.worker for item in slot.fallbacks] == ["workers/b"]
        assert slot.fallbacks[0].epoch == second.epoch
        assert slot.start_within.ToSeconds() == CONFIG.start_within
        assert slot.queued.ToNanoseconds() == 0


async def test_without_a_worker_a_request_is_refused_at_once(suite: Running) -> None:
    with pytest.raises(Unavailable) as caught:
        await suite.acquire("e1")

    assert caught.value.reason is Reason.NO_READY_WORKER
    assert caught.value.metadata == {"modelVersion": VERSION}
    assert caught.value.retry_after_s == 0.5


async def test_a_request_waits_until_an_execution_ends(suite: Running) -> None:
    async with suite.registered() as worker:
        await suite.acquire("e1")
        await worker.report(started=["e1"])
        async with suite.waiting("e2") as call:
            await suite.advance(1.5)
            await worker.report(ended=["e1"])
            slot = await call

        assert slot.target.worker == "workers/a"
        assert slot.queued.ToMilliseconds() == 1500


async def test_a_freed_slot_reaches_who_waits_within_milliseconds(suite: Running) -> None:
    """From the worker's report to the answer at the gateway, the best of five."""
    best_s = 1.0
    async with suite.registered() as worker:
        await suite.acquire("e0")
        for number in range(5):
            async with suite.waiting(f"e{number + 1}") as call:
                started_s = time.perf_counter()
                await worker.report(started=[f"e{number}"], ended=[f"e{number}"])
                await call
                best_s = min(best_s, time.perf_counter() - started_s)

    assert best_s < 0.02


async def test_a_caller_that_cancels_leaves_the_queue(suite: Running) -> None:
    async with suite.registered() as worker:
        await suite.acquire("e1")
        async with suite.waiting("e2") as first, suite.waiting("e3") as second:
            first.cancel()
            await until(lambda: suite.queued == ["e3"])
            await worker.report(ended=["e1"])

            assert (await second).target.worker == "workers/a"


async def test_a_connection_that_breaks_leaves_the_queue(suite: Running) -> None:
    async with suite.registered():
        await suite.acquire("e1")
        async with suite.waiting("e2"):
            await suite.bare.close()
            await until(lambda: suite.queued == [])


async def test_a_repeated_request_gets_the_slot_already_given(suite: Running) -> None:
    async with suite.registered(capacity=2):
        first = await suite.acquire("e1")
        second = await suite.acquire("e1")

        assert first.slot_id == second.slot_id
        assert suite.slots() == ["e1"]


async def test_a_repeated_request_may_outlive_the_first(suite: Running) -> None:
    """A gateway's library lost its connection and has asked again."""
    async with suite.registered() as worker:
        await suite.acquire("e1")
        async with suite.waiting("e2") as first, suite.waiting("e2") as second:
            await until(lambda: len(suite.scheduler._callers["e2"]) == 2)
            first.cancel()
            await until(lambda: len(suite.scheduler._callers["e2"]) == 1)
            assert suite.queued == ["e2"]
            await worker.report(ended=["e1"])

            assert (await second).target.worker == "workers/a"


async def test_excluded_workers_are_not_given(suite: Running) -> None:
    async with suite.registered("a"), suite.registered("b"):
        slot = await suite.acquire("e1", exclude=["workers/a"])
        assert slot.target.worker == "workers/b"
        assert list(slot.fallbacks) == []

        with pytest.raises(Unavailable) as caught:
            await suite.acquire("e2", exclude=["workers/a", "workers/b"])
        assert caught.value.reason is Reason.NO_READY_WORKER


async def test_a_full_queue_refuses(suite: Running) -> None:
    async with suite.registered():
        await suite.acquire("e1")
        async with suite.waiting("e2"), suite.waiting("e3"), suite.waiting("e4"):
            with pytest.raises(ResourceExhausted) as caught:
                await suite.acquire("e5")

    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_s == 1.0


async def test_the_longest_wait_ends_in_a_refusal(suite: Running) -> None:
    async with suite.registered() as worker:
        await suite.acquire("e1")
        await worker.report(started=["e1"])
        async with suite.waiting("e2", max_wait_s=2.0) as call:
            await suite.advance(1.9)
            assert suite.queued == ["e2"]
            await suite.advance(0.1)

            with pytest.raises(DeadlineExceeded) as caught:
                await call
        assert caught.value.reason is Reason.QUEUE_TIMEOUT


async def test_a_request_that_may_not_wait_is_refused_at_once(suite: Running) -> None:
    async with suite.registered():
        await suite.acquire("e1", max_wait_s=0.0)

        with pytest.raises(DeadlineExceeded) as caught:
            await suite.acquire("e2", max_wait_s=0.0)

        assert caught.value.reason is Reason.QUEUE_TIMEOUT


async def test_the_callers_own_deadline_leaves_the_queue(suite: Running) -> None:
    async with suite.registered():
        await suite.acquire("e1")
        with pytest.raises(DeadlineExceeded) as caught:
            await suite.acquire("e2", timeout_s=0.1)

        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        await until(lambda: suite.queued == [])


async def test_a_slot_that_never_starts_goes_to_the_next(suite: Running) -> None:
    async with suite.registered() as worker:
        await suite.acquire("e1")
        async with suite.waiting("e2") as call:
            await suite.advance(CONFIG.start_within - 0.5)
            await worker.load(running=0)
            await until(lambda: suite.scheduler.workers()[0].load is not None)
            assert suite.queued == ["e2"]
            await suite.advance(0.5)

            assert (await call).queued.ToSeconds() == CONFIG.start_within


async def test_released_slots_are_free_again(suite: Running) -> None:
    async with suite.registered():
        slot = await suite.acquire("e1")
        async with suite.waiting("e2") as call:
            await suite.release(slot.slot_id, "unknown")

            assert (await call).target.worker == "workers/a"
        await suite.release(slot.slot_id)
        assert suite.slots() == ["e2"]


async def test_projects_take_turns(suite: Running) -> None:
    async with suite.registered() as worker:
        await suite.acquire("e1")
        async with (
            suite.waiting("a1", project="projects/a"),
            suite.waiting("a2", project="projects/a"),
            suite.waiting("b1", project="projects/b") as other,
        ):
            await worker.report(ended=["e1"])
            await until(lambda: suite.queued == ["a2", "b1"])
            await worker.report(started=["a1"], ended=["a1"])

            assert (await other).target.worker == "workers/a"


async def test_spares_say_where_to_run(suite: Running) -> None:
    async with suite.registered(capacity=9) as worker:
        slot = await suite.acquire("e1", spares=["s0", "s1", "s2"])

        assert [spare.execution_id for spare in slot.spares] == ["s0", "s1"]
        assert suite.slots() == ["e1", "s0", "s1"]
        for spare in slot.spares:
            assert (spare.target.worker, spare.target.endpoint) == ("workers/a", "a:50055")
            assert spare.target.epoch == worker.epoch
        await suite.release(*(spare.slot_id for spare in slot.spares))
        assert suite.slots() == ["e1"]


async def test_nobody_waits_for_a_spare_that_has_not_started(suite: Running) -> None:
    async with suite.registered(capacity=5) as worker:
        await suite.acquire("e1", spares=["s0"])
        for number in range(4):
            await suite.acquire(f"f{number}")
        assert suite.slots() == ["e1", "f0", "f1", "f2", "f3"]

        # Its gateway has not been told and starts it: the worker's report decides.
        await worker.report(started=["s0"])
        await until(lambda: "s0" in suite.slots())


async def test_spares_that_never_start_are_freed(suite: Running) -> None:
    async with suite.registered(capacity=5) as worker:
        await suite.acquire("e1", spares=["s0"])
        await worker.report(started=["e1"])
        await suite.advance(CONFIG.start_within - 0.5)
        await worker.load(running=1)
        await until(lambda: suite.scheduler.workers()[0].load is not None)
        assert suite.slots() == ["e1", "s0"]

        await suite.advance(0.5)
        await until(lambda: suite.slots() == ["e1"])


async def test_more_spares_than_allowed_are_refused(suite: Running) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await suite.acquire("e1", spares=[f"s{number}" for number in range(65)])

    assert caught.value.violations[0].field == "spare_execution_ids"


@pytest.mark.parametrize("version", ["tiny", "models/tiny", "models/tiny/versions/", "a/b/c/d"])
async def test_a_version_of_another_form_is_refused(suite: Running, version: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await suite.acquire("e1", version=version)

    assert caught.value.metadata == {"field": "model_version"}


async def test_a_negative_wait_is_refused(suite: Running) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await suite.acquire("e1", max_wait_s=-1.0)

    assert caught.value.metadata == {"field": "max_wait"}


async def test_those_who_wait_are_sent_away_when_the_process_stops(
    database: DatabaseFactory,
) -> None:
    async with running_scheduler(await database("scheduler")) as suite, suite.registered():
        await suite.acquire("e1")
        async with suite.waiting("e2") as call:
            await suite.scheduler.close()

            with pytest.raises(Unavailable) as caught:
                await call
        assert caught.value.reason is Reason.SERVICE_UNAVAILABLE
        assert suite.queued == []


async def test_many_callers_share_the_slots_there_are(suite: Running) -> None:
    """More callers than slots, whose executions end at once: all are served."""
    async with suite.registered(capacity=2) as worker:
        names = [f"e{number}" for number in range(40)]
        for group in (names[start : start + 5] for start in range(0, 40, 5)):
            calls = [asyncio.create_task(suite.acquire(name)) for name in group]
            await until(lambda: len(suite.slots()) == 2 and len(suite.queued) == 3)
            while suite.slots():
                ended = suite.slots()
                await worker.report(started=ended, ended=ended)
                await until(partial(_differs, suite, ended))
            await asyncio.gather(*calls)


def _differs(suite: Running, slots: list[str]) -> bool:
    return suite.slots() != slots


async def test_a_slot_of_several_places_shows_in_the_listing(suite: Running) -> None:
    async with suite.registered("small", capacity=2), suite.registered("big", capacity=4):
        slot = await suite.acquire("e1", places=3)

        assert slot.target.worker == "workers/big"
        assert (await suite.worker_named("big")).slots_in_use == 3
        await suite.release(slot.slot_id)
        assert (await suite.worker_named("big")).slots_in_use == 0


async def test_more_places_than_there_can_be_are_refused_with_the_field(suite: Running) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await suite.acquire("e1", places=17)

    assert [item.field for item in caught.value.violations] == ["places"]


async def test_equal_affinity_comes_to_one_worker(suite: Running) -> None:
    async with suite.registered("a", capacity=8), suite.registered("b", capacity=8):
        chosen = {
            (await suite.acquire(f"e{number}", affinity=b"fox")).target.worker
            for number in range(4)
        }

    assert len(chosen) == 1


async def test_background_requests_are_answered_after_standard_ones(suite: Running) -> None:
    async with suite.registered() as worker:
        await suite.acquire("e1")
        await worker.report(started=["e1"])
        background = asyncio.create_task(
            suite.acquire("e2", priority=generation_pb2.PRIORITY_CLASS_BACKGROUND)
        )
        await until(lambda: "e2" in suite.queued)
        async with suite.waiting("e3") as standard:
            await worker.report(ended=["e1"])
            await standard
            assert not background.done()
            await worker.report(started=["e3"], ended=["e3"])
            assert (await background).target.worker == "workers/a"
