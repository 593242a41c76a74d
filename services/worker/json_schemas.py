"""JSON Schemas of tenants: what is refused before llguidance sees them. Pure.

Bounds come first, as parsing, checking and compiling are only affordable within them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeGuard
from urllib.parse import unquote

from jsonschema import Draft202012Validator

from services.worker.regexes import RegexInvalid, check_regex

NESTING_MAX = 64
# Checking one against the metaschema takes 0.2 ms.
SUBSCHEMAS_MAX = 500
# Of a multipleOf, without its exponent: llguidance makes a state for each remainder.
DIVISOR_MAX = 5000
NUMBER_MAX = 10**30
# Looks at subschemas to find out whether anything finite matches; 1 us each.
LOOKS_MAX = 20_000

_ONE = frozenset(
    {
        "additionalProperties",
        "contains",
        "else",
        "if",
        "items",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_MAPS = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
_NUMBERS = frozenset({"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum"})
# A place in a list, as JSON pointers say it; not so long that Python refuses to read it.
_PLACE = re.compile(r"0|[1-9][0-9]{0,6}")
_METASCHEMA = Draft202012Validator(Draft202012Validator.META_SCHEMA)

Schema = dict[str, object] | bool


class SchemaInvalid(Exception):
    """It is no JSON Schema, or one that is refused. The message quotes only what is short."""


@dataclass(frozen=True, slots=True)
class CheckedSchema:
    """A schema that has passed.

    Attributes:
        schema: parsed; without the wishes to llguidance that a tenant may have put into it.
        subschemas: how many there are in it, with itself.
    """

    schema: Schema
    subschemas: int


def check_schema(text: str) -> CheckedSchema:
    """Parses and checks a schema.

    Args:
        text: JSON.

    Raises:
        SchemaInvalid: it is no JSON Schema (2020-12), refers to other documents, nothing finite
            matches it, or it is larger than the bounds.
    """
    schema = _parse(text)
    if not isinstance(schema, (dict, bool)):
        raise SchemaInvalid("has to be an object, true or false")
    if schema is False:
        raise SchemaInvalid("matches nothing")
    if isinstance(schema, bool):
        return CheckedSchema(schema, 1)
    _check_nesting(schema)
    schema.pop("x-guidance", None)
    subschemas = list(_subschemas(schema))
    for subschema in subschemas:
        _check_keywords(subschema)
    error = next(_METASCHEMA.iter_errors(schema), None)
    if error is not None:
        place = "".join(f"/{part}" for part in error.absolute_path)[:100]
        raise SchemaInvalid(f"breaks the rules of JSON Schema at {place or 'its top'}")
    if not _Finiteness(schema, subschemas).holds():
        raise SchemaInvalid("matches nothing finite")
    return CheckedSchema(schema, len(subschemas))


def _parse(text: str) -> object:
    try:
        value: object = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise SchemaInvalid(f"is nested deeper than {NESTING_MAX}") from None
    except ValueError:
        raise SchemaInvalid("is no JSON") from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _check_nesting(schema: object) -> None:
    level: list[object] = [schema]
    for _ in range(NESTING_MAX):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise SchemaInvalid(f"is nested deeper than {NESTING_MAX}")


def _children(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _subschemas(schema: dict[str, object]) -> Iterator[dict[str, object]]:
    """Yields a schema and all schemas in it that are objects."""
    waiting: list[object] = [schema]
    count = 0
    while waiting:
        count += 1
        if count > SUBSCHEMAS_MAX:
            raise SchemaInvalid(f"has more than {SUBSCHEMAS_MAX} subschemas")
        subschema = waiting.pop()
        if not _is_object(subschema):
            continue
        yield subschema
        for keyword, value in subschema.items():
            if keyword in _ONE:
                waiting.append(value)
            elif (keyword in _LISTS and isinstance(value, list)) or (
                keyword in _MAPS and isinstance(value, dict)
            ):
                waiting.extend(_children(value))


def _is_object(value: object) -> TypeGuard[dict[str, object]]:
    return isinstance(value, dict)


def _check_keywords(schema: dict[str, object]) -> None:
    reference = schema.get("$ref", "#")
    if not (isinstance(reference, str) and reference.startswith("#")):
        raise SchemaInvalid("refers to another document")
    for keyword in _NUMBERS & schema.keys():
        limit = schema[keyword]
        if isinstance(limit, (int, float)) and abs(limit) > NUMBER_MAX:
            raise SchemaInvalid(f"{keyword} is beyond {NUMBER_MAX:.0e}")
    if len(_list_of(schema.get("required"))) > SUBSCHEMAS_MAX:
        raise SchemaInvalid(f"requires more than {SUBSCHEMAS_MAX} properties")
    divisor = schema.get("multipleOf")
    if isinstance(divisor, (int, float)) and _coefficient(divisor) > DIVISOR_MAX:
        raise SchemaInvalid(f"multipleOf has more than {DIVISOR_MAX} remainders")
    patterns = [schema.get("pattern")]
    named = schema.get("patternProperties")
    if isinstance(named, dict):
        patterns.extend(named)
    for pattern in patterns:
        if isinstance(pattern, str):
            try:
                check_regex(pattern)
            except RegexInvalid as error:
                raise SchemaInvalid(f"a pattern: {error}") from None


def _coefficient(value: float) -> int:
    number = Decimal(str(value)).normalize()
    if abs(number) > NUMBER_MAX:
        return DIVISOR_MAX + 1
    return abs(
        int(
            number
            if number == number.to_integral_value()
            else number.scaleb(-int(number.as_tuple().exponent))
        )
    )


class _Finiteness:
    """Whether anything finite matches a schema that may refer to itself.

    A least fixed point over what is referred to: a place holds once something matches it without
    the help of places that do not hold yet. What else a schema asks for is not looked at.
    """

    def __init__(self, schema: Schema, subschemas: Sequence[dict[str, object]]) -> None:
        self._schema = schema
        self._looks = 0
        self._holding: set[str] = set()
        self._targets: dict[str, object] = {}
        for subschema in subschemas:
            reference = subschema.get("$ref")
            if isinstance(reference, str):
                self._targets[reference] = _resolve(schema, reference)

    def holds(self) -> bool:
        """Decides, in rounds over what has not been decided.

        Raises:
            SchemaInvalid: that takes too long.
        """
        waiting = dict(self._targets)
        while waiting:
            # From both ends in turn: a chain of references takes two rounds in either order.
            left: dict[str, object] = {}
            for name, target in reversed(waiting.items()):
                if self._matches(target):
                    self._holding.add(name)
                else:
                    left[name] = target
            if len(left) == len(waiting):
                break
            waiting = left
        return self._matches(self._schema)

    def _matches(self, schema: object) -> bool:
        self._looks += 1
        if self._looks > LOOKS_MAX:
            raise SchemaInvalid("refers to itself in too many ways")
        if not _is_object(schema):
            return schema is not False
        if "enum" in schema or "const" in schema:
            return True
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in self._holding:
            return False
        if not all(map(self._matches, _list_of(schema.get("allOf")))):
            return False
        for keyword in ("anyOf", "oneOf"):
            choices = _list_of(schema.get(keyword))
            if choices and not any(map(self._matches, choices)):
                return False
        kinds = schema.get("type", "any")
        return any(
            self._matches_kind(schema, kind)
            for kind in (kinds if isinstance(kinds, list) else [kinds])
        )

    def _matches_kind(self, schema: Mapping[str, object], kind: object) -> bool:
        if kind == "object":
            properties = schema.get("properties")
            known = properties if _is_object(properties) else {}
            more = schema.get("additionalProperties", True)
            names = [name for name in _list_of(schema.get("required")) if isinstance(name, str)]
            return all(self._matches(known.get(name, more)) for name in names)
        if kind == "array":
            least = schema.get("minItems", 0)
            first = _list_of(schema.get("prefixItems"))
            count = int(least) if isinstance(least, (int, float)) else 0
            items = [*first[:count], *([schema.get("items", True)] if count > len(first) else [])]
            return all(map(self._matches, items))
        return True


def _list_of(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _resolve(schema: object, reference: str) -> object:
    """Returns what a JSON pointer points to; True for an anchor, which llguidance looks up."""
    if reference == "#":
        return schema
    if not reference.startswith("#/"):
        return True
    place = schema
    for part in unquote(reference[2:]).split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if _is_object(place) and name in place:
            place = place[name]
        elif isinstance(place, list) and _PLACE.fullmatch(name) and int(name) < len(place):
            place = place[int(name)]
        else:
            raise SchemaInvalid("refers to what is not there")
    return place
