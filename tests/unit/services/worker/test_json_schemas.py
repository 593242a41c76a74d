from __future__ import annotations

import json

import pytest

from services.worker.json_schemas import SchemaInvalid, check_schema

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["next"],
        }
    },
    "$ref": "#/$defs/node",
}
ENDLESS = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"$ref": "#/$defs/node"}},
            "required": ["next"],
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        TREE,
        {"type": "array", "items": {"$ref": "#"}},
        {"enum": [{"$ref": "http://x/y"}]},
        {"anyOf": [{"type": "null"}, {"$ref": "#/anyOf/0"}]},
        {"properties": {"$ref": {"type": "string"}}},
        {"$ref": "#here", "$defs": {"a": {"$anchor": "here"}}},
        {
            "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}]} for n in range(99)}
            | {"d99": {"type": "null"}},
            "$ref": "#/$defs/d0",
        },
    ],
)
def test_a_schema_passes(schema: object) -> None:
    assert check_schema(json.dumps(schema)).schema == schema


def test_wishes_to_the_compiler_are_dropped() -> None:
    checked = check_schema('{"type": "string", "x-guidance": {"lenient": true}}')

    assert checked.schema == {"type": "string"}


def nested(keyword: str, depth: int) -> str:
    return f'{{"{keyword}":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ('{"const": NaN}', "no JSON"),
        ("[]", "object, true or false"),
        ("3", "object, true or false"),
        ("false", "matches nothing"),
        ("[" * 32_000, "no JSON|nested"),
        (nested("not", 10_000), "nested deeper"),
        (nested("items", 65), "nested deeper"),
        ('{"$ref": "http://example.com/a.json"}', "another document"),
        ('{"items": {"$ref": "other.json#/a"}}', "another document"),
        ('{"$ref": "#/$defs/none"}', "not there"),
        ('{"anyOf": [true, {"$ref": "#/anyOf/2"}]}', "not there"),
        ('{"anyOf": [true, {"$ref": "#/anyOf/%s"}]}' % ("9" * 5000), "not there"),
        ('{"type": "thing"}', "rules of JSON Schema at /type"),
        ('{"properties": {"a": {"required": "x"}}}', "at /properties/a/required"),
        ('{"multipleOf": 0}', "rules of JSON Schema"),
        ('{"multipleOf": 1000003}', "remainders"),
        ('{"multipleOf": 12345.678}', "remainders"),
        ('{"maximum": 1e40}', "beyond"),
        ('{"pattern": "(a{1000}){1000}"}', "places"),
        ('{"patternProperties": {"(a{1000}){1000}": {}}}', "places"),
        (json.dumps({"anyOf": [{}] * 501}), "500 subschemas"),
        (json.dumps({"required": [f"p{n}" for n in range(501)]}), "requires more"),
        (json.dumps(ENDLESS), "nothing finite"),
        ('{"$ref": "#"}', "nothing finite"),
        ('{"type": "array", "minItems": 1, "items": {"$ref": "#"}}', "nothing finite"),
        ('{"allOf": [{"anyOf": [{"$ref": "#"}]}]}', "nothing finite"),
    ],
)
def test_what_is_no_schema_or_too_much_is_refused(text: str, message: str) -> None:
    with pytest.raises(SchemaInvalid, match=message):
        check_schema(text)
