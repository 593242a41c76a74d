"""What a model can do, held against what a request asks for.

Which flag of maas.common.v1.Capabilities a field depends on stands in the contract, as the rule
`needs` of the field. From it derive the refusals here, the table in docs/capabilities.md and the
test of every flag on every engine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from maas.common.v1 import capabilities_pb2, options_pb2

from libs.errors import FieldRule, InvalidArgument, invalid_field, unsupported

FLAGS: tuple[str, ...] = tuple(capabilities_pb2.Capabilities.DESCRIPTOR.fields_by_name)
"""Names of all flags, in the order of the contract."""

NUMBERS = frozenset(
    name
    for name, field in capabilities_pb2.Capabilities.DESCRIPTOR.fields_by_name.items()
    if field.cpp_type != FieldDescriptor.CPPTYPE_BOOL
)
"""Flags that are a number: the largest value of a field."""

# A request always has one output.
_LEAST = {"max_outputs": 1}


@dataclass(frozen=True, slots=True)
class Need:
    """A field that depends on a flag.

    Attributes:
        path: of the field from the message on; "tools.tools[].strict" for an item of a list.
        flag: that it depends on.
    """

    path: str
    flag: str


@dataclass(frozen=True, slots=True)
class _Field:
    """A field that depends on a flag, or has fields inside that do.

    Attributes:
        name: of the field.
        flag: that it depends on; empty for none.
        has_presence: whether it knows that it is set.
        is_list: whether it is repeated.
        inside: fields of its message.
    """

    name: str
    flag: str
    has_presence: bool
    is_list: bool
    inside: tuple[_Field, ...]


def intersection(many: Iterable[capabilities_pb2.Capabilities]) -> capabilities_pb2.Capabilities:
    """Returns what all of them can do: of flags the conjunction, of numbers the smallest.

    Raises:
        ValueError: there is none.
    """
    found = list(many)
    if not found:
        raise ValueError("nobody can do anything")
    # Of booleans the smallest is the conjunction.
    return capabilities_pb2.Capabilities(
        **{flag: min(getattr(one, flag) for one in found) for flag in FLAGS}
    )


def needs(descriptor: Descriptor) -> list[Need]:
    """Lists the fields of a message, nested ones included, that depend on a flag."""

    def walk(fields: tuple[_Field, ...], prefix: str) -> Iterator[Need]:
        for field in fields:
            path = f"{prefix}{field.name}"
            if field.flag:
                yield Need(path, field.flag)
            yield from walk(field.inside, f"{path}[]." if field.is_list else f"{path}.")

    return list(walk(_fields(descriptor), ""))


def require(
    message: Message, capabilities: capabilities_pb2.Capabilities, *, model: str, prefix: str
) -> None:
    """Sees that a request asks for nothing that its model cannot do.

    Args:
        message: the request, or the part of it that says what to do.
        capabilities: of the model.
        model: what to call it in the refusal.
        prefix: path of the message, as "spec"; empty for the request itself.

    Raises:
        InvalidArgument: a field depends on a flag that is false, with FEATURE_UNSUPPORTED; or is
            larger than the number that the flag is, with OUT_OF_RANGE. Names the first such field.
    """
    found = _first(message, _fields(message.DESCRIPTOR), capabilities)
    if found is None:
        return
    path, field, value = found
    path = f"{prefix}.{path}" if prefix else path
    limit = _limit(field.flag, capabilities)
    if limit and isinstance(value, int):
        raise invalid_field(path, FieldRule.OUT_OF_RANGE, f"must be at most {limit} for this model")
    raise cannot(path, field.flag, model=model)


def cannot(path: str, flag: str, *, model: str) -> InvalidArgument:
    """Makes the refusal of a field whose flag is false."""
    return unsupported(path, f"the model cannot do this ({flag})", feature=flag, model=model)


@functools.cache  # Message types are few.
def _fields(descriptor: Descriptor) -> tuple[_Field, ...]:
    found = []
    for field in descriptor.fields:
        flag = field.GetOptions().Extensions[options_pb2.rules].needs
        inside: tuple[_Field, ...] = ()
        # Types of this contract only, and none holds itself.
        if field.message_type is not None and field.message_type.full_name.startswith("maas."):
            inside = _fields(field.message_type)
        if flag or inside:
            found.append(
                _Field(field.name, flag, field.has_presence, bool(field.is_repeated), inside)
            )
    return tuple(found)


def _first(
    message: Any,  # noqa: ANN401 - any message of the contract
    fields: tuple[_Field, ...],
    capabilities: capabilities_pb2.Capabilities,
) -> tuple[str, _Field, object] | None:
    """Finds the first field that asks for too much: its path, what it is, and its value."""
    for field in fields:
        name = field.name
        if field.has_presence and not message.HasField(name):
            continue
        value = getattr(message, name)
        if not field.has_presence and not value:
            continue
        if field.flag and not _suffices(field.flag, value, capabilities):
            return name, field, value
        if not field.inside:
            continue
        items = enumerate(value) if field.is_list else ((None, value),)
        for place, item in items:
            inner = _first(item, field.inside, capabilities)
            if inner is not None:
                head = name if place is None else f"{name}[{place}]"
                return f"{head}.{inner[0]}", *inner[1:]
    return None


def _suffices(flag: str, value: object, capabilities: capabilities_pb2.Capabilities) -> bool:
    limit = _limit(flag, capabilities)
    if flag in NUMBERS and isinstance(value, int):
        return value <= limit
    return bool(limit)


def _limit(flag: str, capabilities: capabilities_pb2.Capabilities) -> int:
    limit: int = getattr(capabilities, flag)
    return max(limit, _LEAST.get(flag, 0))
