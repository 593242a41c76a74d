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
# Messages in all repeated fields of a request together, one inside another: each takes two
# microseconds of everybody's event loop. Limits of single fields multiply, and allow a million.
ITEMS_MAX = 16_384


class Found(list[Violation]):
    """Violations so far, and how many more items may be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.items_left = ITEMS_MAX


Check = Callable[[Any, Found], None]
"""Takes a message and where to put violations, with paths that begin at this message.

A path is put together only where something is wrong, so that most calls never pay for it.
"""

ValueCheck = Callable[[Any], "Fault | None"]
"""Takes a value and says what is wrong with it."""

Fault = tuple[FieldRule, str]
"""Which rule was broken, and how, for people."""

_NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
    FieldDescriptor.CPPTYPE_DOUBLE,
    FieldDescriptor.CPPTYPE_FLOAT,
}
_LENGTHS = {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES}


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
        found = Found()
        for check in checks:
            check(message, found)
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
        if _is_map(field):
            return _map(field, rules)
        value_checks = _value_checks(field, rules)
        nested: list[Check] = []
        if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
            nested = self._of(field.message_type)
        if field.is_repeated:
            return _repeated(field, rules, value_checks, nested)
        if not value_checks and not nested and not rules.required:
            return None
        if field.message_type is not None:
            return _message(field, rules, nested)
        return _scalar(field, rules, value_checks)


def _is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type is not None and field.message_type.GetOptions().map_entry)


def _add_nested(checks: list[Check], message: Any, path: str, found: Found) -> None:
    """Checks a message inside another; what is found there gets the path to it."""
    before = len(found)
    for check in checks:
        check(message, found)
    for place in range(before, len(found)):
        inner = found[place]
        found[place] = Violation(f"{path}.{inner.field}", inner.rule, inner.description)


def _needs_presence(field: FieldDescriptor, rules: options_pb2.FieldRules) -> bool:
    """Tells whether a field that knows presence has to be there."""
    # A field marked optional stands in a oneof of its own, named after it.
    choice = field.containing_oneof
    return rules.required and (choice is None or choice.name == f"_{field.name}")


def _message(field: FieldDescriptor, rules: options_pb2.FieldRules, nested: list[Check]) -> Check:
    name = field.name
    required = _needs_presence(field, rules)

    def check(message: Any, found: Found) -> None:
        if message.HasField(name):
            _add_nested(nested, getattr(message, name), name, found)
        elif required:
            found.append(Violation(name, FieldRule.REQUIRED, "is required"))

    return check


def _scalar(
    field: FieldDescriptor, rules: options_pb2.FieldRules, checks: list[ValueCheck]
) -> Check:
    name = field.name
    has_presence = field.has_presence
    needs_presence = _needs_presence(field, rules)
    required = rules.required

    def check(message: Any, found: Found) -> None:
        value = getattr(message, name)
        if not value:
            # Most values say themselves that they are set.
            if has_presence and not message.HasField(name):
                if needs_presence:
                    found.append(Violation(name, FieldRule.REQUIRED, "is required"))
                return
            if required:
                found.append(Violation(name, FieldRule.REQUIRED, "must not be empty"))
                return
            if not has_presence:
                return
        for inspect in checks:
            fault = inspect(value)
            if fault is not None:
                found.append(Violation(name, *fault))

    return check


def _repeated(
    field: FieldDescriptor,
    rules: options_pb2.FieldRules,
    checks: list[ValueCheck],
    nested: list[Check],
) -> Check | None:
    name = field.name
    required = rules.required
    most = rules.max_items if rules.HasField("max_items") else None
    check_items = _items(name, checks, nested) if checks or nested else None
    if check_items is None and not required and most is None:
        return None

    def check(message: Any, found: Found) -> None:
        items = getattr(message, name)
        if not items:
            if required:
                found.append(Violation(name, FieldRule.REQUIRED, "must not be empty"))
            return
        if most is not None and len(items) > most:
            found.append(Violation(name, FieldRule.TOO_MANY, f"has more than {most} items"))
            return
        if check_items is not None:
            check_items(items, found)

    return check


def _map(field: FieldDescriptor, rules: options_pb2.FieldRules) -> Check | None:
    """Makes the check of a map of scalars: pattern is of the keys, a range of the values."""
    name = field.name
    assert field.message_type is not None
    entry = field.message_type.fields_by_name
    most = rules.max_items if rules.HasField("max_items") else None
    of_key, of_value = options_pb2.FieldRules(), options_pb2.FieldRules()
    of_key.CopyFrom(rules)
    of_value.CopyFrom(rules)
    for bound in ("gte", "lte"):
        of_key.ClearField(bound)
    of_value.ClearField("pattern")
    key_checks = _value_checks(entry["key"], of_key)
    value_checks = _value_checks(entry["value"], of_value)
    if not key_checks and not value_checks and most is None and not rules.required:
        return None

    def check(message: Any, found: Found) -> None:
        entries = getattr(message, name)
        if not entries:
            if rules.required:
                found.append(Violation(name, FieldRule.REQUIRED, "must not be empty"))
            return
        if most is not None and len(entries) > most:
            found.append(Violation(name, FieldRule.TOO_MANY, f"has more than {most} entries"))
            return
        # In the order of keys: that of a map on the wire means nothing.
        for place, key in enumerate(sorted(entries)):
            # A key that breaks its rules is not repeated: it may be long, or a secret.
            faults = [inspect(key) for inspect in key_checks]
            path = f"{name}[{key}]" if not any(faults) else f"{name}.key[{place}]"
            faults += [inspect(entries[key]) for inspect in value_checks]
            found.extend(Violation(path, *fault) for fault in faults if fault is not None)
            if len(found) >= VIOLATIONS_MAX:
                return

    return check


def _items(name: str, checks: list[ValueCheck], nested: list[Check]) -> Check:
    """Makes what checks the items of a repeated field, one by one."""

    def check_items(items: Any, found: Found) -> None:
        if nested:
            found.items_left -= len(items)
            if found.items_left < 0:
                description = f"brings the items of the request above {ITEMS_MAX}"
                found.append(Violation(name, FieldRule.TOO_MANY, description))
                return
        for index, item in enumerate(items):
            for inspect in checks:
                fault = inspect(item)
                if fault is not None:
                    found.append(Violation(f"{name}[{index}]", *fault))
            if nested:
                _add_nested(nested, item, f"{name}[{index}]", found)
            if len(found) >= VIOLATIONS_MAX or found.items_left < 0:
                return

    return check_items


def _value_checks(field: FieldDescriptor, rules: options_pb2.FieldRules) -> list[ValueCheck]:
    checks: list[ValueCheck] = []
    if field.cpp_type in _NUMBERS and (rules.HasField("gte") or rules.HasField("lte")):
        checks.append(_range(rules))
    if rules.HasField("max_bytes") and field.type in _LENGTHS:
        checks.append(_length(rules.max_bytes, is_text=field.type == FieldDescriptor.TYPE_STRING))
    if rules.pattern:
        checks.append(_pattern(rules.pattern))
    if rules.defined_only and field.enum_type is not None:
        checks.append(_defined(set(field.enum_type.values_by_number)))
    return checks


def _range(rules: options_pb2.FieldRules) -> ValueCheck:
    low = rules.gte if rules.HasField("gte") else float("-inf")
    high = rules.lte if rules.HasField("lte") else float("inf")
    fault = (FieldRule.OUT_OF_RANGE, f"must be between {_number(low)} and {_number(high)}")
    # Written so that not-a-number, which compares false, is refused.
    return lambda value: None if low <= value <= high else fault


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else str(value)


def _length(most: int, *, is_text: bool) -> ValueCheck:
    too_long = (FieldRule.TOO_LONG, f"is longer than {most} bytes")

    def check_text(value: str) -> Fault | None:
        # PostgreSQL stores no NUL in a text, and C interfaces end at it.
        if "\0" in value:
            return FieldRule.BAD_FORMAT, "must not contain NUL"
        # A character has at most 4 bytes: most texts need no encoding to be measured.
        if len(value) * 4 <= most or len(value.encode("utf-8")) <= most:
            return None
        return too_long

    return check_text if is_text else lambda value: too_long if len(value) > most else None


def _pattern(pattern: str) -> ValueCheck:
    matches = re.compile(pattern).fullmatch
    fault = (FieldRule.BAD_FORMAT, f"must match {pattern}")
    return lambda value: fault if matches(value) is None else None


def _defined(numbers: set[int]) -> ValueCheck:
    fault = (FieldRule.UNKNOWN_ENUM, "is not a known value")
    return lambda value: None if value in numbers else fault
