"""libs/rpc/validation.py: the field limits of the contract.

Most cases use real requests; the rest use a contract made here, with every shape that the rules
know.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from maas.auth.v1 import api_key_service_pb2, tenancy_service_pb2
from maas.catalog.v1 import model_pb2, offering_service_pb2
from maas.common.v1 import options_pb2
from maas.inference.v1 import generation_pb2

from libs.errors import FieldRule, InvalidArgument
from libs.rpc.validation import VIOLATIONS_MAX, Validator

Field = descriptor_pb2.FieldDescriptorProto
MODEL_VERSION = "models/m/versions/1"


def field(
    name: str,
    number: int,
    kind: Field.Type.ValueType,
    *,
    label: Field.Label.ValueType = Field.LABEL_OPTIONAL,
    type_name: str = "",
    oneof: int | None = None,
    optional: bool = False,
    **rules: Any,
) -> Field:
    made = Field(name=name, number=number, type=kind, label=label)
    if type_name:
        made.type_name = type_name
    if oneof is not None:
        made.oneof_index = oneof
    made.proto3_optional = optional
    if rules:
        made.options.Extensions[options_pb2.rules].CopyFrom(options_pb2.FieldRules(**rules))
    return made


def contract() -> descriptor_pb2.FileDescriptorProto:
    part = descriptor_pb2.DescriptorProto(
        name="Part",
        field=[field("text", 1, Field.TYPE_STRING, required=True, max_bytes=4)],
    )
    whole = descriptor_pb2.DescriptorProto(
        name="Whole",
        field=[
            field("parts", 1, Field.TYPE_MESSAGE, label=Field.LABEL_REPEATED, type_name=".t.Part"),
            field(
                "few", 2, Field.TYPE_STRING, label=Field.LABEL_REPEATED, max_items=2, max_bytes=2
            ),
            field("needed", 3, Field.TYPE_INT32, label=Field.LABEL_REPEATED, required=True),
            field("text", 4, Field.TYPE_STRING, oneof=0, required=True),
            field("part", 5, Field.TYPE_MESSAGE, type_name=".t.Part", oneof=0, required=True),
            field("raw", 6, Field.TYPE_BYTES, max_bytes=3),
            field("share", 7, Field.TYPE_DOUBLE, gte=0, lte=1),
            field("count", 8, Field.TYPE_INT64, oneof=1, optional=True, required=True, gte=1),
            field("small", 9, Field.TYPE_FLOAT, lte=1),
        ],
        oneof_decl=[
            descriptor_pb2.OneofDescriptorProto(name="input"),
            descriptor_pb2.OneofDescriptorProto(name="_count"),
        ],
    )
    return descriptor_pb2.FileDescriptorProto(
        name="t.proto", package="t", syntax="proto3", message_type=[part, whole]
    )


@pytest.fixture(scope="module")
def whole() -> Any:
    """The message class "Whole": valid once `needed` and `count` are set."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(contract())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Whole"))


def violations(message: Any) -> list[tuple[str, FieldRule]]:
    try:
        Validator().check(message)
    except InvalidArgument as error:
        return [(item.field, item.rule) for item in error.violations]
    return []


def good(whole: Any, **fields: Any) -> Any:
    return whole(**{"needed": [1], "count": 1, **fields})


def test_good_message_passes(whole: Any) -> None:
    message = good(whole, parts=[{"text": "abcd"}], few=["a", "b"], text="x", raw=b"abc", share=1.0)

    assert violations(message) == []


def test_message_without_rules_costs_nothing() -> None:
    validator = Validator()

    validator.check(offering_service_pb2.WatchOfferingsRequest())

    assert validator._of(offering_service_pb2.WatchOfferingsRequest.DESCRIPTOR) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1.1])
def test_number_out_of_range_is_refused(whole: Any, value: float) -> None:
    assert violations(good(whole, share=value)) == [("share", FieldRule.OUT_OF_RANGE)]


def test_one_bound_is_enough_to_refuse_nan(whole: Any) -> None:
    assert violations(good(whole, small=math.nan)) == [("small", FieldRule.OUT_OF_RANGE)]
    assert violations(good(whole, small=-1e30)) == []


def test_absent_number_is_not_out_of_range(whole: Any) -> None:
    assert violations(whole(needed=[1])) == [("count", FieldRule.REQUIRED)]


def test_present_zero_is_checked(whole: Any) -> None:
    assert violations(good(whole, count=0)) == [("count", FieldRule.REQUIRED)]


def test_choice_that_is_not_taken_is_not_required(whole: Any) -> None:
    assert violations(good(whole)) == []


def test_choice_that_is_taken_has_to_be_filled(whole: Any) -> None:
    assert violations(good(whole, text="")) == [("text", FieldRule.REQUIRED)]
    assert violations(good(whole, part={})) == [("part.text", FieldRule.REQUIRED)]


