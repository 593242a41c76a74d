"""What the stand-in's model reads and says: tokens, prompts, and text that a constraint allows."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from typing import Any

import jsonschema
from maas.inference.v1 import constraint_pb2, generation_pb2, tools_pb2

from libs.errors import FieldRule, InvalidArgument, Reason, Violation
from tests.integration.tools.conformance.request_faults import Wrong
from tests.integration.tools.conformance.running import WORDS

BOS, EOS, OPEN, CLOSE, THINK, THOUGHT, CALL, CALLED = range(8)
CONTROLS = {OPEN: "<|im_start|>", CLOSE: "<|im_end|>", THINK: "<think>", THOUGHT: "</think>"}
_BYTES = 8
_WORDS = _BYTES + 256
SIZE = _WORDS + len(WORDS)
"""Tokens: controls, bytes, words of four characters."""
_BY_WORD = {word: _WORDS + number for number, word in enumerate(WORDS)}
_ROLES = {
    generation_pb2.ROLE_SYSTEM: "system",
    generation_pb2.ROLE_DEVELOPER: "system",
    generation_pb2.ROLE_USER: "user",
    generation_pb2.ROLE_ASSISTANT: "assistant",
    generation_pb2.ROLE_TOOL: "tool",
}
_NESTED_MAX = 64
_PATTERN_SAYS = {
    "^[a-z]{1,6}$": ("abc", "x"),
    "^[A-F0-9]{4}$": ("AB12", "0000"),
    "^(north|south)-[0-9]{1,3}$": ("north-7", "south-123"),
    "^v[0-9]\\.[0-9]{1,2}$": ("v1.2", "v0.99"),
    "^(yes|no|maybe)$": ("yes", "maybe"),
}


def words() -> range:
    """Ids of the words."""
    return range(_WORDS, SIZE)


def encode(text: str, *, has_controls: bool = False) -> list[int]:
    """Tokens of a text."""
    ids: list[int] = []
    at = 0
    marks = {mark: token for token, mark in CONTROLS.items()} if has_controls else {}
    while at < len(text):
        control = next((mark for mark in marks if text.startswith(mark, at)), "")
        word = _BY_WORD.get(text[at : at + 4])
        if control:
            ids.append(marks[control])
            at += len(control)
        elif word is not None:
            ids.append(word)
            at += 4
        else:
            ids += [_BYTES + byte for byte in text[at].encode()]
            at += 1
    return ids


def bytes_of(token: int) -> bytes:
    """What a token says; controls say nothing."""
    if token >= _WORDS:
        return WORDS[token - _WORDS].encode()
    return bytes([token - _BYTES]) if token >= _BYTES else b""


def decode(ids: list[int]) -> tuple[str, bytes]:
    """Text of tokens, and bytes behind it that are no whole character."""
    whole = b"".join(map(bytes_of, ids))
    for length in range(len(whole), max(-1, len(whole) - 4), -1):
        try:
            return whole[:length].decode(), whole[length:]
        except UnicodeDecodeError:
            continue
    return whole.decode("utf-8", "replace"), b""


def prompt_of(spec: generation_pb2.GenerationSpec, wrong: Wrong, ignored: str) -> list[int]:
    """Tokens of a prompt: with a conversation, those of the template."""
    match spec.WhichOneof("input"):
        case "tokens":
            return list(spec.tokens.ids)[1 if wrong is Wrong.IDS_CUT else 0 :]
        case "text":
            return [BOS, *encode(spec.text)]
        case _:
            return _conversation(spec, wrong, ignored)


def _conversation(spec: generation_pb2.GenerationSpec, wrong: Wrong, ignored: str) -> list[int]:
    has_controls = wrong is Wrong.CONTROL_TYPED
    texts = [_turn(message) for message in spec.chat.messages]
    if ignored == "chat":
        return encode("".join(text for _, text in texts))
    ids = [BOS]
    may_call = spec.tools.mode != tools_pb2.TOOL_MODE_NONE or wrong is Wrong.TOLD_OF_TOOLS
    if spec.tools.tools and may_call and ignored != "tool_calls":
        told = json.dumps([tool.name + tool.parameters_json_schema for tool in spec.tools.tools])
        ids += [OPEN, *encode(f"tools\n{told}"), CLOSE]
    for role, text in texts:
        ids += [OPEN, *encode(f"{role}\n"), *encode(text, has_controls=has_controls), CLOSE]
    if not spec.chat.continue_last_message or wrong is Wrong.CONTINUE_CLOSES:
        return [*ids, OPEN, *encode("assistant\n")]
    return ids[:-1]


def _turn(message: generation_pb2.ChatMessage) -> tuple[str, str]:
    text = "".join(part.text for part in message.parts)
    calls = "".join(f"[{call.name}{call.arguments_json}]" for call in message.tool_calls)
    return _ROLES.get(message.role, ""), text + calls


class Refused(Exception):
    """A constraint is malformed."""


def allowed_text(constraint: constraint_pb2.OutputConstraint, seed: int) -> str:
    """Something that a constraint allows.

    Raises:
        Refused: it is malformed.
    """
    match constraint.WhichOneof("kind"):
        case "json_object":
            return '{"a":1}'
        case "json_schema":
            return instance_text(constraint.json_schema, seed)
        case "regex":
            return _expression(constraint.regex)
        case "grammar":
            return _grammar(constraint.grammar)
        case _:
            values = constraint.choices.values
            if not all(values) or len(set(values)) != len(values):
                raise Refused
            return str(values[seed % len(values)]) if values else ""


def _expression(regex: str) -> str:
    try:
        expression = re.compile(regex)
    except re.error:
        raise Refused from None
    text = "abc-12"
    if "(?" in regex or "\\1" in regex or expression.fullmatch(text) is None:
        raise Refused
    return text


def _grammar(source: str) -> str:
    rules = dict(line.split("::=", 1) for line in source.splitlines() if "::=" in line)
    names = {name.strip() for name in rules}
    for body in rules.values():
        used = re.sub(r'"[^"]*"', " ", body)
        if not body.strip() or not set(re.findall(r"\w+", used)) <= names:
            raise Refused
    return "(x)"


def instance_text(source: str, seed: int) -> str:
    """JSON that matches a schema, compact.

    Raises:
        Refused: the schema is malformed.
    """
    schema = _checked(source)
    value = _Instance(schema, random.Random(seed)).of(schema)  # noqa: S311 - not a secret
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@cache
def _checked(source: str) -> dict[str, Any]:
    level = 0
    for bracket in re.findall(r"[\[\]{}]", source):
        level += 1 if bracket in "[{" else -1
        if level > _NESTED_MAX:
            raise Refused
    try:
        schema = json.loads(source)
    except json.JSONDecodeError:
        raise Refused from None
    if not isinstance(schema, dict):
        raise Refused
    references = set(re.findall(r'"\$ref": ?"([^"]*)"', source))
    known = {f"#/$defs/{name}" for name in schema.get("$defs", {})}
    if not references <= known:
        raise Refused
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError:
        raise Refused from None
    return schema


class _Instance:
    """Makes what a schema of tools/conformance/schemas.py allows."""

    def __init__(self, root: dict[str, Any], chance: random.Random) -> None:
        self._root = root
        self._chance = chance

    def of(self, schema: dict[str, Any]) -> Any:
        if "$ref" in schema:
            return self.of(self._root["$defs"][schema["$ref"].rpartition("/")[2]])
        if "const" in schema:
            return schema["const"]
        for keyword in ("enum", "anyOf"):
            if keyword in schema:
                chosen = self._chance.choice(schema[keyword])
                return self.of(chosen) if keyword == "anyOf" else chosen
        return getattr(self, f"_{schema.get('type', 'object')}")(schema)

    def _object(self, schema: dict[str, Any]) -> dict[str, Any]:
        required = schema.get("required", [])
        return {
            name: self.of(inner)
            for name, inner in schema.get("properties", {}).items()
            if name in required or self._chance.random() < 0.5
        }

    def _array(self, schema: dict[str, Any]) -> list[Any]:
        if "prefixItems" in schema:
            return [self.of(inner) for inner in schema["prefixItems"]]
        count = self._chance.randint(schema["minItems"], schema["maxItems"])
        return [self.of(schema["items"]) for _ in range(count)]

    def _string(self, schema: dict[str, Any]) -> str:
        if "pattern" in schema:
            return self._chance.choice(_PATTERN_SAYS[schema["pattern"]])
        length = self._chance.randint(schema.get("minLength", 0), schema["maxLength"])
        return "".join(self._chance.choices('ab"\\\u00e4\u20ac', k=length))

    def _integer(self, schema: dict[str, Any]) -> int:
        step = schema.get("multipleOf", 1)
        return int(-(-schema["minimum"] // step) * step)

    def _number(self, schema: dict[str, Any]) -> float:
        return float(schema["minimum"]) + 0.25

    def _boolean(self, _: dict[str, Any]) -> bool:
        return self._chance.random() < 0.5

    def _null(self, _: dict[str, Any]) -> None:
        return None


def bad_constraint(constraint: constraint_pb2.OutputConstraint, wrong: Wrong) -> InvalidArgument:
    """How a malformed constraint is refused."""
    path = f"spec.constraint.{constraint.WhichOneof('kind')}"
    if wrong is Wrong.BAD_UNNAMED:
        path = "spec.constraint"
    reason = Reason.BAD_OUTPUT_CONSTRAINT
    if wrong is Wrong.BAD_REASON:
        reason = Reason.INVALID_FIELD
    violations = [Violation(path, FieldRule.BAD_FORMAT, "is malformed")]
    return InvalidArgument("bad constraint", reason=reason, violations=violations)
