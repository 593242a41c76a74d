"""Errors to gRPC statuses and back: the only place that knows both."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from libs.errors import (
    BY_CODE,
    Code,
    FieldRule,
    Internal,
    MaasError,
    Reason,
    Unavailable,
    Violation,
)
from libs.limits import STATUS_DETAILS_BYTES_MAX

DOMAIN = "maas"
DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
LOST_RETRY_S = 0.5
"""When a call is worth repeating whose server went away: one that restarts is back soon."""

_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}
_DOMAIN_REASONS = {reason.value: reason for reason in Reason}
_FIELD_RULES = {rule.value: rule for rule in FieldRule}


def grpc_code(code: Code) -> grpc.StatusCode:
    """Returns grpc's name of a code."""
    return _BY_NUMBER[int(code)]


def _details(error: MaasError, request_id: str) -> list[Message]:
    """Lists the details of an error, the ones to drop first last."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            domain=DOMAIN, reason=error.reason.value, metadata=error.metadata
        ),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(retry)
    if error.reason is Reason.INSUFFICIENT_CREDIT:
        details.append(
            error_details_pb2.PreconditionFailure(
                violations=[
                    error_details_pb2.PreconditionFailure.Violation(
                        type="CREDIT",
                        subject=error.metadata.get("account", ""),
                        description=error.message,
                    )
                ]
            )
        )
    if "limit" in error.metadata and error.code is Code.RESOURCE_EXHAUSTED:
        details.append(
            error_details_pb2.QuotaFailure(
                violations=[
                    error_details_pb2.QuotaFailure.Violation(
                        subject=error.metadata["limit"], description=error.message
                    )
                ]
            )
        )
    if "resource" in error.metadata:
        details.append(error_details_pb2.ResourceInfo(resource_name=error.metadata["resource"]))
    if error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=item.field, reason=item.rule.value, description=item.description
                    )
                    for item in error.violations
                ]
            )
        )
    return details


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def trailers(error: MaasError, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    """Returns the trailing metadata that carries an error, within the bound of trailers."""
    packed = [_pack(detail) for detail in _details(error, request_id)]
    status = status_pb2.Status(code=int(error.code), message=error.message, details=packed)
    while status.ByteSize() > STATUS_DETAILS_BYTES_MAX and len(packed) > 1:
        packed.pop()
        status = status_pb2.Status(code=int(error.code), message=error.message, details=packed)
    found: list[tuple[str, str | bytes]] = [
        (DETAILS_KEY, status.SerializeToString()),
        (REQUEST_ID_KEY, request_id),
    ]
    if error.code is Code.UNAVAILABLE and error.retry_after_s is not None:
        found.append((PUSHBACK_KEY, str(int(error.retry_after_s * 1000))))
    return tuple(found)


def error_of(failure: grpc.aio.AioRpcError) -> MaasError:
    """Turns the status of a failed call into the error that the server raised.

    A status without our details (a lost connection, a proxy, a foreign server) becomes the error
    of its code with that class's default reason. UNAVAILABLE is gRPC's own then: its words name
    addresses inside the suite, which are not for whoever the error is handed on to.
    """
    code = Code(failure.code().value[0])
    kind = BY_CODE.get(code, Internal)
    message = failure.details() or code.name
    for key, value in failure.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return _from_details(kind, message, value)
    if code is Code.UNAVAILABLE:
        return Unavailable("the connection was lost", retry_after_s=LOST_RETRY_S)
    return kind(message)


def _from_details(kind: type[MaasError], message: str, raw: bytes) -> MaasError:
    try:
        status = status_pb2.Status.FromString(raw)
    except DecodeError:
        return kind(message)
    reason: Reason | None = None
    metadata: dict[str, str] = {}
    violations: list[Violation] = []
    retry_after_s: float | None = None
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason = _DOMAIN_REASONS.get(info.reason)
            metadata = dict(info.metadata)
        elif detail.Unpack(bad):
            violations = [
                # A newer server may know more rules.
                Violation(
                    item.field,
                    _FIELD_RULES.get(item.reason, FieldRule.BAD_FORMAT),
                    item.description,
                )
                for item in bad.field_violations
            ]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return kind(
        message,
        reason=reason,
        metadata=metadata,
        violations=violations,
        retry_after_s=retry_after_s,
    )