def test_paths_lead_to_the_item(whole: Any) -> None:
    message = good(whole, parts=[{"text": "ok"}, {"text": ""}, {"text": "abcde"}])

    assert violations(message) == [
        ("parts[1].text", FieldRule.REQUIRED),
        ("parts[2].text", FieldRule.TOO_LONG),
    ]


def test_repeated_fields_are_bounded_in_number_and_size(whole: Any) -> None:
    assert violations(good(whole, few=["a", "b", "c"])) == [("few", FieldRule.TOO_MANY)]
    assert violations(good(whole, few=["a", "bbb"])) == [("few[1]", FieldRule.TOO_LONG)]
    assert violations(whole(count=1)) == [("needed", FieldRule.REQUIRED)]


def test_length_is_counted_in_bytes(whole: Any) -> None:
    assert violations(good(whole, parts=[{"text": "éé"}])) == []
    assert violations(good(whole, parts=[{"text": "ééa"}])) == [
        ("parts[0].text", FieldRule.TOO_LONG)
    ]
    assert violations(good(whole, raw=b"abcd")) == [("raw", FieldRule.TOO_LONG)]


def test_nul_is_refused_in_texts_and_welcome_in_bytes(whole: Any) -> None:
    assert violations(good(whole, parts=[{"text": "a\0"}])) == [
        ("parts[0].text", FieldRule.BAD_FORMAT)
    ]
    assert violations(good(whole, raw=b"\0")) == []


def test_violations_are_bounded(whole: Any) -> None:
    message = good(whole, parts=[{"text": ""}] * 1000)

    assert len(violations(message)) == VIOLATIONS_MAX


def test_message_names_the_first_bad_field_and_no_value() -> None:
    request = tenancy_service_pb2.CreateOrganizationRequest(organization_id="Secret Name")

    with pytest.raises(InvalidArgument) as caught:
        Validator().check(request)

    assert caught.value.metadata == {"field": "organization_id"}
    assert "Secret" not in caught.value.message


def test_unknown_enum_value_is_refused() -> None:
    request = api_key_service_pb2.CreateApiKeyRequest(role=9)  # type: ignore[arg-type]  # the point

    assert violations(request) == [("role", FieldRule.UNKNOWN_ENUM)]


@pytest.mark.parametrize(
    ("offering", "want"),
    [
        (model_pb2.Offering(model_version=MODEL_VERSION), []),
        (
            model_pb2.Offering(default_temperature=math.nan, default_top_p=2),
            [
                ("offering.default_temperature", FieldRule.OUT_OF_RANGE),
                ("offering.default_top_p", FieldRule.OUT_OF_RANGE),
            ],
        ),
    ],
)
def test_rules_of_a_resource_hold_inside_a_request(
    offering: model_pb2.Offering, want: list[tuple[str, FieldRule]]
) -> None:
    request = offering_service_pb2.CreateOfferingRequest(offering_id="o", offering=offering)

    assert violations(request) == want


def test_required_message_has_to_be_there() -> None:
    request = offering_service_pb2.CreateOfferingRequest(offering_id="o")

    assert violations(request) == [("offering", FieldRule.REQUIRED)]


def test_map_is_bounded_in_number_keys_and_values() -> None:
    spec = generation_pb2.GenerationSpec
    many = {f"k{number}": "" for number in range(17)}

    assert violations(spec(model="m", labels={"team": "a" * 256})) == []
    assert violations(spec(model="m", labels=many)) == [("labels", FieldRule.TOO_MANY)]
    assert violations(spec(model="m", labels={"team": "a" * 257})) == [
        ("labels[team]", FieldRule.TOO_LONG)
    ]


def test_bad_key_of_a_map_is_named_by_its_place_and_not_repeated() -> None:
    message = generation_pb2.GenerationSpec(model="m", labels={"a": "", "Secret Name": ""})

    assert violations(message) == [("labels.key[0]", FieldRule.BAD_FORMAT)]


@pytest.mark.parametrize("value", [100.5, -101.0, math.nan, math.inf])
def test_number_in_a_map_has_bounds(value: float) -> None:
    message = generation_pb2.SamplingOptions(logit_bias={7: 100.0, 9: value})

    assert violations(message) == [("logit_bias[9]", FieldRule.OUT_OF_RANGE)]


def test_path_leads_into_a_map_of_a_nested_message() -> None:
    message = generation_pb2.GenerationSpec(
        model="m", sampling=generation_pb2.SamplingOptions(logit_bias={3: 1000})
    )

    assert violations(message) == [("sampling.logit_bias[3]", FieldRule.OUT_OF_RANGE)]


def test_items_of_items_are_bounded_together() -> None:
    message = generation_pb2.ChatMessage(role=generation_pb2.ROLE_USER)
    message.parts.extend([generation_pb2.ContentPart(text="x")] * 1000)
    few = generation_pb2.ChatInput(messages=[message] * 16)
    many = generation_pb2.ChatInput(messages=[message] * 17)

    assert violations(few) == []
    assert violations(many) == [("messages[16].parts", FieldRule.TOO_MANY)]
