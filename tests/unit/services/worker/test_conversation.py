"""From messages, tools and options to what templates take."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, tools_pb2

from libs.errors import InvalidArgument, Reason
from services.worker import templates
from services.worker.chat import ChatTemplate, Habits
from services.worker.conversation import conversation_of, plain_turns

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
ASSISTANT = generation_pb2.ROLE_ASSISTANT
USER = generation_pb2.ROLE_USER


def habits(source: str) -> Habits:
    return ChatTemplate(source, {}, lambda: NOON).habits


EVERYTHING = habits(templates.load("chatml_tools"))


def asked() -> engine_pb2.Execution:
    execution = engine_pb2.Execution(model_version="models/m/versions/1")
    execution.chat.messages.add(role=USER).parts.add(text="hi")
    return execution


def with_call() -> engine_pb2.Execution:
    execution = asked()
    call = execution.chat.messages.add(role=ASSISTANT)
    call.tool_calls.add(id="1", name="f", arguments_json='{"b": 1, "a": [2.5, null]}')
    return execution


def test_messages_have_the_fields_that_apply_and_no_others() -> None:
    execution = with_call()
    execution.chat.messages[0].name = "Ada"
    thinking = execution.chat.messages[1]
    for text in ("Let me ", "see."):
        thinking.parts.add(reasoning=text)
    result = execution.chat.messages.add(role=generation_pb2.ROLE_TOOL, tool_call_id="1")
    for text in ("4", "2"):
        result.parts.add(text=text)

    function = {"name": "f", "arguments": {"b": 1, "a": [2.5, None]}}
    assert conversation_of(execution, EVERYTHING).messages == [
        {"role": "user", "content": "hi", "name": "Ada"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Let me see.",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]


@pytest.mark.parametrize(
    ("source", "role"),
    [(PLAIN, "system"), ("{% if messages[0].role == 'developer' %}{% endif %}", "developer")],
)
def test_a_developer_is_the_system_for_templates_that_do_not_know_better(
    source: str, role: str
) -> None:
    execution = asked()
    execution.chat.messages[0].role = generation_pb2.ROLE_DEVELOPER

    assert conversation_of(execution, habits(source)).messages[0]["role"] == role


@pytest.mark.parametrize(
    "source",
    ["{% if m.content is none %}tool_calls", "{% if m['content'] is not none %}tool_calls"],
)
def test_a_call_without_text_has_no_content_where_the_template_asks(source: str) -> None:
    known = habits(source + "{% endif %}")

    assert conversation_of(with_call(), known).messages[1]["content"] is None
    assert conversation_of(with_call(), EVERYTHING).messages[1]["content"] == ""


def test_tools_are_functions_with_their_schemas() -> None:
    execution = asked()
    schema = '{"type": "object", "required": ["x"]}'
    execution.tools.tools.add(name="f", description="d", parameters_json_schema=schema)
    execution.tools.tools.add(name="g")

    parameters = [{"type": "object", "required": ["x"]}, {"type": "object", "properties": {}}]
    assert conversation_of(execution, EVERYTHING).tools == [
        {"type": "function", "function": {"name": n, "description": d, "parameters": p}}
        for n, d, p in zip("fg", ("d", ""), parameters, strict=True)
    ]
    execution.tools.mode = tools_pb2.TOOL_MODE_NONE
    assert conversation_of(execution, EVERYTHING).tools is None


def test_reasoning_becomes_the_variables_that_the_template_has() -> None:
    execution = asked()
    execution.chat.template_variables_json = '{"language": "en"}'
    execution.reasoning.enabled = False
    execution.reasoning.effort = generation_pb2.REASONING_EFFORT_HIGH

    assert conversation_of(execution, EVERYTHING).variables == {
        "language": "en",
        "enable_thinking": False,
        "reasoning_effort": "high",
    }
    other = habits("{{ thinking }}{{ '<think>' }}")
    assert conversation_of(execution, other).variables["thinking"] is False


@pytest.mark.parametrize("field", ["spec.tools", "spec.chat.messages[1]", "spec.reasoning.enabled"])
def test_what_a_template_cannot_show_is_refused_with_its_path(field: str) -> None:
    execution = with_call() if "messages" in field else asked()
    if field == "spec.tools":
        execution.tools.tools.add(name="f")
    if "reasoning" in field:
        execution.reasoning.enabled = False

    with pytest.raises(InvalidArgument) as refused:
        conversation_of(execution, habits(PLAIN))

    assert refused.value.reason is Reason.FEATURE_UNSUPPORTED
    assert refused.value.metadata["model"] == "models/m/versions/1"
    assert [found.field for found in refused.value.violations] == [field]


def test_only_conversations_of_texts_are_plain() -> None:
    execution = asked()
    execution.chat.messages.add(role=ASSISTANT).parts.add(text="")
    for text in ("a", "", "b"):
        execution.chat.messages[0].parts.add(text=text)
    turns = plain_turns(execution)
    assert turns is not None
    assert [(turn.role, turn.content) for turn in turns] == [("user", "hiab"), ("assistant", "")]

    def changed(change: str) -> engine_pb2.Execution:
        other = engine_pb2.Execution()
        other.CopyFrom(execution)
        last = other.chat.messages[1]
        match change:
            case "part":
                last.parts.add(reasoning="r")
            case "only part":
                last.parts[0].reasoning = ""
            case "no part":
                del last.parts[:]
            case "role":
                last.role = generation_pb2.ROLE_TOOL
            case "answer":
                last.tool_call_id = "1"
            case "name":
                last.name = "n"
            case "call":
                last.tool_calls.add()
            case "tools":
                other.tools.SetInParent()
            case "reasoning":
                other.reasoning.SetInParent()
            case "variables":
                other.chat.template_variables_json = "{}"
            case _:
                other.chat.continue_last_message = True
        return other

    for change in (
        *("part", "only part", "no part", "role", "answer", "name", "call"),
        *("tools", "reasoning", "variables", "continued"),
    ):
        assert plain_turns(changed(change)) is None, change
