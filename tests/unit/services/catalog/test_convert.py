"""services/catalog/convert.py: messages to domain values and back."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st
from maas.catalog.v1 import model_pb2, model_service_pb2, offering_service_pb2

from services.catalog import convert
from services.catalog.domain import (
    OUTPUT_TOKENS_DEFAULT,
    BoundOffering,
    Model,
    ModelVersion,
    Offering,
    is_repeat,
)

NOW = datetime(2026, 1, 1, 12, 30, 15, 123456, tzinfo=UTC)

ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
counts = st.integers(0, 65536)
models = st.builds(
    Model,
    model_id=ids,
    display_name=texts,
    license=texts,
    description=texts,
    create_time=st.just(NOW),
)
versions = st.builds(
    ModelVersion,
    model_id=ids,
    version_id=ids,
    digest=st.just("") | st.just("sha256:" + "0" * 64),
    context_length=st.integers(1, 2**24),
    prompt_overhead_tokens=counts,
    message_overhead_tokens=counts,
    create_time=st.just(NOW),
)
offerings = st.builds(
    Offering,
    offering_id=ids,
    display_name=texts,
    model_id=ids,
    version_id=ids,
    default_max_output_tokens=st.integers(1, 2**20),
    default_temperature=st.none() | st.floats(0, 2),
    default_top_p=st.none() | st.floats(0, 1),
    default_top_k=st.none() | counts,
    create_time=st.just(NOW),
)


@given(models)
def test_model_survives_the_wire(model: Model) -> None:
    message = convert.model_to_pb(model)
    request = model_service_pb2.CreateModelRequest(
        model_id=message.name.removeprefix("models/"),
        display_name=message.display_name,
        license=message.license,
        description=message.description,
    )

    now = message.create_time.ToDatetime(tzinfo=UTC)
    assert convert.model_from_pb(request, now) == model


@given(versions)
def test_version_survives_the_wire(version: ModelVersion) -> None:
    request = model_service_pb2.CreateModelVersionRequest(
        parent=f"models/{version.model_id}",
        model_version_id=version.version_id,
        model_version=convert.version_to_pb(version),
    )

    assert convert.version_from_pb(request, NOW) == version


@given(offerings, versions)
def test_offering_survives_the_wire(offering: Offering, version: ModelVersion) -> None:
    bound = BoundOffering(offering=offering, version=version, revision=1)
    request = offering_service_pb2.CreateOfferingRequest(
        offering_id=offering.offering_id, offering=convert.offering_to_pb(bound)
    )

    assert convert.offering_from_pb(request, NOW) == offering


def test_offering_without_output_tokens_gets_the_default() -> None:
    request = offering_service_pb2.CreateOfferingRequest(
        offering_id="o", offering=model_pb2.Offering(model_version="models/m/versions/1")
    )

    got = convert.offering_from_pb(request, NOW)

    assert got.default_max_output_tokens == OUTPUT_TOKENS_DEFAULT == 512


@given(models | versions | offerings)
def test_same_content_at_another_time_is_a_repeat(made: Model | ModelVersion | Offering) -> None:
    later = dataclasses.replace(made, create_time=NOW + timedelta(days=1))

    assert is_repeat(later, made)


@given(offerings)
def test_other_content_is_no_repeat(made: Offering) -> None:
    other = dataclasses.replace(made, default_max_output_tokens=made.default_max_output_tokens + 1)

    assert not is_repeat(other, made)
