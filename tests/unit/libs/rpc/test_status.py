"""libs/rpc/status.py: errors to statuses and back."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import (
    BY_CODE,
    Code,
    FailedPrecondition,
    FieldRule,
    Internal,
    InvalidArgument,
    MaasError,
    NotFound,
    Reason,
    Unavailable,
    Violation,
    not_found,
)
from libs.limits import STATUS_DETAILS_BYTES_MAX
from libs.rpc.status import DETAILS_KEY, PUSHBACK_KEY, error_of, grpc_code, trailers

REQUEST_ID = "request-1"


def failure_of(
    code: grpc.StatusCode, message: str, metadata: tuple[tuple[str, str | bytes], ...]
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details=message
    )


def over_the_wire(error: MaasError) -> MaasError:
    return error_of(failure_of(grpc_code(error.code), error.message, trailers(error, REQUEST_ID)))


def status_of(error: MaasError) -> status_pb2.Status:
    raw = dict(trailers(error, REQUEST_ID))[DETAILS_KEY]
    assert isinstance(raw, bytes)
    return status_pb2.Status.FromString(raw)


def content(error: MaasError) -> tuple[object, ...]:
    return (
        type(error),
        error.message,
        error.reason,
        error.metadata,
        error.violations,
        error.retry_after_s,
    )


short = st.text(max_size=40)
errors = st.builds(
    lambda kind, message, reason, metadata, violations, retry_after_s: kind(
        message,
        reason=reason,
        metadata=metadata,
        violations=violations,
        retry_after_s=retry_after_s,
    ),
    st.sampled_from(sorted(BY_CODE.values(), key=lambda kind: kind.code)),
    st.text(min_size=1, max_size=80),
    st.sampled_from(Reason),
    st.dictionaries(short, short, max_size=3),
    st.lists(st.builds(Violation, short, st.sampled_from(FieldRule), short), max_size=3),
    st.none() | st.sampled_from([0.0, 0.5, 1.0, 30.0]),
)


@given(errors)
def test_client_gets_the_error_that_the_server_raised(error: MaasError) -> None:
    assert content(over_the_wire(error)) == content(error)


@pytest.mark.parametrize("code", Code)
def test_every_code_has_a_name_in_grpc(code: Code) -> None:
    assert grpc_code(code).name == code.name


def test_details_name_reason_request_and_resource() -> None:
    status = status_of(not_found("offerings/x"))

    info, request, resource = status.details
    assert error_details_pb2.ErrorInfo.FromString(info.value) == error_details_pb2.ErrorInfo(
        domain="maas", reason="RESOURCE_NOT_FOUND", metadata={"resource": "offerings/x"}
    )
    assert error_details_pb2.RequestInfo.FromString(request.value).request_id == REQUEST_ID
    named = error_details_pb2.ResourceInfo.FromString(resource.value)
    assert named.resource_name == "offerings/x"


def test_empty_account_comes_with_a_precondition() -> None:
    error = FailedPrecondition(
        "too little", reason=Reason.INSUFFICIENT_CREDIT, metadata={"account": "accounts/acme"}
    )

    (packed,) = [
        detail
        for detail in status_of(error).details
        if detail.Is(error_details_pb2.PreconditionFailure.DESCRIPTOR)
    ]
    (violation,) = error_details_pb2.PreconditionFailure.FromString(packed.value).violations
    assert (violation.type, violation.subject) == ("CREDIT", "accounts/acme")


def test_large_details_are_cut_and_keep_the_reason() -> None:
    violations = [
        Violation(f"messages[{n}].{'x' * 500}", FieldRule.TOO_LONG, "y" * 100) for n in range(16)
    ]
    error = InvalidArgument("bad", metadata={"field": "messages"}, violations=violations)

    status = status_of(error)

    assert status.ByteSize() <= STATUS_DETAILS_BYTES_MAX
    back = over_the_wire(error)
    assert (back.reason, back.metadata) == (Reason.INVALID_FIELD, {"field": "messages"})
    assert back.violations == ()


def test_unavailable_tells_clients_when_to_come_back() -> None:
    later = dict(trailers(Unavailable("away", retry_after_s=0.25), REQUEST_ID))
    unknown = dict(trailers(Unavailable("away"), REQUEST_ID))

    assert later[PUSHBACK_KEY] == "250"
    assert PUSHBACK_KEY not in unknown


def test_status_of_a_foreign_server_becomes_the_error_of_its_code() -> None:
    foreign = failure_of(grpc.StatusCode.NOT_FOUND, "no such thing", ())
    strange = failure_of(grpc.StatusCode.UNKNOWN, "what", ())

    assert content(error_of(foreign)) == content(NotFound("no such thing"))
    assert isinstance(error_of(strange), Internal)


def test_a_lost_connection_says_when_to_repeat_and_no_address() -> None:
    lost = failure_of(grpc.StatusCode.UNAVAILABLE, "ipv4:10.0.0.7:50053: refused", ())

    error = error_of(lost)

    assert isinstance(error, Unavailable)
    assert error.reason is Reason.SERVICE_UNAVAILABLE
    assert "10.0.0.7" not in error.message
    assert error.retry_after_s == 0.5


def test_details_that_are_none_are_left_alone() -> None:
    broken = failure_of(grpc.StatusCode.NOT_FOUND, "gone", ((DETAILS_KEY, b"\xff\xff"),))

    assert content(error_of(broken)) == content(NotFound("gone"))


def test_words_of_a_newer_server_are_no_obstacle() -> None:
    status = status_pb2.Status(code=3)
    for detail in (
        error_details_pb2.ErrorInfo(domain="maas", reason="INVENTED_LATER"),
        error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field="a", reason="INVENTED_LATER")
            ]
        ),
    ):
        status.details.add().Pack(detail)
    newer = failure_of(
        grpc.StatusCode.INVALID_ARGUMENT, "bad", ((DETAILS_KEY, status.SerializeToString()),)
    )

    error = error_of(newer)

    assert error.reason is Reason.INVALID_FIELD
    assert [item.field for item in error.violations] == ["a"]
