"""services/catalog: offerings, from the wire to PostgreSQL."""

from __future__ import annotations

import math
from typing import Any

import pytest
from maas.catalog.v1 import model_pb2
from maas.catalog.v1 import offering_service_pb2 as pb

from libs.errors import AlreadyExists, FieldRule, InvalidArgument, NotFound, Reason
from libs.testing.clock import START
from tests.integration.services.catalog.harness import Catalog

VERSION = "models/tiny/versions/1"


async def get_offering(catalog: Catalog, name: str) -> model_pb2.Offering:
    request = pb.GetOfferingRequest(name=name)
    return (await catalog.tenant.call(catalog.offerings.GetOffering, request)).offering


async def test_offering_shows_what_its_version_says(catalog: Catalog) -> None:
    await catalog.create_model("tiny")
    version = model_pb2.ModelVersion(
        context_length=2048, prompt_overhead_tokens=5, message_overhead_tokens=4
    )
    await catalog.create_version("tiny", "1", version)

    made = await catalog.create_offering(
        "tiny-chat",
        model_pb2.Offering(
            display_name="Tiny",
            model_version=VERSION,
            default_max_output_tokens=64,
            default_temperature=0.5,
            default_top_p=0.9,
            default_top_k=40,
            # Output only: of no account.
            name="offerings/other",
            context_length=1,
        ),
    )

    want = model_pb2.Offering(
        name="offerings/tiny-chat",
        display_name="Tiny",
        model_version=VERSION,
        default_max_output_tokens=64,
        default_temperature=0.5,
        default_top_p=0.9,
        default_top_k=40,
        context_length=2048,
        prompt_overhead_tokens=5,
        message_overhead_tokens=4,
    )
    want.create_time.FromDatetime(START)
    assert made == want
    assert await get_offering(catalog, "offerings/tiny-chat") == want


async def test_offering_that_says_nothing_has_512_output_tokens(catalog: Catalog) -> None:
    await catalog.prepare_version()

    made = await catalog.create_offering("tiny")

    assert made.default_max_output_tokens == 512
    assert not made.HasField("default_temperature")
    assert not made.HasField("default_top_p")
    assert not made.HasField("default_top_k")


async def test_zero_is_a_default_like_any_other(catalog: Catalog) -> None:
    await catalog.prepare_version()
    offering = model_pb2.Offering(
        model_version=VERSION, default_temperature=0, default_top_p=0, default_top_k=0
    )

    await catalog.create_offering("tiny", offering)

    got = await get_offering(catalog, "offerings/tiny")
    assert got.HasField("default_temperature")
    assert got.HasField("default_top_p")
    assert got.HasField("default_top_k")


async def test_creating_an_equal_offering_again_returns_the_first(catalog: Catalog) -> None:
    await catalog.prepare_version()
    first = await catalog.create_offering("tiny")
    catalog.clock.advance(60)

    spelled_out = model_pb2.Offering(model_version=VERSION, default_max_output_tokens=512)

    assert await catalog.create_offering("tiny") == first
    assert await catalog.create_offering("tiny", spelled_out) == first


async def test_creating_another_offering_of_the_same_name_is_refused(catalog: Catalog) -> None:
    await catalog.prepare_version()
    await catalog.create_version("tiny", "2")
    first = await catalog.create_offering("tiny")
    others = [
        model_pb2.Offering(model_version=VERSION, display_name="Other"),
        model_pb2.Offering(model_version=VERSION, default_max_output_tokens=1),
        # Zero is a value, absent is none.
        model_pb2.Offering(model_version=VERSION, default_temperature=0),
        model_pb2.Offering(model_version="models/tiny/versions/2"),
    ]

    for other in others:
        with pytest.raises(AlreadyExists) as caught:
            await catalog.create_offering("tiny", other)
        assert caught.value.metadata == {"resource": "offerings/tiny"}

    assert await get_offering(catalog, "offerings/tiny") == first


async def test_offering_of_an_unknown_version_names_the_version(catalog: Catalog) -> None:
    await catalog.create_model("tiny")

    with pytest.raises(NotFound) as caught:
        await catalog.create_offering("tiny")

    assert caught.value.metadata == {"resource": VERSION}


async def test_bad_fields_of_an_offering_are_named(catalog: Catalog) -> None:
    def offering(**fields: Any) -> model_pb2.Offering:
        return model_pb2.Offering(**{"model_version": VERSION, **fields})

    wanted = [
        (offering(model_version=""), "model_version", FieldRule.BAD_FORMAT),
        (offering(model_version="models/tiny"), "model_version", FieldRule.BAD_FORMAT),
        (offering(display_name="a" * 129), "display_name", FieldRule.TOO_LONG),
        (offering(display_name="\0"), "display_name", FieldRule.BAD_FORMAT),
        (offering(default_temperature=math.nan), "default_temperature", FieldRule.OUT_OF_RANGE),
        (offering(default_top_p=1.1), "default_top_p", FieldRule.OUT_OF_RANGE),
        (
            offering(default_max_output_tokens=2**31),
            "default_max_output_tokens",
            FieldRule.OUT_OF_RANGE,
        ),
    ]
    for bad, field, rule in wanted:
        with pytest.raises(InvalidArgument) as caught:
            await catalog.create_offering("tiny", bad)
        assert [(item.field, item.rule) for item in caught.value.violations] == [
            (f"offering.{field}", rule)
        ]


async def test_unknown_offering_is_not_found(catalog: Catalog) -> None:
    with pytest.raises(NotFound) as caught:
        await get_offering(catalog, "offerings/none")

    assert caught.value.reason is Reason.RESOURCE_NOT_FOUND


async def test_tenants_list_offerings_by_name(catalog: Catalog) -> None:
    await catalog.prepare_version()
    for offering_id in ("b", "B", "a"):
        await catalog.create_offering(offering_id)

    first = await catalog.tenant.call(
        catalog.offerings.ListOfferings, pb.ListOfferingsRequest(page_size=2)
    )
    second = await catalog.tenant.call(
        catalog.offerings.ListOfferings,
        pb.ListOfferingsRequest(page_size=2, page_token=first.next_page_token),
    )

    assert [item.name for item in first.offerings] == ["offerings/B", "offerings/a"]
    assert [item.name for item in second.offerings] == ["offerings/b"]
    assert second.next_page_token == ""
