"""What a conversation and its tools have to be, beyond the limits of single fields. Pure.

The gateway asks before it holds money, the worker before it tokenises: both get the same answer.
Paths are those of the public request. A description never quotes what somebody typed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import NoReturn, TypeAlias

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, tools_pb2

from libs.errors import FieldRule, InvalidArgument, Violation

VIOLATIONS_MAX = 16
# As deep as schemas and arguments of people are, and far from the limits of any parser.
JSON_DEPTH_MAX = 64
VARIABLES_DEPTH_MAX = 32
# Of all JSON texts of a request together: some milliseconds of parsing.
JSON_VALUES_MAX = 65_536
# Messages, parts and calls of a conversation together: each takes some microseconds wherever it is
# looked at. Single fields would allow as many as there is room for in a request, a million.
PIECES_MAX = 16_384
_PIECE_BYTES_MIN = 2

Spec: TypeAlias = generation_pb2.GenerationSpec | engine_pb2.Execution
"""Whatever has a conversation, tools and reasoning, by these names."""

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
JsonObject: TypeAlias = dict[str, JsonValue]

# Names that templates of any family know as the server's...
_OF_SERVER = frozenset({"messages", "tools", "documents", "chat_template"})
_OF_PROMPT = frozenset({"add_generation_prompt", "continue_final_message"})
_OF_CALLS = frozenset({"raise_exception", "strftime_now"})
_OF_TOKENS = frozenset(
    f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
)
# ... and those that Jinja has itself.
_OF_JINJA = frozenset({"loop", "self", "caller", "varargs", "kwargs", "true", "false", "none"})
_OF_GLOBALS = frozenset({"range", "dict", "lipsum", "cycler", "joiner", "namespace"})
_OF_PYTHON = frozenset({"True", "False", "None"})
RESERVED_VARIABLES = frozenset().union(
    _OF_SERVER, _OF_PROMPT, _OF_CALLS, _OF_TOKENS, _OF_JINJA, _OF_GLOBALS, _OF_PYTHON
)
# What the fields of spec.reasoning become.
ENABLED_VARIABLES = frozenset({"enable_thinking", "thinking"})
EFFORT_VARIABLE = "reasoning_effort"

_VARIABLES = "spec.chat.template_variables_json"
_VARIABLE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


class JsonRefused(ValueError):
    """A text is no JSON object within the bounds. The message holds nothing of the text."""

    def __init__(self, rule: FieldRule, description: str) -> None:
        super().__init__(description)
        self.rule = rule
        self.description = description


def check_spec(spec: Spec) -> None:
    """Checks the conversation and the tools of a request.

    Costs about a microsecond for a plain message, and O(bytes) for JSON texts.

    Raises:
        InvalidArgument: with a violation for each bad field, at most 16.
    """
    found = list(islice(_violations(spec), VIOLATIONS_MAX))
    if found:
        first = found[0]
        raise InvalidArgument(
            f"{first.field}: {first.description}",
            metadata={"field": first.field},
            violations=found,
        )


def pieces_of(chat: generation_pb2.ChatInput) -> int:
    """Counts the messages of a conversation, and what is in them. A third of a us for each."""
    messages = chat.messages
    parts = sum([len(message.parts) for message in messages])
    return len(messages) + parts + sum([len(message.tool_calls) for message in messages])


def has_more_pieces(chat: generation_pb2.ChatInput, most: int) -> bool:
    """Tells whether a conversation has more messages, parts and calls together than `most`."""
    # Few bytes cannot be many pieces: most conversations are not counted at all.
    return chat.ByteSize() > _PIECE_BYTES_MIN * most and pieces_of(chat) > most


def parse_object(text: str, *, depth_max: int = JSON_DEPTH_MAX) -> JsonObject:
    """Parses a JSON object.

    Args:
        text: JSON.
        depth_max: most values inside one another, the object itself counted.

    Raises:
        JsonRefused: it is none, or too deep.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep(depth_max) from None
    except ValueError:
        raise JsonRefused(FieldRule.BAD_FORMAT, "must be a JSON object") from None
    if not isinstance(value, dict):
        raise JsonRefused(FieldRule.BAD_FORMAT, "must be a JSON object")
    if _is_deeper(value, depth_max):
        raise _too_deep(depth_max)
    return value


