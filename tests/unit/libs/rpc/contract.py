"""All services of the contract, for tests that hold for every method and message."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import (
    Descriptor,
    FileDescriptor,
    MethodDescriptor,
    ServiceDescriptor,
)

from libs.rpc.policy import MethodPolicy, policy_of

PROTOS = Path(__file__).resolve().parents[4] / "protos"


def files() -> list[FileDescriptor]:
    """Every file below protos/."""
    found = []
    for path in sorted(PROTOS.rglob("*.proto")):
        module = ".".join(path.relative_to(PROTOS).with_suffix("").parts) + "_pb2"
        found.append(importlib.import_module(module).DESCRIPTOR)
    return found


def services() -> list[ServiceDescriptor]:
    """Every service."""
    return [service for file in files() for service in file.services_by_name.values()]


def methods() -> list[MethodDescriptor]:
    """Every method."""
    return [method for service in services() for method in service.methods]


def policies() -> list[MethodPolicy]:
    """The policy of every method."""
    return [policy_of(method) for method in methods()]


def messages() -> Iterator[Descriptor]:
    """Every message, nested ones included."""

    def inside(message: Descriptor) -> Iterator[Descriptor]:
        yield message
        for nested in message.nested_types:
            yield from inside(nested)

    for file in files():
        for message in file.message_types_by_name.values():
            yield from inside(message)
