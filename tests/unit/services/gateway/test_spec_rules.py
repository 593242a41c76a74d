"""Rules between the fields of a spec."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.protobuf.duration_pb2 import Duration
from maas.inference.v1 import constraint_pb2, generation_pb2, tools_pb2

from libs.errors import FieldRule, InvalidArgument
from services.gateway import spec_rules

Spec = generation_pb2.GenerationSpec
REQUIRED = tools_pb2.TOOL_MODE_REQUIRED


def text_spec() -> Spec:
    return Spec(model="m", text="x")


def chat_spec(*, role: generation_pb2.Role.ValueType = generation_pb2.ROLE_USER) -> Spec:
    message = generation_pb2.ChatMessage(role=role)
    message.parts.add(text="x")
    return Spec(model="m", chat=generation_pb2.ChatInput(messages=[message]))


def tools(mode: tools_pb2.ToolMode.ValueType = tools_pb2.TOOL_MODE_AUTO) -> tools_pb2.ToolOptions:
    return tools_pb2.ToolOptions(tools=[tools_pb2.Tool(name="f")], mode=mode)


def change(spec: Spec, make: Callable[[Spec], object]) -> Spec:
    make(spec)
    return spec


def json_object() -> constraint_pb2.OutputConstraint:
    return constraint_pb2.OutputConstraint(json_object=constraint_pb2.JsonObject())


def too_few(spec: Spec) -> None:
    spec.stop.min_output_tokens = 5
    spec.stop.max_output_tokens = 4


def unscored(spec: Spec) -> None:
    spec.output.top_logprobs = 2


def lasting(seconds: int, nanos: int = 0) -> Callable[[Spec], object]:
    return lambda spec: spec.max_duration.CopyFrom(Duration(seconds=seconds, nanos=nanos))


def constrained_call(spec: Spec) -> None:
    spec.tools.CopyFrom(tools(REQUIRED))
    spec.constraint.CopyFrom(json_object())


def continued_call(spec: Spec) -> None:
    spec.tools.CopyFrom(tools(REQUIRED))
    spec.chat.continue_last_message = True


ASSISTANT = generation_pb2.ROLE_ASSISTANT
BAD = [
    (Spec(model="m"), "spec.input", FieldRule.REQUIRED),
    (change(text_spec(), too_few), "spec.stop.min_output_tokens", FieldRule.OUT_OF_RANGE),
    (change(text_spec(), unscored), "spec.output.top_logprobs", FieldRule.CONFLICTING),
    (change(text_spec(), lasting(0)), "spec.max_duration", FieldRule.OUT_OF_RANGE),
    (change(text_spec(), lasting(0, 999_999)), "spec.max_duration", FieldRule.OUT_OF_RANGE),
    (change(text_spec(), lasting(-1)), "spec.max_duration", FieldRule.OUT_OF_RANGE),
    (change(text_spec(), lasting(86_400, 1)), "spec.max_duration", FieldRule.OUT_OF_RANGE),
    (
        change(text_spec(), lambda s: s.constraint.SetInParent()),
        "spec.constraint",
        FieldRule.REQUIRED,
    ),
    (change(chat_spec(), constrained_call), "spec.constraint", FieldRule.CONFLICTING),
    (
        change(chat_spec(role=ASSISTANT), continued_call),
        "spec.chat.continue_last_message",
        FieldRule.CONFLICTING,
    ),
    (change(text_spec(), lambda s: s.tools.CopyFrom(tools())), "spec.tools", FieldRule.CONFLICTING),
    (
        change(text_spec(), lambda s: s.reasoning.SetInParent()),
        "spec.reasoning",
        FieldRule.CONFLICTING,
    ),
]


@pytest.mark.parametrize(
    ("spec", "path", "rule"), BAD, ids=[f"{path} {rule}" for _, path, rule in BAD]
)
def test_what_does_not_go_together_is_refused_with_its_path(
    spec: Spec, path: str, rule: FieldRule
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        spec_rules.check(spec)

    assert [(item.field, item.rule) for item in caught.value.violations] == [(path, rule)]


def enough(spec: Spec) -> None:
    spec.stop.min_output_tokens = spec.stop.max_output_tokens = 4


def scored(spec: Spec) -> None:
    spec.output.return_logprobs = True
    spec.output.top_logprobs = 2


def constrained_choice(spec: Spec) -> None:
    spec.tools.CopyFrom(tools())
    spec.constraint.CopyFrom(json_object())


@pytest.mark.parametrize(
    "spec",
    [
        text_spec(),
        chat_spec(),
        Spec(model="m", tokens=generation_pb2.TokenIds(ids=[1])),
        change(text_spec(), enough),
        change(text_spec(), scored),
        change(text_spec(), lasting(0, 1_000_000)),
        change(text_spec(), lasting(86_400)),
        change(chat_spec(), constrained_choice),
        change(chat_spec(), lambda s: s.tools.CopyFrom(tools(REQUIRED))),
    ],
)
def test_what_goes_together_passes(spec: Spec) -> None:
    spec_rules.check(spec)


def test_tools_that_the_model_is_not_told_of_are_none() -> None:
    spec = change(chat_spec(), lambda s: s.tools.CopyFrom(tools(tools_pb2.TOOL_MODE_NONE)))

    assert not spec_rules.has_tools(spec)
    assert spec_rules.has_tools(change(chat_spec(), lambda s: s.tools.CopyFrom(tools())))
    assert not spec_rules.has_tools(chat_spec())


def test_numbers_of_a_spec() -> None:
    assert spec_rules.count_of(text_spec()) == 1
    assert spec_rules.max_duration_s(text_spec()) is None
    spec = change(text_spec(), lasting(1, 500_000_000))
    spec.output.count = 3
    assert (spec_rules.count_of(spec), spec_rules.max_duration_s(spec)) == (3, 1.5)