def _violations(spec: Spec) -> Iterator[Violation]:
    is_chat = spec.WhichOneof("input") == "chat"
    if is_chat and has_more_pieces(spec.chat, PIECES_MAX):
        yield Violation(
            "spec.chat.messages",
            FieldRule.TOO_MANY,
            f"have more than {PIECES_MAX} parts and calls, themselves counted",
        )
        return
    # All JSON texts of the request share one allowance.
    texts = _JsonTexts()
    if is_chat:
        yield from _of_messages(spec.chat, texts)
        if spec.chat.template_variables_json:
            yield from _of_variables(spec, texts)
    if spec.HasField("tools"):
        yield from _of_tools(spec.tools, texts)
    for name in ("tools", "reasoning"):
        if not is_chat and spec.HasField(name):
            yield Violation(f"spec.{name}", FieldRule.CONFLICTING, "needs spec.chat")
    if is_chat and spec.chat.continue_last_message:
        yield from _of_continuation(spec)


class _JsonTexts:
    """Parses the JSON texts of one request, as long as there are not too many values in them."""

    def __init__(self) -> None:
        self._values_left = JSON_VALUES_MAX

    def parse(self, text: str, *, depth_max: int = JSON_DEPTH_MAX) -> JsonObject:
        """Parses a JSON object.

        Raises:
            JsonRefused: it is none, too deep, or one of too many.
        """
        # Before it is parsed: no text has more values than this.
        self._values_left -= text.count(",") + text.count("[") + text.count("{")
        if self._values_left < 0:
            raise JsonRefused(
                FieldRule.TOO_MANY,
                f"makes more than {JSON_VALUES_MAX} values in the JSON texts of the request",
            )
        return parse_object(text, depth_max=depth_max)

    def fault(self, field: str, text: str) -> Iterator[Violation]:
        """Yields what is wrong with a text that has to be a JSON object."""
        try:
            self.parse(text)
        except JsonRefused as error:
            yield Violation(field, error.rule, error.description)


def _of_messages(chat: generation_pb2.ChatInput, texts: _JsonTexts) -> Iterator[Violation]:
    call_ids: set[str] = set()
    for place, message in enumerate(chat.messages):
        # First what nearly every message is: nothing more has to be looked at.
        if message.role == generation_pb2.ROLE_TOOL or message.tool_call_id or message.tool_calls:
            yield from _of_calls(message, f"spec.chat.messages[{place}]", call_ids, texts)
        elif not message.parts:
            yield Violation(
                f"spec.chat.messages[{place}].parts", FieldRule.REQUIRED, "must not be empty"
            )
        if message.role != generation_pb2.ROLE_ASSISTANT:
            yield from _of_reasoning(message, place)


def _of_reasoning(message: generation_pb2.ChatMessage, place: int) -> Iterator[Violation]:
    for number, part in enumerate(message.parts):
        if part.HasField("reasoning"):
            yield Violation(
                f"spec.chat.messages[{place}].parts[{number}].reasoning",
                FieldRule.CONFLICTING,
                "is only for ROLE_ASSISTANT",
            )


def _of_calls(
    message: generation_pb2.ChatMessage, path: str, call_ids: set[str], texts: _JsonTexts
) -> Iterator[Violation]:
    is_tool = message.role == generation_pb2.ROLE_TOOL
    if is_tool and not message.tool_call_id:
        yield Violation(f"{path}.tool_call_id", FieldRule.REQUIRED, "must be set with ROLE_TOOL")
    if message.tool_call_id and not is_tool:
        yield Violation(f"{path}.tool_call_id", FieldRule.CONFLICTING, "is only for ROLE_TOOL")
    if message.tool_calls and message.role != generation_pb2.ROLE_ASSISTANT:
        yield Violation(f"{path}.tool_calls", FieldRule.CONFLICTING, "are only for ROLE_ASSISTANT")
    if not message.parts and not message.tool_calls:
        yield Violation(f"{path}.parts", FieldRule.REQUIRED, "must not be empty")
    for number, call in enumerate(message.tool_calls):
        at = f"{path}.tool_calls[{number}]"
        if call.id in call_ids:
            yield Violation(f"{at}.id", FieldRule.CONFLICTING, "is the id of an earlier call")
        call_ids.add(call.id)
        yield from texts.fault(f"{at}.arguments_json", call.arguments_json)


