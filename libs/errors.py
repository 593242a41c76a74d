"""The closed set of errors of the suite. Raised anywhere, mapped to gRPC in one place.

Pure: no gRPC. Every error says what happened (`reason`, stable, part of the API), and, where it
helps, which field, which resource and when to come back. `libs.rpc.status` turns an error into a
status and back, so that a client of a service catches the same class that the service raised.

Messages never hold a secret, a prompt or an output.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


class Code(enum.IntEnum):
    """Canonical status codes, with the numbers of google.rpc.Code."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reason(enum.StrEnum):
    """Stable causes: the values of maas.common.v1.ErrorReason without their prefix."""

    INVALID_FIELD = "INVALID_FIELD"
    BAD_PAGE_TOKEN = "BAD_PAGE_TOKEN"  # noqa: S105 - not a secret
    BAD_OUTPUT_CONSTRAINT = "BAD_OUTPUT_CONSTRAINT"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    FEATURE_UNSUPPORTED = "FEATURE_UNSUPPORTED"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    CURRENCY_MISMATCH = "CURRENCY_MISMATCH"
    CREDENTIALS_MISSING = "CREDENTIALS_MISSING"
    CREDENTIALS_INVALID = "CREDENTIALS_INVALID"
    CREDENTIALS_REVOKED = "CREDENTIALS_REVOKED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    INSUFFICIENT_CREDIT = "INSUFFICIENT_CREDIT"
    PRICE_MISSING = "PRICE_MISSING"
    SLICE_NOT_OPEN = "SLICE_NOT_OPEN"
    SPEND_LIMIT_REACHED = "SPEND_LIMIT_REACHED"
    RATE_LIMIT_REACHED = "RATE_LIMIT_REACHED"
    LARGER_THAN_LIMIT = "LARGER_THAN_LIMIT"
    RESOURCE_NOT_FOUND = "RESOURCE_NOT_FOUND"
    RESOURCE_EXISTS = "RESOURCE_EXISTS"
    WRONG_STATE = "WRONG_STATE"
    QUEUE_FULL = "QUEUE_FULL"
    NO_READY_WORKER = "NO_READY_WORKER"
    WORKER_DRAINING = "WORKER_DRAINING"
    WORKER_LOST = "WORKER_LOST"
    FENCED = "FENCED"
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CALL_CANCELLED = "CALL_CANCELLED"
    GENERATION_NOT_FOUND = "GENERATION_NOT_FOUND"
    CONSUMER_STALLED = "CONSUMER_STALLED"
    GENERATION_CANCELLED = "GENERATION_CANCELLED"
    ENGINE_FAILURE = "ENGINE_FAILURE"
    REPLAY_EXPIRED = "REPLAY_EXPIRED"
    GENERATION_SETTLED = "GENERATION_SETTLED"
    NOT_RESUMABLE = "NOT_RESUMABLE"
    ADAPTER_UNUSABLE = "ADAPTER_UNUSABLE"
    SERVICE_UNAVAILABLE = "SERVICE_UNAVAILABLE"
    INTERNAL = "INTERNAL"
    NOT_IMPLEMENTED = "NOT_IMPLEMENTED"


