"""Field limits of the contract, enforced before a method runs.

For each message type a checker is compiled from the descriptors once; a message without limits
costs nothing. The first bad fields are reported with their paths, never with their values.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from maas.common.v1 import options_pb2

from libs.errors import FieldRule, InvalidArgument, Violation

VIOLATIONS_MAX = 16

Check = Callable[[Any, str, list[Violation]], None]
"""Takes a value, its path, and where to put violations."""

_NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
    FieldDescriptor.CPPTYPE_DOUBLE,
    FieldDescriptor.CPPTYPE_FLOAT,
}


class Validator:
    """Checks messages against their contract. Compiled checkers are kept; types are few."""

    def __init__(self) -> None:
        self._checks: dict[str, list[Check]] = {}

    def prepare(self, descriptor: Any) -> None:
        """Compiles the checker of a message type ahead of its first use."""
        self._of(descriptor)

    def check(self, message: Message) -> None:
        """Checks a request.

        Raises:
            InvalidArgument: with a violation for each bad field, at most 16.
        """
        checks = self._of(message.DESCRIPTOR)
        if not checks:
            return
        found: list[Violation] = []
        for check in checks:
            check(message, "", found)
        if found:
            first = found[0]
            raise InvalidArgument(
                f"{first.field}: {first.description}",
                metadata={"field": first.field},
                violations=found[:VIOLATIONS_MAX],
            )

    def _of(self, descriptor: Any) -> list[Check]:
        known = self._checks.get(descriptor.full_name)
        if known is not None:
            return known
        checks: list[Check] = []
        # Entered before its fields are compiled, so that a recursive type ends here.
        self._checks[descriptor.full_name] = checks
        for field in descriptor.fields:
            check = self._field(field)
            if check is not None:
                checks.append(check)
        return checks

    def _field(self, field: FieldDescriptor) -> Check | None:
        rules = field.GetOptions().Extensions[options_pb2.rules]
        value_checks = _value_checks(field, rules)
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE and not _is_map(field):
            nested = self._of(field.message_type)
            if nested:
                value_checks = [*value_checks, _nested(nested)]
        if field.is_repeated:
            return _repeated(field, rules, value_checks)
        if not value_checks and not rules.required:
            return None
        return _single(field, rules, value_checks)


def _is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type is not None and field.message_type.GetOptions().map_entry)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _nested(checks: list[Check]) -> Check:
    def check(value: Any, path: str, found: list[Violation]) -> None:
        for inner in checks:
            inner(value, path, found)

    return check


def _single(field: FieldDescriptor, rules: options_pb2.FieldRules, checks: list[Check]) -> Check:
    name = field.name
    has_presence = field.has_presence
    # A field marked optional stands in a oneof of its own, named after it.
    choice = field.containing_oneof
    in_choice = choice is not None and choice.name != f"_{name}"
    required = rules.required

    def check(message: Any, path: str, found: list[Violation]) -> None:
        if has_presence and not message.HasField(name):
            if required and not in_choice:
                found.append(Violation(_join(path, name), FieldRule.REQUIRED, "is required"))
            return
        value = getattr(message, name)
        if not value and not isinstance(value, Message):
            if required:
                found.append(Violation(_join(path, name), FieldRule.REQUIRED, "must not be empty"))
                return
            if not has_presence:
                return
        for inner in checks:
            inner(value, _join(path, name), found)

    return check


def _repeated(
    field: FieldDescriptor, rules: options_pb2.FieldRules, checks: list[Check]
) -> Check | None:
    name = field.name
    required = rules.required
    most = rules.max_items if rules.HasField("max_items") else None
    if not checks and not required and most is None:
        return None

    def check(message: Any, path: str, found: list[Violation]) -> None:
        items = getattr(message, name)
        if not items:
            if required:
                found.append(Violation(_join(path, name), FieldRule.REQUIRED, "must not be empty"))
            return
        if most is not None and len(items) > most:
            found.append(
                Violation(_join(path, name), FieldRule.TOO_MANY, f"has more than {most} items")
            )
            return
        for index, item in enumerate(items if checks else ()):
            for inner in checks:
                inner(item, f"{_join(path, name)}[{index}]", found)
            if len(found) >= VIOLATIONS_MAX:
                return

    return check


def _value_checks(field: FieldDescriptor, rules: options_pb2.FieldRules) -> list[Check]:
    checks: list[Check] = []
    if field.cpp_type in _NUMBERS and (rules.HasField("gte") or rules.HasField("lte")):
        checks.append(_range(rules))
    if rules.HasField("max_bytes"):
        checks.append(_length(rules.max_bytes, is_text=field.type == FieldDescriptor.TYPE_STRING))
    if rules.pattern:
        checks.append(_pattern(rules.pattern))
    if rules.defined_only and field.enum_type is not None:
        checks.append(_defined(set(field.enum_type.values_by_number)))
    return checks


def _range(rules: options_pb2.FieldRules) -> Check:
    low = rules.gte if rules.HasField("gte") else float("-inf")
    high = rules.lte if rules.HasField("lte") else float("inf")
    text = f"must be between {_number(low)} and {_number(high)}"

    def check(value: Any, path: str, found: list[Violation]) -> None:
        # Written so that not-a-number, which compares false, is refused.
        if not low <= value <= high:
            found.append(Violation(path, FieldRule.OUT_OF_RANGE, text))

    return check


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else str(value)


def _length(most: int, *, is_text: bool) -> Check:
    def check(value: Any, path: str, found: list[Violation]) -> None:
        # PostgreSQL stores no NUL in a text, and C interfaces end at it.
        if is_text and "\0" in value:
            found.append(Violation(path, FieldRule.BAD_FORMAT, "must not contain NUL"))
            return
        # A character has at most 4 bytes: most texts need no encoding to be measured.
        if len(value) * (4 if is_text else 1) <= most:
            return
        size = len(value.encode("utf-8")) if is_text else len(value)
        if size > most:
            found.append(Violation(path, FieldRule.TOO_LONG, f"is longer than {most} bytes"))

    return check


def _pattern(pattern: str) -> Check:
    expression = re.compile(pattern)

    def check(value: Any, path: str, found: list[Violation]) -> None:
        if expression.fullmatch(value) is None:
            found.append(Violation(path, FieldRule.BAD_FORMAT, f"must match {pattern}"))

    return check


def _defined(numbers: set[int]) -> Check:
    def check(value: Any, path: str, found: list[Violation]) -> None:
        if value not in numbers:
            found.append(Violation(path, FieldRule.UNKNOWN_ENUM, "is not a known value"))

    return check
