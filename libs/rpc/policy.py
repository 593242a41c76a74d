"""What the contract says about methods: read from the descriptors, never listed twice."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from maas.common.v1 import options_pb2


class Audience(enum.IntEnum):
    """Who a method is for, with the numbers of maas.common.v1.Audience."""

    PUBLIC = options_pb2.AUDIENCE_PUBLIC
    ADMIN = options_pb2.AUDIENCE_ADMIN
    INTERNAL = options_pb2.AUDIENCE_INTERNAL
    ANONYMOUS = options_pb2.AUDIENCE_ANONYMOUS


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodPolicy:
    """Treatment of one method.

    Attributes:
        method: "package.Service/Method".
        audience: who may reach it.
        permission: what the caller's role has to grant; empty for internal methods.
        default_deadline_s: for calls that come without one; None for endless streams.
        is_retry_safe: a client library may repeat it on UNAVAILABLE.
    """

    method: str
    audience: Audience
    permission: str
    default_deadline_s: float | None
    is_retry_safe: bool


def policy_of(method: MethodDescriptor) -> MethodPolicy:
    """Reads the policy of a method.

    Raises:
        ValueError: the method has none, which a test of the contracts excludes.
    """
    options = method.GetOptions().Extensions[options_pb2.method_policy]
    name = f"{method.containing_service.full_name}/{method.name}"
    if options.audience == options_pb2.AUDIENCE_UNSPECIFIED:
        raise ValueError(f"{name} has no method_policy")
    deadline = options.default_deadline
    seconds = deadline.seconds + deadline.nanos / 1e9
    return MethodPolicy(
        method=name,
        audience=Audience(options.audience),
        permission=options.permission,
        default_deadline_s=seconds if options.HasField("default_deadline") else None,
        is_retry_safe=options.retry_mode
        in {options_pb2.RETRY_MODE_SAFE, options_pb2.RETRY_MODE_WITH_REQUEST_ID},
    )


def policies_of(service: ServiceDescriptor) -> dict[str, MethodPolicy]:
    """Reads the policies of a service, by method name."""
    return {method.name: policy_of(method) for method in service.methods}


def service_config(services: list[ServiceDescriptor]) -> str:
    """Writes the gRPC service config of a client: bounded retries where the contract allows."""
    safe = [
        {"service": service.full_name, "method": name}
        for service in services
        for name, policy in policies_of(service).items()
        if policy.is_retry_safe and policy.default_deadline_s is not None
    ]
    retry = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps(
        {
            "methodConfig": [{"name": safe, "retryPolicy": retry}] if safe else [],
            "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
        }
    )
