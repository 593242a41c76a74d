from __future__ import annotations

import json

from jsonschema import Draft202012Validator

from tools.conformance.schemas import CHARACTERS_MAX, generate_schema

SEEDS = range(100)


def test_the_same_seed_gives_the_same_schema() -> None:
    assert [generate_schema(seed) for seed in SEEDS] == [generate_schema(seed) for seed in SEEDS]


def test_schemas_are_valid_and_differ() -> None:
    texts = {generate_schema(seed).text for seed in SEEDS}

    assert len(texts) > len(SEEDS) * 0.9
    for text in texts:
        Draft202012Validator.check_schema(json.loads(text))


def test_schemas_use_every_keyword_that_they_are_for() -> None:
    text = "".join(generate_schema(seed).text for seed in SEEDS)
    wanted = {
        *("object", "array", "string", "integer", "number", "boolean", "null", "properties"),
        *("required", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength"),
        *("pattern", "enum", "const", "anyOf", "$ref", "$defs", "minimum", "maximum", "multipleOf"),
    }

    assert {word for word in wanted if f'"{word}"' not in text} == set()


def test_outputs_are_short() -> None:
    assert all(0 < generate_schema(seed).characters_max <= CHARACTERS_MAX for seed in SEEDS)
