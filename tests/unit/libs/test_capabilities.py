"""libs/capabilities.py: what a model can do, held against what a request asks for."""

from __future__ import annotations

from typing import Any

import pytest
from maas.common.v1 import capabilities_pb2
from maas.inference.v1 import (
    constraint_pb2,
    embedding_service_pb2,
    generation_pb2,
    tools_pb2,
)

from libs.capabilities import FLAGS, NUMBERS, intersection, needs, require
from libs.errors import FieldRule, InvalidArgument, Reason

# What a client may know, but no field depends on.
INFORMATION = {"prompt_cache", "deterministic"}
ALL = capabilities_pb2.Capabilities()
for _flag in FLAGS:
    setattr(ALL, _flag, 8 if _flag in NUMBERS else True)
NOTHING = capabilities_pb2.Capabilities()


def spec(**fields: Any) -> generation_pb2.GenerationSpec:
    return generation_pb2.GenerationSpec(model="m", text="x", **fields)


def refusal(message: generation_pb2.GenerationSpec, **flags: Any) -> InvalidArgument:
    capabilities = capabilities_pb2.Capabilities()
    capabilities.CopyFrom(ALL)
    for flag, value in flags.items():
        setattr(capabilities, flag, value)
    with pytest.raises(InvalidArgument) as caught:
        require(message, capabilities, model="offerings/m", prefix="spec")
    return caught.value


def test_every_need_names_a_flag_and_every_flag_is_needed() -> None:
    found = needs(generation_pb2.GenerationSpec.DESCRIPTOR)
    found += needs(embedding_service_pb2.EmbedRequest.DESCRIPTOR)

    assert {need.flag for need in found} == set(FLAGS) - INFORMATION


def test_needs_lead_into_lists() -> None:
    found = {need.path: need.flag for need in needs(generation_pb2.GenerationSpec.DESCRIPTOR)}

    assert found["tools.tools[].strict"] == "strict_tools"
    assert found["sampling.min_p"] == "min_p"
    assert found["chat"] == "chat"


def test_request_that_asks_for_nothing_special_needs_nothing() -> None:
    message = spec(
        sampling=generation_pb2.SamplingOptions(temperature=1, top_p=0.5, top_k=3, seed=1),
        output=generation_pb2.OutputOptions(count=1, return_token_ids=True),
    )

    require(message, NOTHING, model="offerings/m", prefix="spec")


def test_request_passes_where_everything_is_there() -> None:
    message = spec(
        sampling=generation_pb2.SamplingOptions(min_p=0.1, logit_bias={1: 2}),
        output=generation_pb2.OutputOptions(count=8, return_logprobs=True, top_logprobs=8),
        adapter="adapters/a",
        constraint=constraint_pb2.OutputConstraint(regex="a+"),
    )

    require(message, ALL, model="offerings/m", prefix="spec")


def test_refusal_names_model_flag_and_path() -> None:
    error = refusal(
        spec(sampling=generation_pb2.SamplingOptions(presence_penalty=0)), penalties=False
    )

    assert error.reason is Reason.FEATURE_UNSUPPORTED
    assert error.metadata == {"model": "offerings/m", "feature": "penalties"}
    assert [(found.field, found.rule) for found in error.violations] == [
        ("spec.sampling.presence_penalty", FieldRule.UNSUPPORTED)
    ]


def test_item_of_a_list_is_named_by_its_place() -> None:
    tools = tools_pb2.ToolOptions(
        tools=[tools_pb2.Tool(name="a"), tools_pb2.Tool(name="b", strict=True)]
    )

    error = refusal(spec(tools=tools), strict_tools=False)

    assert error.violations[0].field == "spec.tools.tools[1].strict"


def test_empty_choice_of_a_oneof_is_asked_for_too() -> None:
    constraint = constraint_pb2.OutputConstraint(json_object=constraint_pb2.JsonObject())

    error = refusal(spec(constraint=constraint), json_object=False)

    assert error.violations[0].field == "spec.constraint.json_object"


@pytest.mark.parametrize(
    ("most", "asked", "reason"),
    [(0, 1, Reason.FEATURE_UNSUPPORTED), (4, 5, Reason.INVALID_FIELD)],
)
def test_number_is_a_limit(most: int, asked: int, reason: Reason) -> None:
    message = spec(output=generation_pb2.OutputOptions(return_logprobs=True, top_logprobs=asked))

    error = refusal(message, max_top_logprobs=most)

    assert error.reason is reason
    assert error.violations[0].field == "spec.output.top_logprobs"


def test_one_output_is_always_there_and_two_are_out_of_range() -> None:
    require(spec(output=generation_pb2.OutputOptions(count=1)), NOTHING, model="m", prefix="spec")

    error = refusal(spec(output=generation_pb2.OutputOptions(count=2)), max_outputs=0)

    assert error.violations[0].rule is FieldRule.OUT_OF_RANGE


def test_path_of_a_whole_request_has_no_prefix() -> None:
    message = embedding_service_pb2.EmbedRequest(model="m", dimensions=3)

    with pytest.raises(InvalidArgument) as caught:
        require(message, NOTHING, model="m", prefix="")

    assert caught.value.violations[0].field == "dimensions"


def test_intersection_is_what_all_can_do() -> None:
    one = capabilities_pb2.Capabilities(chat=True, regex=True, max_outputs=4)
    other = capabilities_pb2.Capabilities(chat=True, min_p=True, max_outputs=16)

    assert intersection([one, other]) == capabilities_pb2.Capabilities(chat=True, max_outputs=4)
    assert intersection([one]) == one
    with pytest.raises(ValueError, match="nobody"):
        intersection([])
