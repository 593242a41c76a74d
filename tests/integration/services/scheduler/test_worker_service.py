"""The listing and the watch of workers."""

from __future__ import annotations

import pytest
from maas.engine.v1 import engine_pb2
from maas.scheduler.v1 import worker_pb2

from libs.errors import InvalidArgument, Reason
from libs.testing.clock import START
from tests.integration.services.scheduler.harness import VERSION, Running, register, until


async def test_a_worker_is_listed_with_all_that_is_known(suite: Running) -> None:
    async with suite.registered(capacity=2) as worker:
        await suite.acquire("e1")
        await suite.advance(1.0)
        await worker.load(
            running=1,
            waiting=0,
            waiting_tokens=7,
            kv_used_tokens=5,
            resident_adapters=["adapters/fox"],
        )
        await until(lambda: suite.scheduler.workers()[0].load is not None)
        await suite.advance(2.0)

        found = await suite.worker_named()

        assert found.name == "workers/a"
        assert found.incarnation == "one"
        assert found.endpoint == "a:50055"
        assert found.epoch == worker.epoch
        assert found.state == worker_pb2.WORKER_STATE_READY
        assert found.info == register(capacity=2).info
        assert list(found.info.model_versions) == [VERSION]
        assert (found.load.running, found.load.waiting_tokens) == (1, 7)
        assert list(found.load.resident_adapters) == ["adapters/fox"]
        assert found.info.capabilities.max_outputs == 4
        assert found.slots_in_use == 1
        assert found.connect_time.ToDatetime() == START.replace(tzinfo=None)
        assert (
            found.last_heartbeat_time.ToMilliseconds() - found.connect_time.ToMilliseconds() == 1000
        )


async def test_workers_are_listed_by_name_in_pages(suite: Running) -> None:
    async with suite.registered("b"), suite.registered("c"), suite.registered("a"):
        first = await suite.list_workers(page_size=2)
        second = await suite.list_workers(page_size=2, page_token=first.next_page_token)

        assert [item.name for item in first.workers] == ["workers/a", "workers/b"]
        assert [item.name for item in second.workers] == ["workers/c"]
        assert second.next_page_token == ""


async def test_a_foreign_page_token_is_refused(suite: Running) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await suite.list_workers(page_token="?")

    assert caught.value.reason is Reason.BAD_PAGE_TOKEN


async def test_a_watch_starts_with_everything(suite: Running) -> None:
    async with suite.registered("a"), suite.registered("b"), suite.watching() as watch:
        response = await watch.read()

        assert response.snapshot_complete
        assert [item.name for item in response.workers] == ["workers/a", "workers/b"]


async def test_a_watch_of_nothing_completes_too(suite: Running) -> None:
    async with suite.watching() as watch:
        response = await watch.read()

        assert response.snapshot_complete
        assert not response.workers


async def test_a_watch_follows_what_workers_are(suite: Running) -> None:
    async with suite.watching() as watch:
        await watch.read()
        async with suite.registered("a") as worker:
            new = await watch.change()
            await worker.drain()
            draining = await watch.change()
        lost = await watch.change()

    assert (new.name, new.state) == ("workers/a", worker_pb2.WORKER_STATE_READY)
    assert (new.endpoint, new.epoch) == ("a:50055", worker.epoch)
    assert draining.state == worker_pb2.WORKER_STATE_DRAINING
    assert lost.state == worker_pb2.WORKER_STATE_LOST


async def test_a_loading_worker_is_listed_with_its_progress_and_watched(suite: Running) -> None:
    checking = engine_pb2.LoadProgress(stage=engine_pb2.LOAD_STAGE_CHECKING)
    loading = engine_pb2.LoadProgress(stage=engine_pb2.LOAD_STAGE_LOADING, fraction=0.5)
    loaded = register(capacity=3)
    async with suite.watching() as watch, suite.connecting() as worker:
        await watch.read()
        await worker.register(register(capacity=0, loading=checking))
        first = await watch.change()
        listed = await suite.worker_named()
        await worker.loading(loading)
        await until(lambda: suite.scheduler.workers()[0].loading == loading.SerializeToString())
        later = await suite.worker_named()
        await worker.loaded(loaded.info)
        ready = await watch.change()

    assert (first.state, first.loading) == (worker_pb2.WORKER_STATE_LOADING, checking)
    assert (listed.state, listed.loading) == (worker_pb2.WORKER_STATE_LOADING, checking)
    assert later.loading == loading
    assert (ready.state, ready.info) == (worker_pb2.WORKER_STATE_READY, loaded.info)
    assert not ready.HasField("loading")


async def test_a_watch_shows_a_replacement(suite: Running) -> None:
    async with suite.watching() as watch, suite.registered(incarnation="one"):
        while not (await watch.read()).workers:
            pass
        async with suite.registered(incarnation="two") as newer:
            changes = [await watch.change()]
            # Both may come: that the older is gone, and the newer.
            if changes[-1].incarnation != "two":
                changes.append(await watch.change())

        assert changes[-1].epoch == newer.epoch
        assert changes[-1].state == worker_pb2.WORKER_STATE_READY


async def test_load_and_slots_are_no_change(suite: Running) -> None:
    async with suite.registered() as worker, suite.watching() as watch:
        await watch.read()
        await worker.load(running=1)
        await suite.acquire("e1")
        await until(lambda: suite.scheduler.workers()[0].load is not None)

        for _ in range(3):
            assert not (await watch.read()).workers


async def test_signs_of_life_come_when_nothing_happens(suite: Running) -> None:
    async with suite.watching() as watch:
        assert (await watch.read()).snapshot_complete

        response = await watch.read()

        assert not response.workers
        assert not response.snapshot_complete