def _of_tools(options: tools_pb2.ToolOptions, texts: _JsonTexts) -> Iterator[Violation]:
    names: set[str] = set()
    for place, tool in enumerate(options.tools):
        at = f"spec.tools.tools[{place}]"
        if tool.name in names:
            yield Violation(f"{at}.name", FieldRule.CONFLICTING, "is the name of an earlier tool")
        names.add(tool.name)
        if tool.parameters_json_schema:
            yield from texts.fault(f"{at}.parameters_json_schema", tool.parameters_json_schema)
    is_required = options.mode == tools_pb2.TOOL_MODE_REQUIRED
    if is_required and not options.tools:
        yield Violation(
            "spec.tools.tools", FieldRule.REQUIRED, "must not be empty with TOOL_MODE_REQUIRED"
        )
    if options.required_tool and not is_required:
        yield Violation(
            "spec.tools.required_tool", FieldRule.CONFLICTING, "is only for TOOL_MODE_REQUIRED"
        )
    elif options.required_tool and options.required_tool not in names:
        yield Violation(
            "spec.tools.required_tool", FieldRule.CONFLICTING, "must name one of spec.tools.tools"
        )


def _of_variables(spec: Spec, texts: _JsonTexts) -> Iterator[Violation]:
    try:
        variables = texts.parse(spec.chat.template_variables_json, depth_max=VARIABLES_DEPTH_MAX)
    except JsonRefused as error:
        yield Violation(_VARIABLES, error.rule, error.description)
        return
    if not all(_VARIABLE_NAME.fullmatch(name) for name in variables):
        yield Violation(
            _VARIABLES,
            FieldRule.BAD_FORMAT,
            f"must have names that match {_VARIABLE_NAME.pattern}",
        )
    reserved = RESERVED_VARIABLES.intersection(variables)
    if reserved:
        yield Violation(
            _VARIABLES, FieldRule.CONFLICTING, f"must not set {min(reserved)}: the server does"
        )
    if spec.reasoning.HasField("enabled") and not ENABLED_VARIABLES.isdisjoint(variables):
        yield Violation(
            _VARIABLES, FieldRule.CONFLICTING, "must not say again what spec.reasoning.enabled says"
        )
    if spec.reasoning.effort and EFFORT_VARIABLE in variables:
        yield Violation(
            _VARIABLES, FieldRule.CONFLICTING, "must not say again what spec.reasoning.effort says"
        )


def _of_continuation(spec: Spec) -> Iterator[Violation]:
    path = "spec.chat.continue_last_message"
    if spec.tools.mode == tools_pb2.TOOL_MODE_REQUIRED:
        yield Violation(
            path, FieldRule.CONFLICTING, "leaves no room for the call of TOOL_MODE_REQUIRED"
        )
    if not spec.chat.messages:
        return
    last = spec.chat.messages[-1]
    if last.role != generation_pb2.ROLE_ASSISTANT:
        yield Violation(path, FieldRule.CONFLICTING, "needs a last message of ROLE_ASSISTANT")
    elif last.tool_calls or not last.parts or last.parts[-1].HasField("reasoning"):
        yield Violation(path, FieldRule.CONFLICTING, "needs a last message that ends with text")


def _is_deeper(value: JsonObject, depth_max: int) -> bool:
    """Tells whether more than so many values are inside one another. Level by level."""
    level: list[JsonObject | list[JsonValue]] = [value]
    for _ in range(depth_max):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are no JSON")


def _too_deep(depth_max: int) -> JsonRefused:
    return JsonRefused(FieldRule.BAD_FORMAT, f"must not be deeper than {depth_max} values")
