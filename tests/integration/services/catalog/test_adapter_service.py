"""services/catalog: adapters, from the wire to PostgreSQL and to watchers."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from maas.catalog.v1 import adapter_service_pb2 as pb
from maas.catalog.v1 import adapter_service_pb2_grpc, model_pb2

from libs.errors import AlreadyExists, FieldRule, InvalidArgument, NotFound
from libs.rpc import Peer
from libs.testing.clock import START
from libs.testing.rpc import TENANT_PROJECT
from tests.conftest import DatabaseFactory
from tests.integration.services.catalog.harness import Catalog, an_adapter, running_catalog

OWN = f"projects/{TENANT_PROJECT}"
OTHERS = "projects/somebody-else"
OTHER_CONTENTS = [
    an_adapter(path="other.gguf"),
    an_adapter(digest=f"sha256:{'b' * 64}"),
    an_adapter(project=OWN),
    an_adapter(model_version="models/tiny/versions/2"),
]


@pytest.fixture(autouse=True)
async def versions(catalog: Catalog) -> None:
    """Two versions that adapters can be made for."""
    await catalog.prepare_version()
    await catalog.create_version("tiny", "2")


async def get(caller: Peer, adapter_id: str) -> model_pb2.Adapter:
    request = pb.GetAdapterRequest(name=f"adapters/{adapter_id}")
    stub = adapter_service_pb2_grpc.AdapterServiceStub(caller.channel)
    return (await caller.call(stub.GetAdapter, request)).adapter


async def names(caller: Peer, *, page_size: int = 0, token: str = "") -> tuple[list[str], str]:
    request = pb.ListAdaptersRequest(page_size=page_size, page_token=token)
    stub = adapter_service_pb2_grpc.AdapterServiceStub(caller.channel)
    response = await caller.call(stub.ListAdapters, request)
    return [item.name for item in response.adapters], response.next_page_token


async def test_adapter_is_kept_as_it_was_created(catalog: Catalog) -> None:
    wanted = an_adapter(path="stories/fox.gguf", project=OWN, name="adapters/other")

    made = await catalog.create_adapter("fox", wanted)

    want = an_adapter(path="stories/fox.gguf", project=OWN, name="adapters/fox")
    want.create_time.FromDatetime(START)
    assert made == want
    assert await get(catalog.tenant, "fox") == want


async def test_creating_an_equal_adapter_again_returns_the_first(catalog: Catalog) -> None:
    first = await catalog.create_adapter("fox")
    catalog.clock.advance(60)

    assert await catalog.create_adapter("fox") == first


@pytest.mark.parametrize("other", OTHER_CONTENTS)
@pytest.mark.parametrize("is_deleted", [False, True])
async def test_a_name_stays_bound_to_its_content_even_when_deleted(
    catalog: Catalog,
    other: model_pb2.Adapter,
    is_deleted: bool,  # noqa: FBT001 - a case of the test
) -> None:
    await catalog.create_adapter("fox")
    if is_deleted:
        await catalog.delete_adapter("fox")

    with pytest.raises(AlreadyExists) as caught:
        await catalog.create_adapter("fox", other)

    assert caught.value.metadata == {"resource": "adapters/fox"}


async def test_adapter_of_an_unknown_version_names_the_version(catalog: Catalog) -> None:
    with pytest.raises(NotFound) as caught:
        await catalog.create_adapter("fox", an_adapter(model_version="models/tiny/versions/9"))

    assert caught.value.metadata == {"resource": "models/tiny/versions/9"}


@pytest.mark.parametrize(
    ("bad", "field", "rule"),
    [
        (an_adapter(model_version=""), "model_version", FieldRule.REQUIRED),
        (an_adapter(model_version="models/tiny"), "model_version", FieldRule.BAD_FORMAT),
        (an_adapter(path=""), "path", FieldRule.REQUIRED),
        (an_adapter(path="/etc/passwd"), "path", FieldRule.BAD_FORMAT),
        (an_adapter(path="a/../../b"), "path", FieldRule.BAD_FORMAT),
        (an_adapter(digest="sha256:1"), "digest", FieldRule.BAD_FORMAT),
        (an_adapter(project="fox"), "project", FieldRule.BAD_FORMAT),
        (an_adapter(project="organizations/fox"), "project", FieldRule.BAD_FORMAT),
    ],
)
async def test_bad_fields_of_an_adapter_are_named(
    catalog: Catalog, bad: model_pb2.Adapter, field: str, rule: FieldRule
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await catalog.create_adapter("fox", bad)

    got = [(item.field, item.rule) for item in caught.value.violations]
    assert got == [(f"adapter.{field}", rule)]


async def test_tenant_sees_what_is_shared_and_its_own(catalog: Catalog) -> None:
    await catalog.create_adapter("shared")
    await catalog.create_adapter("own", an_adapter(project=OWN))
    await catalog.create_adapter("other", an_adapter(project=OTHERS))

    assert await names(catalog.tenant) == (["adapters/own", "adapters/shared"], "")
    assert (await get(catalog.tenant, "own")).project == OWN
    with pytest.raises(NotFound) as caught:
        await get(catalog.tenant, "other")
    # The same as for one that is not there at all.
    assert caught.value.metadata == {"resource": "adapters/other"}


async def test_administrator_sees_all_in_pages_by_name(catalog: Catalog) -> None:
    for adapter_id, project in (("b", OTHERS), ("a", ""), ("c", OWN)):
        await catalog.create_adapter(adapter_id, an_adapter(project=project))

    first, token = await names(catalog.admin, page_size=2)

    assert first == ["adapters/a", "adapters/b"]
    assert await names(catalog.admin, token=token) == (["adapters/c"], "")
    assert (await get(catalog.admin, "b")).project == OTHERS


async def test_deleted_adapter_is_gone_and_deleting_it_again_is_fine(catalog: Catalog) -> None:
    await catalog.create_adapter("fox")

    await catalog.delete_adapter("fox")
    await catalog.delete_adapter("fox")

    for caller in (catalog.admin, catalog.tenant):
        assert await names(caller) == ([], "")
        with pytest.raises(NotFound):
            await get(caller, "fox")


async def test_adapter_that_never_was_cannot_be_deleted(catalog: Catalog) -> None:
    with pytest.raises(NotFound) as caught:
        await catalog.delete_adapter("fox")

    assert caught.value.metadata == {"resource": "adapters/fox"}


async def test_deleted_adapter_comes_back_with_equal_content(catalog: Catalog) -> None:
    first = await catalog.create_adapter("fox")
    await catalog.delete_adapter("fox")

    assert await catalog.create_adapter("fox") == first
    assert await get(catalog.tenant, "fox") == first


async def test_racing_creations_of_different_content_have_one_winner(catalog: Catalog) -> None:
    wishes = [an_adapter(path=f"{number}.gguf") for number in range(8)]

    results = await asyncio.gather(
        *(catalog.create_adapter("fox", wish) for wish in wishes), return_exceptions=True
    )

    losers = [item for item in results if isinstance(item, AlreadyExists)]
    assert len(losers) == len(wishes) - 1
    assert await get(catalog.tenant, "fox") in results


async def test_watch_lists_everything_then_what_comes_goes_and_comes_back(
    catalog: Catalog,
) -> None:
    fox = await catalog.create_adapter("fox", an_adapter(project=OTHERS))
    async with catalog.watching_adapters() as watcher:
        assert await watcher.read() == pb.WatchAdaptersResponse(
            adapters=[fox], snapshot_complete=True
        )

        owl = await catalog.create_adapter("owl")
        assert await watcher.change() == pb.WatchAdaptersResponse(adapters=[owl])
        await catalog.delete_adapter("fox")
        assert await watcher.change() == pb.WatchAdaptersResponse(deleted_names=["adapters/fox"])
        await catalog.create_adapter("fox", an_adapter(project=OTHERS))
        assert await watcher.change() == pb.WatchAdaptersResponse(adapters=[fox])


async def test_new_watcher_does_not_hear_of_what_was_deleted(catalog: Catalog) -> None:
    await catalog.create_adapter("fox")
    await catalog.delete_adapter("fox")

    async with catalog.watching_adapters() as watcher:
        assert await watcher.read() == pb.WatchAdaptersResponse(snapshot_complete=True)


async def test_deletion_by_another_replica_arrives(database: DatabaseFactory) -> None:
    dsn = await database("catalog")
    async with running_catalog(dsn) as one, running_catalog(dsn) as other:
        await one.prepare_version()
        await one.create_adapter("fox")
        async with one.watching_adapters() as watcher:
            await watcher.read()

            await other.delete_adapter("fox")

            assert (await watcher.change()).deleted_names == ["adapters/fox"]


async def test_changes_of_adapters_do_not_show_in_the_watch_of_offerings(
    catalog: Catalog,
) -> None:
    async with catalog.watching() as offerings:
        await offerings.snapshot()

        await catalog.create_adapter("fox")
        made = await catalog.create_offering("tiny")

        assert await offerings.change() == [made]


@pytest.mark.parametrize(
    "statement", ["UPDATE adapter SET path = 'other.gguf'", "DELETE FROM adapter"]
)
async def test_table_refuses_to_change_or_forget_content(catalog: Catalog, statement: str) -> None:
    await catalog.create_adapter("fox")

    with pytest.raises(asyncpg.RestrictViolationError):
        async with catalog.database.transaction() as connection:
            await connection.execute(statement)
