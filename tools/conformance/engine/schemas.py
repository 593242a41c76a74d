"""Constraints for checks: written, compiled, and made at random."""

from __future__ import annotations

import json
import random

from llguidance import LLMatcher

from services.worker.engine.base import Constraint, ConstraintKind

JsonValue = dict[str, object]
_DEPTH_MAX = 1


def json_constraint(schema: JsonValue) -> Constraint:
    """An output that is valid against a schema."""
    source = json.dumps(schema)
    grammar = LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_flexible": False})
    return Constraint(kind=ConstraintKind.JSON_SCHEMA, source=source, grammar=grammar)


def json_object() -> Constraint:
    """An output that is any JSON object."""
    grammar = LLMatcher.grammar_from_json_schema(
        '{"type": "object"}', overrides={"whitespace_flexible": False}
    )
    return Constraint(kind=ConstraintKind.JSON_OBJECT, source="", grammar=grammar)


def regex_constraint(regex: str, kind: ConstraintKind = ConstraintKind.REGEX) -> Constraint:
    """An output that matches an expression."""
    return Constraint(kind=kind, source=regex, grammar=LLMatcher.grammar_from_regex(regex))


def schema_of(chance: random.Random, depth: int = 0) -> JsonValue:
    """Any schema whose outputs are short, so that every model gets to their end."""
    leaves = ["boolean", "null", "integer", "enum", "const", "pattern", "text"]
    nested = [*leaves, "array", "object", "object", "any of"]
    kind = chance.choice(leaves if depth > _DEPTH_MAX else nested)
    simple: dict[str, JsonValue] = {
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "integer": {"type": "integer", "minimum": chance.randint(-9, 0), "maximum": 50},
        "enum": {"enum": chance.sample(["river", "a b", 7, None, True, "é"], 3)},
        "const": {"const": chance.choice([1, "x", [1, "y"]])},
        "pattern": {"type": "string", "pattern": "^[a-f]{2}-[0-9]$"},
        "text": {"type": "string", "minLength": 1, "maxLength": chance.randint(2, 6)},
    }
    if kind in simple:
        return simple[kind]
    if kind == "array":
        items = schema_of(chance, depth + 1)
        return {"type": "array", "items": items, "minItems": 1, "maxItems": 2}
    if kind == "any of":
        return {"anyOf": [schema_of(chance, depth + 1) for _ in range(2)]}
    names = chance.sample(["a", "name", "is_open", "größe"], chance.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: schema_of(chance, depth + 1) for name in names},
        "required": names[: chance.randint(0, len(names))],
        "additionalProperties": False,
    }
