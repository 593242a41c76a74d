"""What an output has to be, checked and compiled before an engine sees it.

    contract          checked by                         compiled to
    json_object       -                                  JSON without white space
    json_schema       json_schemas.py, then llguidance   likewise
    regex             regexes.py, then llguidance        the same, for the whole output
    grammar           gbnf.py, then llguidance           Lark
    choices           here                               one terminal
    tools             as json_schema, for each tool      tool_grammars.py

JSON is compact, because small models otherwise fill an output with white space. Tools become a
constraint where the mode is REQUIRED, or AUTO with one of them strict; a constraint of the request
beside that is a conflict. Beside other tools it holds for the whole output: the model calls a tool
only where it allows that.

Cost: bounds on the source first, then llguidance's own limits and a walk of 64 bytes at most
(grammar_probe.py). Most takes some ms, the largest that passes some hundred. llguidance works
without the interpreter's lock, so that a pool of threads is the place for it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING

from llguidance import LLMatcher
from maas.inference.v1 import constraint_pb2, tools_pb2

from libs.errors import FieldRule, InvalidArgument, Reason, Violation, invalid_field
from services.worker.engine.base import Constraint, ConstraintKind
from services.worker.gbnf import GrammarInvalid, lark_literal, to_lark
from services.worker.grammar_probe import GrammarRefused, probe
from services.worker.json_schemas import CheckedSchema, Schema, SchemaInvalid, check_schema
from services.worker.parsing import ToolFormat
from services.worker.regexes import RegexInvalid, check_regex
from services.worker.tool_grammars import CallableTool, calls_only, free_with_calls

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

CHOICES_BYTES_MAX = 256 * 1024
"""All choices together."""
TOOLS_SUBSCHEMAS_MAX = 1000
"""Of the schemas of all tools together."""
CACHE_ENTRIES_MAX = 256
CACHE_CHARACTERS_MAX = 8 * 1024 * 1024
_CONSTRAINT = "spec.constraint"
_ANY_OBJECT: Schema = {"type": "object"}
_JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
}


class _Cache:
    """What was compiled last, least recently used first out. May be used from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._entries: OrderedDict[object, Constraint] = OrderedDict()
        self._characters = 0

    def get(self, key: object, make: Callable[[], Constraint]) -> Constraint:
        """Returns what stands under a key, or makes it. What `make` raises is not kept."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                return found
        made = make()
        with self._lock:
            if key not in self._entries:
                self._entries[key] = made
                self._characters += _size(made)
            while self._characters > CACHE_CHARACTERS_MAX or len(self._entries) > CACHE_ENTRIES_MAX:
                _, dropped = self._entries.popitem(last=False)
                self._characters -= _size(dropped)
        return made


_CACHE = _Cache()


def compile_constraint(
    constraint: constraint_pb2.OutputConstraint | None,
    tools: tools_pb2.ToolOptions | None,
    *,
    tool_format: ToolFormat | None,
) -> Constraint | None:
    """Checks and compiles what an output has to be; None for anything.

    Args:
        constraint: of the request.
        tools: of the request.
        tool_format: how the model calls tools; None when it does not.

    Raises:
        InvalidArgument: it is malformed, too large or cannot be enforced (BAD_OUTPUT_CONSTRAINT),
            or constraint and tools contradict each other.
    """
    enforced = tools is not None and _is_enforced(tools)
    if constraint is not None and constraint.WhichOneof("kind") is not None:
        if enforced:
            raise invalid_field(
                _CONSTRAINT,
                FieldRule.CONFLICTING,
                "cannot be combined with tools that are required or strict",
            )
        key = constraint.SerializeToString(deterministic=True)
        return _CACHE.get(key, lambda: _compile_output(constraint))
    if tools is None or not enforced:
        return None
    if tool_format is None:
        raise InvalidArgument(
            "spec.tools: the model's calls are in no known format, so they cannot be enforced",
            reason=Reason.FEATURE_UNSUPPORTED,
            metadata={"field": "spec.tools"},
            violations=[
                Violation("spec.tools", FieldRule.UNSUPPORTED, "is not enforced for this model")
            ],
        )
    key_of_tools = (tool_format, tools.SerializeToString(deterministic=True))
    return _CACHE.get(key_of_tools, lambda: _compile_tools(tools, tool_format))


def _is_enforced(tools: tools_pb2.ToolOptions) -> bool:
    match tools.mode:
        case tools_pb2.TOOL_MODE_NONE:
            return False
        case tools_pb2.TOOL_MODE_REQUIRED:
            return True
        case _:
            return any(tool.strict for tool in tools.tools)


def _compile_output(constraint: constraint_pb2.OutputConstraint) -> Constraint:
    match constraint.WhichOneof("kind"):
        case "json_object":
            grammar = _json_grammar(_ANY_OBJECT, f"{_CONSTRAINT}.json_object")
            return Constraint(kind=ConstraintKind.JSON_OBJECT, source="", grammar=grammar)
        case "json_schema":
            source, field = constraint.json_schema, f"{_CONSTRAINT}.json_schema"
            grammar = _json_grammar(_checked(source, field).schema, field)
            _probe(grammar, field)
            return Constraint(kind=ConstraintKind.JSON_SCHEMA, source=source, grammar=grammar)
        case "regex":
            return _compile_regex(constraint.regex)
        case "grammar":
            return _compile_grammar(constraint.grammar)
        case _:
            return _compile_choices(list(constraint.choices.values))


def _compile_regex(pattern: str) -> Constraint:
    field = f"{_CONSTRAINT}.regex"
    try:
        check_regex(pattern)
    except RegexInvalid as error:
        raise _refused(field, str(error)) from None
    grammar = LLMatcher.grammar_from_regex(pattern)
    _probe(grammar, field)
    return Constraint(kind=ConstraintKind.REGEX, source=pattern, grammar=grammar)


def _compile_grammar(source: str) -> Constraint:
    field = f"{_CONSTRAINT}.grammar"
    try:
        lark = to_lark(source)
    except GrammarInvalid as error:
        raise _refused(field, str(error)) from None
    grammar = LLMatcher.grammar_from_lark(lark)
    _probe(grammar, field)
    return Constraint(kind=ConstraintKind.GRAMMAR, source=source, grammar=grammar)


def _compile_choices(values: list[str]) -> Constraint:
    field = f"{_CONSTRAINT}.choices.values"
    if not values:
        raise _refused(field, "has to have at least one text")
    seen: dict[str, int] = {}
    for number, value in enumerate(values):
        if not value:
            raise _refused(f"{field}[{number}]", "must not be empty")
        if value in seen:
            raise _refused(f"{field}[{number}]", f"is the same as number {seen[value]}")
        seen[value] = number
    if sum(len(value.encode()) for value in values) > CHOICES_BYTES_MAX:
        raise _refused(field, f"has more than {CHOICES_BYTES_MAX} bytes together")
    lark = "start: CHOICE\nCHOICE: " + " | ".join(map(lark_literal, values)) + "\n"
    grammar = LLMatcher.grammar_from_lark(lark)
    _probe(grammar, field)
    source = json.dumps(values, ensure_ascii=False)
    return Constraint(kind=ConstraintKind.CHOICES, source=source, grammar=grammar)


def _compile_tools(tools: tools_pb2.ToolOptions, tool_format: ToolFormat) -> Constraint:
    is_required = tools.mode == tools_pb2.TOOL_MODE_REQUIRED
    callable_tools = _callable_tools(tools, is_required=is_required)
    parallel = tools.parallel_calls if tools.HasField("parallel_calls") else True
    write = calls_only if is_required else free_with_calls
    grammar = LLMatcher.grammar_from_lark(write(tool_format, callable_tools, parallel=parallel))
    _probe(grammar, "spec.tools")
    return Constraint(kind=ConstraintKind.TOOLS, source="", grammar=grammar)


def _callable_tools(tools: tools_pb2.ToolOptions, *, is_required: bool) -> list[CallableTool]:
    """Checks the tools that may be called and their schemas.

    Where no call is required only the schemas of strict tools count.
    """
    found: list[CallableTool] = []
    names: set[str] = set()
    subschemas = 0
    for number, tool in enumerate(tools.tools):
        field = f"spec.tools.tools[{number}]"
        if tool.name in names:
            raise invalid_field(f"{field}.name", FieldRule.CONFLICTING, "is there twice")
        names.add(tool.name)
        if is_required and tools.required_tool not in ("", tool.name):
            continue
        schema = _ANY_OBJECT
        if tool.parameters_json_schema and (is_required or tool.strict):
            checked = _check_parameters(
                tool.parameters_json_schema, f"{field}.parameters_json_schema"
            )
            schema = checked.schema
            subschemas += checked.subschemas
        if subschemas > TOOLS_SUBSCHEMAS_MAX:
            raise _refused(
                f"{field}.parameters_json_schema",
                f"is one too many: more than {TOOLS_SUBSCHEMAS_MAX} subschemas together",
            )
        found.append(CallableTool(tool.name, schema))
    if found:
        return found
    if tools.required_tool:
        raise invalid_field(
            "spec.tools.required_tool", FieldRule.CONFLICTING, "is none of the tools"
        )
    raise invalid_field(
        "spec.tools.tools", FieldRule.REQUIRED, "has to have a tool where a call is required"
    )


def _check_parameters(source: str, field: str) -> CheckedSchema:
    """Checks the schema of a tool's arguments, which are an object."""
    checked = _checked(source, field)
    schema = checked.schema
    kinds = schema.get("type", "object") if isinstance(schema, dict) else "object"
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise _refused(field, "has to be the schema of an object")
    restricted = {**(schema if isinstance(schema, dict) else {}), "type": "object"}
    _probe(_json_grammar(restricted, field), field)
    return CheckedSchema(restricted, checked.subschemas)


def _checked(source: str, field: str) -> CheckedSchema:
    try:
        return check_schema(source)
    except SchemaInvalid as error:
        raise _refused(field, str(error)) from None


def _json_grammar(schema: Schema, field: str) -> str:
    source = json.dumps({} if schema is True else schema)
    try:
        return LLMatcher.grammar_from_json_schema(source, None, _JSON_OPTIONS)
    except ValueError:
        # Half a surrogate, or a number that is none in JSON.
        raise _refused(field, "has a text or a number that no output can have") from None


def _probe(grammar: str, field: str) -> None:
    try:
        probe(grammar)
    except GrammarRefused as error:
        raise _refused(field, str(error)) from None


def _refused(field: str, description: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field}: {description}",
        reason=Reason.BAD_OUTPUT_CONSTRAINT,
        metadata={"field": field},
        violations=[Violation(field, FieldRule.BAD_FORMAT, description)],
    )


def _size(constraint: Constraint) -> int:
    return len(constraint.source) + len(constraint.grammar)
