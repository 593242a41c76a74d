"""From the messages, tools and options of an execution to what a chat template takes. Pure.

The shape is that of Hugging Face's renderer, which templates are written for: arguments of calls
are objects, tools are functions with their schemas, reasoning is `reasoning_content`.
"""

from __future__ import annotations

from collections.abc import Sequence

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, tools_pb2

from libs.chat_rules import (
    EFFORT_VARIABLE,
    VARIABLES_DEPTH_MAX,
    JsonObject,
    JsonValue,
    parse_object,
)
from libs.errors import FieldRule, InvalidArgument, invalid_field, unsupported
from services.worker import veil
from services.worker.chat import Conversation, Habits, Turn

_PLAIN_ROLES = {
    generation_pb2.ROLE_SYSTEM: "system",
    generation_pb2.ROLE_USER: "user",
    generation_pb2.ROLE_ASSISTANT: "assistant",
}
_ROLES = {
    **_PLAIN_ROLES,
    generation_pb2.ROLE_DEVELOPER: "developer",
    generation_pb2.ROLE_TOOL: "tool",
}
_EFFORTS = {
    generation_pb2.REASONING_EFFORT_LOW: "low",
    generation_pb2.REASONING_EFFORT_MEDIUM: "medium",
    generation_pb2.REASONING_EFFORT_HIGH: "high",
}
# A function without a schema takes any object.
_ANY_OBJECT: JsonObject = {"type": "object", "properties": {}}


def plain_turns(execution: engine_pb2.Execution) -> list[Turn] | None:
    """Returns the turns of a conversation of nothing but texts; None for any other one.

    Such a conversation breaks no rule of libs.chat_rules: the most usual prompts are made without
    looking at them twice.
    """
    chat = execution.chat
    if (
        chat.template_variables_json
        or chat.continue_last_message
        or execution.HasField("reasoning")
        or execution.HasField("tools")
    ):
        return None
    turns: list[Turn] = []
    for message in chat.messages:
        role = _PLAIN_ROLES.get(message.role)
        if role is None or message.name or message.tool_calls or message.tool_call_id:
            return None
        text = _plain_text(message.parts)
        if text is None:
            return None
        turns.append(Turn(role, text))
    return turns


def _plain_text(parts: Sequence[generation_pb2.ContentPart]) -> str | None:
    """Joins parts that are texts; None if there is none, or one of another kind."""
    if len(parts) == 1:
        text = parts[0].text
        return None if not text and parts[0].HasField("reasoning") else text
    if not parts or any(part.HasField("reasoning") for part in parts):
        return None
    return "".join(part.text for part in parts)


def shows_tools(execution: engine_pb2.Execution) -> bool:
    """Tells whether the model is told of tools."""
    return execution.HasField("tools") and bool(
        execution.tools.tools and execution.tools.mode != tools_pb2.TOOL_MODE_NONE
    )


def conversation_of(execution: engine_pb2.Execution, habits: Habits) -> Conversation:
    """Makes what the template takes of an execution that libs.chat_rules has checked.

    Raises:
        InvalidArgument: a role is unknown, or the template cannot show what is asked for.
    """
    _require_habits(execution, habits)
    chat = execution.chat
    return Conversation(
        messages=[_message(message, habits) for message in chat.messages],
        tools=[_tool(tool) for tool in execution.tools.tools] if shows_tools(execution) else None,
        variables=_variables(execution, habits),
        is_continued=chat.continue_last_message,
    )


def veiled(conversation: Conversation, over: veil.Veil) -> Conversation:
    """Returns a conversation with placeholders for all that a tenant typed."""
    tools = conversation.tools
    return Conversation(
        messages=veil.hide_messages(over, conversation.messages),
        tools=None if tools is None else veil.hide_tools(over, tools),
        variables=veil.hide_variables(over, conversation.variables),
        is_continued=conversation.is_continued,
    )


def _require_habits(execution: engine_pb2.Execution, habits: Habits) -> None:
    if shows_tools(execution) and not habits.knows_tools:
        raise _unsupported(execution, "spec.tools", "tool_calls")
    if not habits.knows_calls:
        for place, message in enumerate(execution.chat.messages):
            if message.tool_calls or message.role == generation_pb2.ROLE_TOOL:
                raise _unsupported(execution, f"spec.chat.messages[{place}]", "tool_calls")
    # Whether the model thinks at all is for its capabilities to say; here is what it can be told.
    is_off = execution.reasoning.HasField("enabled") and not execution.reasoning.enabled
    if is_off and not habits.switches:
        raise _unsupported(execution, "spec.reasoning.enabled", "reasoning")


def _unsupported(execution: engine_pb2.Execution, path: str, flag: str) -> InvalidArgument:
    return unsupported(
        path,
        f"the model's chat template cannot do this ({flag})",
        feature=flag,
        model=execution.model_version,
    )


def _message(message: generation_pb2.ChatMessage, habits: Habits) -> JsonObject:
    role = _ROLES.get(message.role)
    if role is None:
        raise invalid_field("spec.chat", FieldRule.UNKNOWN_ENUM, "has a message of an unknown role")
    if role == "developer" and not habits.knows_developer:
        role = "system"
    texts = [part.text for part in message.parts if not part.HasField("reasoning")]
    reasoning = "".join(part.reasoning for part in message.parts)
    has_no_content = not texts and habits.tells_no_content
    made: JsonObject = {"role": role, "content": None if has_no_content else "".join(texts)}
    if message.name:
        made["name"] = message.name
    if reasoning:
        made["reasoning_content"] = reasoning
    if message.tool_calls:
        made["tool_calls"] = _calls(message.tool_calls, habits)
    if message.tool_call_id:
        made["tool_call_id"] = message.tool_call_id
    return made


def _calls(calls: Sequence[tools_pb2.ToolCall], habits: Habits) -> JsonValue:
    made: list[JsonValue] = []
    for call in calls:
        arguments: JsonValue = call.arguments_json
        if not habits.takes_argument_texts:
            arguments = parse_object(call.arguments_json)
        function: JsonObject = {"name": call.name, "arguments": arguments}
        made.append({"id": call.id, "type": "function", "function": function})
    return made


def _tool(tool: tools_pb2.Tool) -> JsonObject:
    schema = tool.parameters_json_schema
    function: JsonObject = {
        "name": tool.name,
        "description": tool.description,
        "parameters": parse_object(schema) if schema else _ANY_OBJECT,
    }
    return {"type": "function", "function": function}


def _variables(execution: engine_pb2.Execution, habits: Habits) -> JsonObject:
    text = execution.chat.template_variables_json
    variables = parse_object(text, depth_max=VARIABLES_DEPTH_MAX) if text else {}
    if execution.reasoning.HasField("enabled"):
        variables.update(dict.fromkeys(habits.switches, execution.reasoning.enabled))
    effort = _EFFORTS.get(execution.reasoning.effort)
    if effort is not None:
        variables[EFFORT_VARIABLE] = effort
    return variables
