"""services/catalog: models and their versions, from the wire to PostgreSQL."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
from maas.catalog.v1 import model_pb2, model_service_pb2_grpc
from maas.catalog.v1 import model_service_pb2 as pb

from libs.errors import AlreadyExists, FieldRule, InvalidArgument, NotFound, Reason
from libs.testing.clock import START
from tests.conftest import DatabaseFactory
from tests.integration.services.catalog.harness import Catalog, running_catalog

DIGEST = "sha256:" + "ab" * 32
VERSION = model_pb2.ModelVersion(
    digest=DIGEST, context_length=4096, prompt_overhead_tokens=7, message_overhead_tokens=3
)


async def get_model(catalog: Catalog, name: str) -> model_pb2.Model:
    request = pb.GetModelRequest(name=name)
    return (await catalog.admin.call(catalog.models.GetModel, request)).model


async def get_version(catalog: Catalog, name: str) -> model_pb2.ModelVersion:
    request = pb.GetModelVersionRequest(name=name)
    return (await catalog.admin.call(catalog.models.GetModelVersion, request)).model_version


async def list_models(
    catalog: Catalog, page_size: int = 0, page_token: str = ""
) -> pb.ListModelsResponse:
    request = pb.ListModelsRequest(page_size=page_size, page_token=page_token)
    return await catalog.admin.call(catalog.models.ListModels, request)


async def test_created_model_is_read_back(catalog: Catalog) -> None:
    made = await catalog.create_model(
        "Qwen2.5", display_name="Qwen", license="Apache-2.0", description="Talks."
    )

    want = model_pb2.Model(
        name="models/Qwen2.5", display_name="Qwen", license="Apache-2.0", description="Talks."
    )
    want.create_time.FromDatetime(START)
    assert made == want
    assert await get_model(catalog, "models/Qwen2.5") == want


async def test_creating_an_equal_model_again_returns_the_first(catalog: Catalog) -> None:
    first = await catalog.create_model("tiny", display_name="Tiny")
    catalog.clock.advance(60)

    again = await catalog.create_model("tiny", display_name="Tiny")

    assert again == first


async def test_creating_another_model_of_the_same_name_is_refused(catalog: Catalog) -> None:
    await catalog.create_model("tiny", display_name="Tiny")

    with pytest.raises(AlreadyExists) as caught:
        await catalog.create_model("tiny", display_name="Other")

    assert caught.value.reason is Reason.RESOURCE_EXISTS
    assert caught.value.metadata == {"resource": "models/tiny"}
    assert (await get_model(catalog, "models/tiny")).display_name == "Tiny"


async def test_racing_creates_agree_on_one_model(catalog: Catalog) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(catalog.create_model("tiny")) for _ in range(8)]

    assert len({task.result().SerializeToString() for task in tasks}) == 1


async def test_unknown_model_is_not_found(catalog: Catalog) -> None:
    with pytest.raises(NotFound) as caught:
        await get_model(catalog, "models/none")

    assert caught.value.metadata == {"resource": "models/none"}


async def test_bad_model_names_are_refused(catalog: Catalog) -> None:
    for name in ("", "tiny", "models/", "models/a/b", "offerings/a", "models/a b"):
        with pytest.raises(InvalidArgument) as caught:
            await get_model(catalog, name)
        assert caught.value.metadata == {"field": "name"}, name


async def test_bad_fields_of_a_model_are_named(catalog: Catalog) -> None:
    wanted = [
        ("model_id", "", FieldRule.REQUIRED),
        ("model_id", "-tiny", FieldRule.BAD_FORMAT),
        ("model_id", "a" * 64, FieldRule.BAD_FORMAT),
        ("display_name", "é" * 65, FieldRule.TOO_LONG),
        ("display_name", "a\0b", FieldRule.BAD_FORMAT),
        ("description", "a" * 4097, FieldRule.TOO_LONG),
    ]
    for field, value, rule in wanted:
        request = pb.CreateModelRequest(**{"model_id": "tiny", field: value})
        with pytest.raises(InvalidArgument) as caught:
            await catalog.admin.call(catalog.models.CreateModel, request)
        assert [(item.field, item.rule) for item in caught.value.violations] == [(field, rule)]


async def test_pages_list_every_model_once_in_byte_order(catalog: Catalog) -> None:
    names = ["A", "a", "a-1", "a.1", "a_1", "a1", "b", "Z", "0"]
    for name in names:
        await catalog.create_model(name)

    got: list[str] = []
    token = ""
    while True:
        page = await list_models(catalog, page_size=2, page_token=token)
        got += [item.name for item in page.models]
        token = page.next_page_token
        if not token:
            break

    assert got == [f"models/{name}" for name in sorted(names)]


async def test_page_holds_50_models_unless_told_otherwise(catalog: Catalog) -> None:
    await insert_models(catalog, 51)

    first = await list_models(catalog)
    second = await list_models(catalog, page_token=first.next_page_token)

    assert [len(first.models), len(second.models)] == [50, 1]
    assert second.next_page_token == ""


async def test_page_stays_below_what_clients_accept(catalog: Catalog) -> None:
    await insert_models(catalog, 1000, description="d" * 4096)

    page = await list_models(catalog, page_size=5000)

    assert page.ByteSize() < 3.1 * 1024 * 1024
    assert 500 < len(page.models) < 1000
    rest = await list_models(catalog, page_size=1000, page_token=page.next_page_token)
    assert len(page.models) + len(rest.models) == 1000


async def insert_models(catalog: Catalog, count: int, description: str = "") -> None:
    async with catalog.database.transaction() as connection:
        await connection.execute(
            """
            INSERT INTO model (model_id, display_name, license, description, create_time)
            SELECT 'm' || n, '', '', $2, '2026-01-01' FROM generate_series(1, $1) AS n
            """,
            count,
            description,
        )


async def test_invented_page_token_is_refused(catalog: Catalog) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await list_models(catalog, page_token="nonsense!")

    assert caught.value.reason is Reason.BAD_PAGE_TOKEN


async def test_negative_page_size_is_refused(catalog: Catalog) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await list_models(catalog, page_size=-1)

    assert caught.value.metadata == {"field": "page_size"}


async def test_created_version_is_read_back(catalog: Catalog) -> None:
    await catalog.create_model("tiny")

    made = await catalog.create_version("tiny", "1.0", VERSION)

    want = model_pb2.ModelVersion()
    want.CopyFrom(VERSION)
    want.name = "models/tiny/versions/1.0"
    want.create_time.FromDatetime(START)
    assert made == want
    assert await get_version(catalog, "models/tiny/versions/1.0") == want


async def test_creating_an_equal_version_again_returns_the_first(catalog: Catalog) -> None:
    await catalog.create_model("tiny")
    first = await catalog.create_version("tiny", "1", VERSION)
    catalog.clock.advance(60)
    named = model_pb2.ModelVersion()
    named.CopyFrom(VERSION)
    named.name = "models/of/versions/no-account"

    assert await catalog.create_version("tiny", "1", named) == first


async def test_version_never_changes(catalog: Catalog) -> None:
    await catalog.create_model("tiny")
    first = await catalog.create_version("tiny", "1", VERSION)

    with pytest.raises(AlreadyExists):
        await catalog.create_version("tiny", "1", model_pb2.ModelVersion(context_length=1))
    for statement in ("UPDATE model_version SET context_length = 1", "DELETE FROM model_version"):
        with pytest.raises(asyncpg.RestrictViolationError):
            await catalog.database.fetch(statement)

    assert await get_version(catalog, first.name) == first


async def test_version_of_an_unknown_model_is_refused(catalog: Catalog) -> None:
    with pytest.raises(NotFound) as caught:
        await catalog.create_version("none", "1", VERSION)

    assert caught.value.metadata == {"resource": "models/none"}


async def test_bad_fields_of_a_version_are_named(catalog: Catalog) -> None:
    wanted = {
        "context_length": [
            model_pb2.ModelVersion(),
            model_pb2.ModelVersion(context_length=1 << 25),
        ],
        "digest": [model_pb2.ModelVersion(context_length=1, digest="md5:12")],
        "prompt_overhead_tokens": [
            model_pb2.ModelVersion(context_length=1, prompt_overhead_tokens=65537)
        ],
    }
    for field, version in [(field, one) for field, all_ in wanted.items() for one in all_]:
        with pytest.raises(InvalidArgument) as caught:
            await catalog.create_version("tiny", "1", version)
        assert [item.field for item in caught.value.violations] == [f"model_version.{field}"]


async def test_versions_are_listed_by_model(catalog: Catalog) -> None:
    for model_id in ("one", "two"):
        await catalog.create_model(model_id)
        for version_id in ("2", "10", "1"):
            await catalog.create_version(model_id, version_id)

    got = []
    token = ""
    for _ in range(2):
        request = pb.ListModelVersionsRequest(parent="models/one", page_size=2, page_token=token)
        page = await catalog.admin.call(catalog.models.ListModelVersions, request)
        got += [item.name for item in page.model_versions]
        token = page.next_page_token

    assert got == [f"models/one/versions/{version}" for version in ("1", "10", "2")]
    assert token == ""


async def test_versions_of_an_unknown_model_are_not_found(catalog: Catalog) -> None:
    request = pb.ListModelVersionsRequest(parent="models/none")

    with pytest.raises(NotFound):
        await catalog.admin.call(catalog.models.ListModelVersions, request)


async def test_restart_keeps_everything(database: DatabaseFactory) -> None:
    dsn = await database("catalog")
    async with running_catalog(dsn) as first:
        await first.prepare_version()
        offering = await first.create_offering("tiny")
        version = await get_version(first, "models/tiny/versions/1")

    async with running_catalog(dsn) as second:
        second.clock.advance(3600)
        assert await get_version(second, version.name) == version
        assert await second.create_offering("tiny") == offering


async def look_up(catalog: Catalog, name: str) -> model_pb2.ModelVersion:
    stub = model_service_pb2_grpc.ModelServiceStub(catalog.gateway.channel)
    request = pb.LookUpModelVersionRequest(name=name)
    return (await catalog.gateway.call(stub.LookUpModelVersion, request)).model_version


async def test_a_service_looks_a_version_up(catalog: Catalog) -> None:
    """Which services may is said in test_authorization.py."""
    await catalog.create_model("tiny")
    made = await catalog.create_version("tiny", "1", VERSION)

    got = await look_up(catalog, "models/tiny/versions/1")

    assert got == made
    assert got.digest == DIGEST


@pytest.mark.parametrize("name", ["models/tiny/versions/2", "models/other/versions/1"])
async def test_a_version_that_there_is_not_is_not_found(catalog: Catalog, name: str) -> None:
    await catalog.create_model("tiny")
    await catalog.create_version("tiny", "1", VERSION)

    with pytest.raises(NotFound):
        await look_up(catalog, name)
    with pytest.raises(InvalidArgument):
        await look_up(catalog, "tiny")