class FieldRule(enum.StrEnum):
    """Which rule a field broke; the `reason` of a BadRequest.FieldViolation."""

    REQUIRED = "REQUIRED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    TOO_LONG = "TOO_LONG"
    TOO_MANY = "TOO_MANY"
    BAD_FORMAT = "BAD_FORMAT"
    CONFLICTING = "CONFLICTING"
    UNKNOWN_ENUM = "UNKNOWN_ENUM"
    UNSUPPORTED = "UNSUPPORTED"


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field.

    Attributes:
        field: path from the request, as "spec.stop.max_output_tokens".
        rule: which rule it broke.
        description: for people, with the limit.
    """

    field: str
    rule: FieldRule
    description: str


class MaasError(Exception):
    """An error with a code, a stable reason and small metadata. Raise a subclass.

    Attributes:
        code: canonical status code.
        reason: stable cause.
        metadata: keys that belong to the reason.
        violations: bad fields, for INVALID_ARGUMENT.
        retry_after_s: when a repeat makes sense; None when that is not known or never.
    """

    code: ClassVar[Code] = Code.INTERNAL
    default_reason: ClassVar[Reason] = Reason.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        reason: Reason | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason if reason is not None else self.default_reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s

    @property
    def message(self) -> str:
        """Text for people."""
        return str(self.args[0])


class InvalidArgument(MaasError):
    """The request is wrong; the caller has to change it."""

    code = Code.INVALID_ARGUMENT
    default_reason = Reason.INVALID_FIELD


class Unauthenticated(MaasError):
    """There is no credential, or it is not accepted."""

    code = Code.UNAUTHENTICATED
    default_reason = Reason.CREDENTIALS_INVALID


class PermissionDenied(MaasError):
    """The caller may not do this."""

    code = Code.PERMISSION_DENIED
    default_reason = Reason.PERMISSION_DENIED


class NotFound(MaasError):
    """The named thing is not there, or the caller may not know of it."""

    code = Code.NOT_FOUND
    default_reason = Reason.RESOURCE_NOT_FOUND


class AlreadyExists(MaasError):
    """The named thing is there already, with other content."""

    code = Code.ALREADY_EXISTS
    default_reason = Reason.RESOURCE_EXISTS


class FailedPrecondition(MaasError):
    """Something else has to change first."""

    code = Code.FAILED_PRECONDITION
    default_reason = Reason.WRONG_STATE


class Aborted(MaasError):
    """The operation was ended from outside."""

    code = Code.ABORTED
    default_reason = Reason.GENERATION_CANCELLED


class ResourceExhausted(MaasError):
    """A bound is reached; wait `retry_after_s`."""

    code = Code.RESOURCE_EXHAUSTED
    default_reason = Reason.QUEUE_FULL


class OutOfRange(MaasError):
    """What is asked for is no longer there."""

    code = Code.OUT_OF_RANGE
    default_reason = Reason.REPLAY_EXPIRED


class Unavailable(MaasError):
    """Not executed, or safe to repeat; try again later or elsewhere."""

    code = Code.UNAVAILABLE
    default_reason = Reason.SERVICE_UNAVAILABLE


class DeadlineExceeded(MaasError):
    """The time is over."""

    code = Code.DEADLINE_EXCEEDED
    default_reason = Reason.DEADLINE_EXCEEDED


class Cancelled(MaasError):
    """The caller cancelled."""

    code = Code.CANCELLED
    default_reason = Reason.CALL_CANCELLED


class NotImplementedHere(MaasError):
    """The method is not served here."""

    code = Code.UNIMPLEMENTED
    default_reason = Reason.NOT_IMPLEMENTED


class Internal(MaasError):
    """A defect, or a failure of an engine."""

    code = Code.INTERNAL
    default_reason = Reason.INTERNAL


BY_CODE: dict[Code, type[MaasError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        Aborted,
        ResourceExhausted,
        OutOfRange,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        NotImplementedHere,
        Internal,
    )
}


def invalid_field(field: str, rule: FieldRule, description: str) -> InvalidArgument:
    """Makes the error for one bad field, e.g. ("spec.text", REQUIRED, "must not be empty")."""
    return InvalidArgument(
        f"{field}: {description}",
        metadata={"field": field},
        violations=[Violation(field, rule, description)],
    )


def unsupported(field: str, description: str, *, feature: str, model: str) -> InvalidArgument:
    """Makes the error for a field that asks for what the model cannot do.

    Args:
        field: its path.
        description: for people.
        feature: flag of maas.common.v1.Capabilities that is false.
        model: who cannot do it.
    """
    return InvalidArgument(
        f"{field}: {description}",
        reason=Reason.FEATURE_UNSUPPORTED,
        metadata={"model": model, "feature": feature},
        violations=[Violation(field, FieldRule.UNSUPPORTED, description)],
    )


def not_found(resource: str) -> NotFound:
    """Makes the error for a resource that is not there, e.g. "offerings/x"."""
    return NotFound(f"{resource} not found", metadata={"resource": resource})


def already_exists(resource: str) -> AlreadyExists:
    """Makes the error for a resource that is there with other content."""
    return AlreadyExists(f"{resource} exists with other content", metadata={"resource": resource})


def unavailable(dependency: str, *, retry_after_s: float = 0.5) -> Unavailable:
    """Makes the error for a dependency that is away, e.g. "postgresql"."""
    return Unavailable(
        f"{dependency} is not available",
        metadata={"dependency": dependency},
        retry_after_s=retry_after_s,
    )
