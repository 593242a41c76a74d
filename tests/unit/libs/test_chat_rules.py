"""libs/chat_rules.py: what is wrong with a conversation, and where."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, tools_pb2

from libs import chat_rules
from libs.chat_rules import JsonRefused, check_spec, parse_object
from libs.errors import FieldRule, InvalidArgument

SYSTEM = generation_pb2.ROLE_SYSTEM
USER = generation_pb2.ROLE_USER
ASSISTANT = generation_pb2.ROLE_ASSISTANT
TOOL = generation_pb2.ROLE_TOOL
Spec = generation_pb2.GenerationSpec
Change = Callable[[Spec], object]


def conversation() -> Spec:
    """A request with everything that is checked, and nothing wrong."""
    spec = Spec()
    for role in (SYSTEM, USER, ASSISTANT, TOOL):
        spec.chat.messages.add(role=role).parts.add(text="x")
    spec.chat.messages[2].parts.add(reasoning="hm")
    spec.chat.messages[2].tool_calls.add(id="1", name="f", arguments_json="{}")
    spec.chat.messages[3].tool_call_id = "1"
    spec.chat.template_variables_json = '{"language": "en"}'
    spec.tools.tools.add(name="f", parameters_json_schema='{"type": "object"}')
    spec.tools.tools.add(name="g")
    return spec


def violations(spec: Spec) -> list[tuple[str, FieldRule]]:
    with pytest.raises(InvalidArgument) as refused:
        check_spec(spec)
    assert refused.value.metadata["field"] == refused.value.violations[0].field
    return [(found.field, found.rule) for found in refused.value.violations]


def test_what_is_right_is_accepted_on_both_hops() -> None:
    spec = conversation()

    check_spec(spec)
    check_spec(engine_pb2.Execution(chat=spec.chat, tools=spec.tools))
    check_spec(Spec(text="x"))
    check_spec(Spec())


def test_calls_alone_are_a_message() -> None:
    spec = conversation()
    del spec.chat.messages[2].parts[:]

    check_spec(spec)


def no_parts(spec: Spec, place: int) -> None:
    del spec.chat.messages[place].parts[:]


def variables(text: str) -> Change:
    return lambda spec: setattr(spec.chat, "template_variables_json", text)


@pytest.mark.parametrize(
    ("change", "path", "rule"),
    [
        (lambda s: no_parts(s, 1), "chat.messages[1].parts", FieldRule.REQUIRED),
        (lambda s: no_parts(s, 3), "chat.messages[3].parts", FieldRule.REQUIRED),
        (
            lambda s: s.chat.messages[3].ClearField("tool_call_id"),
            "chat.messages[3].tool_call_id",
            FieldRule.REQUIRED,
        ),
        (
            lambda s: setattr(s.chat.messages[1], "tool_call_id", "1"),
            "chat.messages[1].tool_call_id",
            FieldRule.CONFLICTING,
        ),
        (
            lambda s: s.chat.messages[1].tool_calls.add(id="2", name="f", arguments_json="{}"),
            "chat.messages[1].tool_calls",
            FieldRule.CONFLICTING,
        ),
        (
            lambda s: s.chat.messages[2].tool_calls.add(id="1", name="f", arguments_json="{}"),
            "chat.messages[2].tool_calls[1].id",
            FieldRule.CONFLICTING,
        ),
        (
            lambda s: s.chat.messages[2].tool_calls.add(id="2", name="f", arguments_json="[]"),
            "chat.messages[2].tool_calls[1].arguments_json",
            FieldRule.BAD_FORMAT,
        ),
        (
            lambda s: s.chat.messages[0].parts.add(reasoning="hm"),
            "chat.messages[0].parts[1].reasoning",
            FieldRule.CONFLICTING,
        ),
        (lambda s: s.tools.tools.add(name="f"), "tools.tools[2].name", FieldRule.CONFLICTING),
        (
            lambda s: s.tools.tools.add(name="h", parameters_json_schema="true"),
            "tools.tools[2].parameters_json_schema",
            FieldRule.BAD_FORMAT,
        ),
        (
            lambda s: setattr(s.tools, "required_tool", "f"),
            "tools.required_tool",
            FieldRule.CONFLICTING,
        ),
        (
            lambda s: s.tools.MergeFrom(
                tools_pb2.ToolOptions(mode=tools_pb2.TOOL_MODE_REQUIRED, required_tool="h")
            ),
            "tools.required_tool",
            FieldRule.CONFLICTING,
        ),
        (
            lambda s: s.tools.CopyFrom(tools_pb2.ToolOptions(mode=tools_pb2.TOOL_MODE_REQUIRED)),
            "tools.tools",
            FieldRule.REQUIRED,
        ),
        (lambda s: setattr(s, "text", "x"), "tools", FieldRule.CONFLICTING),
        (
            lambda s: setattr(s.chat, "continue_last_message", True),
            "chat.continue_last_message",
            FieldRule.CONFLICTING,
        ),
        (variables("{"), "chat.template_variables_json", FieldRule.BAD_FORMAT),
        (variables('["language"]'), "chat.template_variables_json", FieldRule.BAD_FORMAT),
        (variables('{"a": NaN}'), "chat.template_variables_json", FieldRule.BAD_FORMAT),
        (variables('{"a b": 1}'), "chat.template_variables_json", FieldRule.BAD_FORMAT),
        (variables('{"_tick": 1}'), "chat.template_variables_json", FieldRule.BAD_FORMAT),
        (variables('{"messages": []}'), "chat.template_variables_json", FieldRule.CONFLICTING),
        (variables('{"bos_token": ""}'), "chat.template_variables_json", FieldRule.CONFLICTING),
        (
            variables('{"a": ' + "[" * 32 + "]" * 32 + "}"),
            "chat.template_variables_json",
            FieldRule.BAD_FORMAT,
        ),
        (
            variables('{"a": ' + "[" * 30_000),
            "chat.template_variables_json",
            FieldRule.BAD_FORMAT,
        ),
    ],
)
def test_each_fault_is_refused_with_its_path(change: Change, path: str, rule: FieldRule) -> None:
    spec = conversation()
    change(spec)

    assert violations(spec) == [(f"spec.{path}", rule)]


Text = generation_pb2.ContentPart


@pytest.mark.parametrize(
    ("role", "parts", "has_call", "is_right"),
    [
        (ASSISTANT, [Text(text="One")], False, True),
        (ASSISTANT, [Text(text="")], False, True),
        (ASSISTANT, [Text(reasoning="hm"), Text(text="One")], False, True),
        (USER, [Text(text="One")], False, False),
        (ASSISTANT, [Text(reasoning="hm")], False, False),
        (ASSISTANT, [Text(text="One")], True, False),
    ],
)
def test_only_text_of_the_assistant_is_continued(
    role: generation_pb2.Role.ValueType, parts: list[Text], *, has_call: bool, is_right: bool
) -> None:
    spec = conversation()
    last = spec.chat.messages.add(role=role, parts=parts)
    if has_call:
        last.tool_calls.add(id="2", name="f", arguments_json="{}")
    spec.chat.continue_last_message = True

    if is_right:
        check_spec(spec)
        # There is no call to be made in the middle of a text.
        spec.tools.mode = tools_pb2.TOOL_MODE_REQUIRED
    assert violations(spec) == [("spec.chat.continue_last_message", FieldRule.CONFLICTING)]


@pytest.mark.parametrize("name", ["enable_thinking", "thinking", "reasoning_effort"])
def test_a_variable_and_an_option_may_not_say_the_same(name: str) -> None:
    spec = conversation()
    spec.chat.template_variables_json = json.dumps({name: True})
    check_spec(spec)

    spec.reasoning.enabled = True
    spec.reasoning.effort = generation_pb2.REASONING_EFFORT_LOW

    assert violations(spec) == [("spec.chat.template_variables_json", FieldRule.CONFLICTING)]


def test_reasoning_needs_a_conversation() -> None:
    spec = Spec(text="x")
    spec.reasoning.enabled = False

    assert violations(spec) == [("spec.reasoning", FieldRule.CONFLICTING)]


def test_what_a_conversation_consists_of_is_counted_before_it_is_looked_at() -> None:
    spec = generation_pb2.GenerationSpec()
    for _ in range(16):
        message = spec.chat.messages.add(role=generation_pb2.ROLE_USER)
        message.parts.extend([generation_pb2.ContentPart(text="")] * 1023)
    check_spec(spec)
    assert chat_rules.pieces_of(spec.chat) == chat_rules.PIECES_MAX

    # Its own fault is one of the last pieces, which nobody looks at any more.
    spec.chat.messages.add(role=generation_pb2.ROLE_TOOL)
    with pytest.raises(InvalidArgument) as refused:
        check_spec(spec)

    (violation,) = refused.value.violations
    assert (violation.field, violation.rule) == ("spec.chat.messages", FieldRule.TOO_MANY)


def test_all_faults_are_named_up_to_a_bound() -> None:
    spec = conversation()
    for _ in range(100):
        spec.chat.messages.add(role=USER)

    found = violations(spec)

    assert len(found) == chat_rules.VIOLATIONS_MAX
    assert found[0] == ("spec.chat.messages[4].parts", FieldRule.REQUIRED)


def test_the_values_of_all_json_texts_are_counted_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat_rules, "JSON_VALUES_MAX", 100)
    spec = conversation()
    spec.tools.tools[0].parameters_json_schema = json.dumps({"enum": [0] * 60})
    check_spec(spec)

    spec.tools.tools[1].parameters_json_schema = json.dumps({"enum": [0] * 60})

    assert violations(spec) == [("spec.tools.tools[1].parameters_json_schema", FieldRule.TOO_MANY)]


def test_nothing_that_was_typed_is_repeated() -> None:
    spec = conversation()
    spec.chat.template_variables_json = '{"secret word": "secret"}'
    spec.tools.tools.add(name="secret", parameters_json_schema="secret")
    spec.tools.tools.add(name="secret", parameters_json_schema="{secret}")

    with pytest.raises(InvalidArgument) as refused:
        check_spec(spec)

    assert len(refused.value.violations) == 4
    assert "secret" not in str(refused.value)
    assert not any("secret" in found.description for found in refused.value.violations)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=3), json_values))
def test_objects_are_parsed_as_they_were_written(value: chat_rules.JsonObject) -> None:
    assert parse_object(json.dumps(value)) == value


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from(["[{}]", '{{"a":{}}}']))
def test_depth_is_that_of_the_deepest_value(depth: int, most: int, form: str) -> None:
    text = "0"
    for _ in range(depth - 1):
        text = form.replace("{}", text) if form[0] == "[" else form.format(text)
    text = f'{{"a": 1, "b": {text}}}'

    if depth <= most:
        assert parse_object(text, depth_max=most)
    else:
        with pytest.raises(JsonRefused, match="deeper"):
            parse_object(text, depth_max=most)
