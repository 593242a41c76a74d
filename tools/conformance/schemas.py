"""Random JSON Schemas whose outputs are short, for the promise that output always matches. Pure.

The same seed gives the same schema. Only keywords that every engine with `json_schema` has to
enforce are in them, and every text that matches is at most `characters_max` long, so that an
output that gets so many tokens always comes to its end.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

NESTING_MAX = 3
CHARACTERS_MAX = 500
# A character of a string as an escape, or as a pair of them.
_CHARACTER = 12
_WORDS = ("red", "green", "blue", "ä€", "two words", 'quo"te', "back\\slash", "line\nbreak")
_PATTERNS = (
    ("^[a-z]{1,6}$", 6),
    ("^[A-F0-9]{4}$", 4),
    ("^(north|south)-[0-9]{1,3}$", 9),
    ("^v[0-9]\\.[0-9]{1,2}$", 5),
    ("^(yes|no|maybe)$", 5),
)

Schema = dict[str, object]
_Made = tuple[Schema, int]


@dataclass(frozen=True, slots=True)
class GeneratedSchema:
    """A schema.

    Attributes:
        schema: JSON Schema (2020-12).
        characters_max: of the longest compact JSON that matches it.
    """

    schema: Schema
    characters_max: int

    @property
    def text(self) -> str:
        """The schema as JSON."""
        return json.dumps(self.schema, ensure_ascii=False)


def generate_schema(seed: int) -> GeneratedSchema:
    """Makes the schema with a number. Its outputs have at most 500 characters."""
    chance = random.Random(seed)  # noqa: S311 - not a secret
    while True:
        schema, size = _Generator(chance).document()
        if size <= CHARACTERS_MAX:
            return GeneratedSchema(schema, size)


class _Generator:
    """Makes one schema. Every method returns a schema and the length of its longest output."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._definitions: dict[str, _Made] = {}

    def document(self) -> _Made:
        chance = self._chance
        for number in range(chance.choice((0, 0, 1, 2))):
            self._definitions[f"d{number}"] = self._value(NESTING_MAX - 1)
        make = chance.choice((self._object, self._object, self._object, self._array, self._value))
        schema, size = make(0)
        if self._definitions:
            schema = {
                **schema,
                "$defs": {name: made[0] for name, made in self._definitions.items()},
            }
        return schema, size

    def _value(self, level: int) -> _Made:
        flat: list[Callable[[], _Made]] = [
            self._string,
            self._pattern,
            self._choice,
            self._integer,
            self._number,
            self._constant,
            lambda: ({"type": "boolean"}, 5),
            lambda: ({"type": "null"}, 4),
        ]
        nested: list[Callable[[int], _Made]] = [
            self._object,
            self._array,
            self._tuple,
            self._any_of,
        ]
        if self._definitions and self._chance.random() < 0.2:  # noqa: PLR2004
            return self._reference()
        if level < NESTING_MAX and self._chance.random() < 0.4:  # noqa: PLR2004
            return self._chance.choice(nested)(level + 1)
        return self._chance.choice(flat)()

    def _object(self, level: int) -> _Made:
        chance = self._chance
        names = [f"{chance.choice('abcdef')}{number}" for number in range(chance.randint(1, 4))]
        properties: Schema = {}
        size = 2
        for name in names:
            schema, longest = self._value(level)
            properties[name] = schema
            size += len(name) + len('"":,') + longest
        made: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
        required = [name for name in names if chance.random() < 0.7]  # noqa: PLR2004
        if required:
            made["required"] = required
        return made, size

    def _array(self, level: int) -> _Made:
        items, longest = self._value(level)
        most = self._chance.randint(0, 3)
        least = self._chance.randint(0, most)
        made: Schema = {"type": "array", "items": items, "minItems": least, "maxItems": most}
        return made, 2 + most * (longest + 1)

    def _tuple(self, level: int) -> _Made:
        made = [self._value(level) for _ in range(self._chance.randint(1, 3))]
        schema: Schema = {
            "type": "array",
            "prefixItems": [item for item, _ in made],
            "items": False,
            "minItems": len(made),
        }
        return schema, 2 + sum(longest + 1 for _, longest in made)

    def _any_of(self, level: int) -> _Made:
        made = [self._value(level) for _ in range(self._chance.randint(2, 3))]
        return {"anyOf": [schema for schema, _ in made]}, max(longest for _, longest in made)

    def _reference(self) -> _Made:
        name = self._chance.choice(sorted(self._definitions))
        return {"$ref": f"#/$defs/{name}"}, self._definitions[name][1]

    def _string(self) -> _Made:
        most = self._chance.randint(0, 8)
        made: Schema = {"type": "string", "maxLength": most}
        if most and self._chance.random() < 0.5:  # noqa: PLR2004
            made["minLength"] = self._chance.randint(1, most)
        return made, 2 + _CHARACTER * most

    def _pattern(self) -> _Made:
        pattern, longest = self._chance.choice(_PATTERNS)
        return {"type": "string", "pattern": pattern}, 2 + _CHARACTER * longest

    def _choice(self) -> _Made:
        words: list[object] = [*_WORDS, 0, -7, 3.5, True, None]
        return _listed("enum", self._chance.sample(words, self._chance.randint(1, 5)))

    def _constant(self) -> _Made:
        values: list[object] = [*_WORDS, 12, False, [1, "x"], {"k": []}]
        value = self._chance.choice(values)
        return {"const": value}, _longest([value])

    def _integer(self) -> _Made:
        low = self._chance.randint(-1000, 1000)
        high = low + self._chance.randint(0, 2000)
        made: Schema = {"type": "integer", "minimum": low, "maximum": high}
        if high - low >= 5 and self._chance.random() < 0.3:  # noqa: PLR2004
            made["multipleOf"] = self._chance.choice((2, 3, 5))
        return made, 5

    def _number(self) -> _Made:
        # Quarters, because without an end to the digits an output has none either.
        low = self._chance.randint(-100, 100)
        high = low + self._chance.randint(1, 100)
        return {"type": "number", "minimum": low, "maximum": high, "multipleOf": 0.25}, 8


def _listed(keyword: str, values: list[object]) -> _Made:
    return {keyword: values}, _longest(values)


def _longest(values: list[object]) -> int:
    """Length of the longest of some values, every character of a string as an escape."""
    return max(_CHARACTER * len(json.dumps(value, ensure_ascii=False)) for value in values)
