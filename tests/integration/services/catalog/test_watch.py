"""services/catalog: WatchOfferings, from PostgreSQL to watchers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from maas.catalog.v1 import model_service_pb2, model_service_pb2_grpc
from maas.catalog.v1 import offering_service_pb2 as pb

from libs.errors import Code, Reason, Unavailable
from libs.rpc.feed import CHUNK_SIZE
from libs.rpc.status import error_of
from libs.testing.relay import Relay
from tests.conftest import DatabaseFactory
from tests.integration.services.catalog.harness import Catalog, running_catalog


async def test_nothing_is_a_complete_snapshot(catalog: Catalog) -> None:
    async with catalog.watching() as watcher:
        response = await watcher.read()

    assert response == pb.WatchOfferingsResponse(snapshot_complete=True)


async def test_long_snapshot_comes_in_parts_and_is_complete_once(catalog: Catalog) -> None:
    await catalog.prepare_version()
    await catalog.insert_offerings(2 * CHUNK_SIZE)

    responses: list[pb.WatchOfferingsResponse] = []
    async with catalog.watching() as watcher:
        for _ in range(5):
            responses.append(await watcher.read())  # noqa: PERF401 - reads as what it does

    assert [len(item.offerings) for item in responses] == [CHUNK_SIZE, CHUNK_SIZE, 0, 0, 0]
    assert [item.snapshot_complete for item in responses] == [False, False, True, False, False]
    names = [offering.name for item in responses for offering in item.offerings]
    assert names == [f"offerings/o-{n:05}" for n in range(1, 2 * CHUNK_SIZE + 1)]


async def test_change_arrives_with_all_its_fields(catalog: Catalog) -> None:
    await catalog.prepare_version()
    async with catalog.watching() as watcher:
        await watcher.snapshot()

        made = await catalog.create_offering("tiny")

        assert await watcher.change() == [made]


async def test_every_one_of_racing_changes_arrives(catalog: Catalog) -> None:
    await catalog.prepare_version()
    wanted = {f"offerings/o{number}" for number in range(20)}
    got: list[str] = []
    async with catalog.watching() as watcher:
        got += await watcher.snapshot()
        async with asyncio.TaskGroup() as group:
            for name in wanted:
                group.create_task(catalog.create_offering(name.rpartition("/")[2]))
            while len(got) < len(wanted):
                got += [item.name for item in await watcher.change()]

    assert sorted(got) == sorted(wanted)


async def test_signs_of_life_come_without_changes(catalog: Catalog) -> None:
    async with catalog.watching() as watcher:
        await watcher.snapshot()

        assert [await watcher.read() for _ in range(2)] == [pb.WatchOfferingsResponse()] * 2


async def test_change_by_another_replica_arrives(database: DatabaseFactory) -> None:
    dsn = await database("catalog")
    async with running_catalog(dsn) as one, running_catalog(dsn) as other:
        await one.prepare_version()
        async with one.watching() as watcher:
            await watcher.snapshot()

            made = await other.create_offering("tiny")

            assert await watcher.change() == [made]


async def test_watcher_that_comes_back_gets_everything(catalog: Catalog) -> None:
    await catalog.prepare_version()
    await catalog.create_offering("one")
    async with catalog.watching() as watcher:
        assert await watcher.snapshot() == ["offerings/one"]

    await catalog.create_offering("two")

    async with catalog.watching() as watcher:
        assert await watcher.snapshot() == ["offerings/one", "offerings/two"]


async def test_watch_ends_when_the_watcher_leaves(catalog: Catalog) -> None:
    async with catalog.watching() as watcher:
        await watcher.snapshot()

    # A handler that lived on would keep the server from stopping.
    async with asyncio.timeout(1):
        await catalog.server.stop(30)


async def test_outage_of_the_database_ends_by_itself(
    database: DatabaseFactory, tmp_path: Path
) -> None:
    async with (
        Relay(await database("catalog"), tmp_path) as relay,
        running_catalog(relay.dsn) as catalog,
    ):
        await catalog.prepare_version()

        await relay.take_away()
        assert await error_of_get(catalog) == (
            Code.UNAVAILABLE,
            Reason.SERVICE_UNAVAILABLE,
            {"dependency": "postgresql"},
        )
        with pytest.raises(Unavailable):
            await watch_once(catalog)

        await relay.bring_back()
        made = await catalog.create_offering("tiny")
        async with catalog.watching() as watcher:
            assert await watcher.snapshot() == [made.name]


async def error_of_get(catalog: Catalog) -> tuple[Code, Reason, dict[str, str]]:
    """Fails at the first attempt, on a channel that does not retry."""
    async with grpc.aio.insecure_channel(catalog.endpoint) as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetModel(
                model_service_pb2.GetModelRequest(name="models/tiny"),
                metadata=(("authorization", f"Bearer {catalog.callers.admin}"),),
            )
    error = error_of(caught.value)
    return error.code, error.reason, error.metadata


async def watch_once(catalog: Catalog) -> None:
    async with catalog.watching() as watcher:
        await watcher.read()


async def test_watch_breaks_when_the_database_goes(
    database: DatabaseFactory, tmp_path: Path
) -> None:
    async with (
        Relay(await database("catalog"), tmp_path) as relay,
        running_catalog(relay.dsn) as catalog,
    ):
        with pytest.raises(Unavailable):
            await watch_an_outage(catalog, relay)


async def watch_an_outage(catalog: Catalog, relay: Relay) -> None:
    async with catalog.watching() as watcher:
        await watcher.snapshot()
        await relay.take_away()
        # A sign of life without a look at the database would be a lie.
        for _ in range(3):
            await watcher.read()
