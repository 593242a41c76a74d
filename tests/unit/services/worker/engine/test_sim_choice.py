"""Outputs of the simulator under constraints: valid, and short."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import pytest
from llguidance import LLMatcher, grammar_from

from services.worker.engine.base import ConstraintKind
from services.worker.engine.matcher import MatcherFactory
from services.worker.engine.sim_choice import Choices, choice_of, write
from services.worker.engine.sim_output import SimOutput
from services.worker.engine.sim_tokenizer import SimTokenizer

TOKENIZER = SimTokenizer()
CHOICES = Choices(TOKENIZER, SimOutput(TOKENIZER))
FACTORY = MatcherFactory(
    CHOICES.pieces, end_ids=TOKENIZER.end_ids, control_ids=TOKENIZER.control_ids
)
TOKENS_MAX = 120

Schema = dict[str, object]


def output_of(grammar: str, kind: ConstraintKind, seed: int) -> str:
    base = seed * 0x9E3779B97F4A7C15 % (1 << 64)
    said = write(FACTORY.make(grammar), CHOICES, kind, base=base, most=TOKENS_MAX)
    assert said is not None, "it does not come to an end"
    return said.decode()


def json_of(schema: Schema, seed: int) -> object:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    found: object = json.loads(output_of(grammar, ConstraintKind.JSON_SCHEMA, seed))
    return found


def schema_of(chance: random.Random, depth: int = 0) -> Schema:
    """Any schema, with nothing that would keep its outputs short."""
    leaves = ["boolean", "null", "integer", "number", "string", "enum", "pattern", "range", "long"]
    kinds = leaves if depth > 2 else [*leaves, "array", "object", "object", "any of", "anything"]
    kind = chance.choice(kinds)
    if kind in {"boolean", "null", "integer", "number", "string"}:
        return {"type": kind}
    if kind == "array":
        items = schema_of(chance, depth + 1)
        return {"type": "array", "items": items, "minItems": chance.randint(0, 3)}
    if kind == "any of":
        return {"anyOf": [schema_of(chance, depth + 1) for _ in range(2)]}
    if kind == "object":
        names = chance.sample(["a", "name", "river", "größe"], chance.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: schema_of(chance, depth + 1) for name in names},
            "required": names[: chance.randint(0, len(names))],
            "additionalProperties": chance.choice([True, False]),
        }
    others: dict[str, Schema] = {
        "enum": {"enum": chance.sample(["a", "bb", 1, None, "x y", True], 3)},
        "pattern": {"type": "string", "pattern": "^(ab|cd)+-[0-9]{2,}$"},
        "range": {"type": "integer", "minimum": chance.randint(-99, 9), "maximum": 3000},
        "long": {"type": "string", "minLength": 12, "maxLength": 40},
        "anything": {},
    }
    return others[kind]


def test_a_hundred_schemas_give_valid_output_within_some_tens_of_tokens() -> None:
    chance = random.Random(7)  # noqa: S311 - schemas, not secrets

    for seed in range(100):
        schema = schema_of(chance)
        jsonschema.validate(json_of(schema, seed), schema)


def test_a_schema_that_contains_itself_comes_to_an_end() -> None:
    tree: Schema = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
                "required": ["children"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }

    for seed in range(20):
        jsonschema.validate(json_of(tree, seed), tree)


def test_json_objects_have_entries_and_differ() -> None:
    objects = [json_of({"type": "object"}, seed) for seed in range(20)]

    assert all(isinstance(value, dict) for value in objects)
    assert len({json.dumps(value) for value in objects}) > 10
    assert any(objects)


@pytest.mark.parametrize(
    "regex",
    ["[a-z]+@[a-z]+[.]com", "(a|b)*c", "[0-9]{4}-[0-9]{2}", "([.]a)*!", '"[^"]*"', "x?[^x]+y"],
)
def test_regular_expressions_match(regex: str) -> None:
    for seed in range(20):
        said = output_of(LLMatcher.grammar_from_regex(regex), ConstraintKind.REGEX, seed)
        assert re.fullmatch(regex, said)


@pytest.mark.parametrize(
    "gbnf",
    [
        'root ::= "(" root ")" | "x"',
        'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"',
        'root ::= "[" value ("," value)* "]"\nvalue ::= root | "\\"" [^"]* "\\""',
        'root ::= "<a>" root* "</a>"',
    ],
)
def test_grammars_that_nest_come_to_an_end(gbnf: str) -> None:
    for seed in range(20):
        assert output_of(grammar_from("gbnf", gbnf), ConstraintKind.GRAMMAR, seed)


def test_every_choice_comes_up() -> None:
    texts = ["red", "redder", "green"]

    assert {choice_of(texts, base) for base in range(50)} == {text.encode() for text in texts}
