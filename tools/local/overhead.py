"""How many tokens a chat template can add: bounds that the catalog keeps with a model version.

No token is shorter than a byte, so bytes bound tokens. What a template adds is what is rendered
beyond the texts of the request: marks around messages, and around tools, calls and reasoning where
the template knows them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, tools_pb2

from libs.errors import InvalidArgument
from services.worker.chat import ChatTemplate, TemplateInvalid
from services.worker.conversation import conversation_of

OVERHEAD_MAX = 65536
MARGIN = 8
"""Begin-of-sequence and whatever else a tokenizer puts before a text."""
_FIXED_TIME = datetime(2000, 1, 1, tzinfo=UTC)
_SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _message(role: generation_pb2.Role.ValueType, name: str = "") -> generation_pb2.ChatMessage:
    parts = [generation_pb2.ContentPart(text="x")]
    return generation_pb2.ChatMessage(role=role, parts=parts, name=name)


_USER = _message(generation_pb2.ROLE_USER)
_ASSISTANT = _message(generation_pb2.ROLE_ASSISTANT)
_SYSTEM = _message(generation_pb2.ROLE_SYSTEM)
# Some families want ids of nine letters and digits.
_CALL = generation_pb2.ChatMessage(
    role=generation_pb2.ROLE_ASSISTANT,
    parts=[generation_pb2.ContentPart(reasoning="x")],
    tool_calls=[tools_pb2.ToolCall(id="call00000", name="f", arguments_json="{}")],
)
_RESULT = generation_pb2.ChatMessage(
    role=generation_pb2.ROLE_TOOL,
    tool_call_id="call00000",
    parts=[generation_pb2.ContentPart(text="x")],
)
_NAMED_RESULT = generation_pb2.ChatMessage(name="n")
_NAMED_RESULT.MergeFrom(_RESULT)
_NAMED_USER = _message(generation_pb2.ROLE_USER, "n")
_NAMED_ASSISTANT = _message(generation_pb2.ROLE_ASSISTANT, "n")
_TOOL = tools_pb2.Tool(name="f")
_REASONING = (
    None,
    generation_pb2.ReasoningOptions(enabled=False),
    generation_pb2.ReasoningOptions(enabled=True),
    # The longest name of an effort.
    generation_pb2.ReasoningOptions(effort=generation_pb2.REASONING_EFFORT_MEDIUM),
    generation_pb2.ReasoningOptions(enabled=True, effort=generation_pb2.REASONING_EFFORT_MEDIUM),
)
# What two or three messages add together bounds what one of them adds. Some templates write names.
_DIALOGUES = (
    (_USER, _ASSISTANT, _USER),
    (_SYSTEM, _USER),
    (_USER, _CALL, _RESULT),
    (_USER, _CALL, _RESULT, _ASSISTANT, _USER),
    (_NAMED_USER,),
    (_USER, _NAMED_ASSISTANT, _USER),
    (_message(generation_pb2.ROLE_SYSTEM, "n"), _USER),
    (_USER, _CALL, _NAMED_RESULT),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """What stands beside the messages."""

    tools: Sequence[tools_pb2.Tool]
    reasoning: generation_pb2.ReasoningOptions | None


def bounds(source: str) -> tuple[int, int]:
    """Most tokens that a template adds to a prompt, and to each message, tool and call.

    A template that cannot be used counts as none: its worker refuses conversations anyway.
    """
    if not source:
        return MARGIN, 0
    try:
        template = ChatTemplate(source, _SPECIAL_TOKENS, lambda: _FIXED_TIME)
    except TemplateInvalid:
        return MARGIN, 0
    prompt = message = 0
    for tools, reasoning in itertools.product(((), (_TOOL,)), _REASONING):
        options = _Options(tools=tools, reasoning=reasoning)
        alone = _added(template, [_USER], options)
        prompt = max(prompt, alone)
        more = [_added(template, dialogue, options) for dialogue in _DIALOGUES]
        if tools:
            twice = _Options(tools=(_TOOL, _TOOL), reasoning=reasoning)
            more.append(_added(template, [_USER], twice))
        message = max(message, *(item - alone for item in more))
    return min(prompt + MARGIN, OVERHEAD_MAX), min(message + 1, OVERHEAD_MAX)


def _added(
    template: ChatTemplate, messages: Sequence[generation_pb2.ChatMessage], options: _Options
) -> int:
    """Bytes of a rendering beyond the texts; 0 when the template refuses the conversation."""
    execution = engine_pb2.Execution(
        chat=generation_pb2.ChatInput(messages=messages),
        tools=tools_pb2.ToolOptions(tools=options.tools) if options.tools else None,
        reasoning=options.reasoning,
    )
    try:
        text = template.render_conversation(conversation_of(execution, template.habits))
    except InvalidArgument:
        return 0
    said = sum(_said(message) for message in messages)
    return len(text.encode("utf-8")) - said - sum(len(tool.name) for tool in options.tools)


def _said(message: generation_pb2.ChatMessage) -> int:
    """Bytes of a message that the request is measured by anyway."""
    parts = sum(len(part.text) + len(part.reasoning) for part in message.parts)
    calls = sum(
        len(call.id) + len(call.name) + len(call.arguments_json) for call in message.tool_calls
    )
    return parts + calls + len(message.tool_call_id) + len(message.name)
