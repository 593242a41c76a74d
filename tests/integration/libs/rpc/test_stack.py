"""libs/rpc/stack.py: what happens around every method, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from maas.catalog.v1 import offering_service_pb2 as pb
from structlog.testing import capture_logs

from libs.errors import (
    BY_CODE,
    Code,
    DeadlineExceeded,
    FieldRule,
    Internal,
    InvalidArgument,
    MaasError,
    Reason,
    Unauthenticated,
    Violation,
    invalid_field,
    not_found,
)
from libs.observability.metrics import RPC_COMPLETED
from libs.rpc import current_call
from libs.rpc.policy import Audience, MethodPolicy
from libs.rpc.stack import Stack
from libs.rpc.status import error_of
from libs.testing import FakeClock
from tests.integration.libs.rpc.scripted import CALLERS, Reached

GET = "maas.catalog.v1.OfferingService/GetOffering"
REQUEST = pb.GetOfferingRequest(name="offerings/x")
TENANT = ("authorization", f"Bearer {CALLERS.tenant}")


def raising(error: BaseException) -> Any:
    async def behave(_: Any) -> Any:
        raise error

    return behave


async def failure_of(
    scripted: Reached, *metadata: tuple[str, str], request: pb.GetOfferingRequest = REQUEST
) -> grpc.aio.AioRpcError:
    async with scripted.plain() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetOffering(request, metadata=metadata, timeout=5)
    return caught.value


@pytest.mark.parametrize("kind", BY_CODE.values())
async def test_caller_gets_the_error_that_the_method_raised(
    scripted: Reached, kind: type[MaasError]
) -> None:
    raised = kind(
        "what happened",
        reason=Reason.WRONG_STATE,
        metadata={"resource": "offerings/x", "state": "odd"},
        violations=[Violation("name", FieldRule.BAD_FORMAT, "is odd")],
    )
    scripted.servicer.get = raising(raised)

    got = error_of(await failure_of(scripted, TENANT))

    assert type(got) is kind
    assert (got.message, got.reason) == (raised.message, raised.reason)
    assert (got.metadata, got.violations) == (raised.metadata, raised.violations)


async def test_large_details_arrive_without_what_is_too_much(scripted: Reached) -> None:
    violations = [Violation("f" * 600, FieldRule.TOO_LONG, "is too long") for _ in range(16)]
    scripted.servicer.get = raising(InvalidArgument("bad", violations=violations))

    got = error_of(await failure_of(scripted, TENANT))

    assert (got.code, got.reason) == (Code.INVALID_ARGUMENT, Reason.INVALID_FIELD)


async def test_details_at_their_limit_arrive_whole(scripted: Reached) -> None:
    violations = [Violation("f" * 320, FieldRule.TOO_LONG, "is too long") for _ in range(16)]
    scripted.servicer.get = raising(InvalidArgument("bad", violations=violations))

    got = error_of(await failure_of(scripted, TENANT))

    assert len(got.violations) == 16


async def test_defect_is_internal_and_keeps_its_text_to_itself(scripted: Reached) -> None:
    scripted.servicer.get = raising(RuntimeError("the password is hunter2"))

    with capture_logs() as logs:
        failure = await failure_of(scripted, TENANT, ("x-request-id", "ask-me"))

    assert (failure.code(), failure.details()) == (grpc.StatusCode.INTERNAL, "internal error")
    assert isinstance(error_of(failure), Internal)
    assert "hunter2" not in repr(failure)
    failed = [event for event in logs if event["event"] == "call failed"]
    assert [event["request_id"] for event in failed] == ["ask-me"]


@pytest.mark.parametrize("given", ["abc-1.2_X", "a" * 64])
async def test_callers_request_id_comes_back(scripted: Reached, given: str) -> None:
    async with scripted.plain() as stub:
        call = stub.GetOffering(REQUEST, metadata=(TENANT, ("x-request-id", given)))
        await call
        assert dict(await call.trailing_metadata())["x-request-id"] == given

    scripted.servicer.get = raising(not_found("offerings/x"))
    failure = await failure_of(scripted, TENANT, ("x-request-id", given))
    assert dict(failure.trailing_metadata())["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "a" * 65])
async def test_request_id_of_another_form_is_replaced(scripted: Reached, given: str) -> None:
    failure = await failure_of(scripted, ("x-request-id", given))

    made = dict(failure.trailing_metadata())["x-request-id"]
    assert isinstance(made, str)
    assert made != given
    assert len(made) == 16


@pytest.mark.parametrize("header", ["", "Basic abc", f"bearer {CALLERS.tenant}", CALLERS.tenant])
async def test_credential_in_another_form_is_refused(scripted: Reached, header: str) -> None:
    failure = await failure_of(scripted, ("authorization", header))

    assert error_of(failure).reason is Reason.CREDENTIALS_INVALID
    assert scripted.servicer.calls == 0


async def test_stranger_learns_nothing_about_his_request(scripted: Reached) -> None:
    failure = await failure_of(scripted, request=pb.GetOfferingRequest())

    got = error_of(failure)
    assert isinstance(got, Unauthenticated)
    assert got.reason is Reason.CREDENTIALS_MISSING


async def test_bad_request_never_reaches_the_method(scripted: Reached) -> None:
    failure = await failure_of(scripted, TENANT, request=pb.GetOfferingRequest())

    assert error_of(failure).metadata == {"field": "name"}
    assert scripted.servicer.calls == 0


async def test_method_knows_who_calls(scripted: Reached) -> None:
    seen: list[Any] = []

    async def behave(_: Any) -> pb.GetOfferingResponse:
        seen.append(current_call())
        return pb.GetOfferingResponse()

    scripted.servicer.get = behave
    await scripted.get()

    (call,) = seen
    principal = call.require_principal()
    assert (principal.project, principal.organization) == ("demo", "acme")
    assert call.policy.method == GET
    assert call.service is None


async def test_internal_method_knows_which_service_calls(scripted: Reached) -> None:
    seen: list[Any] = []

    async def behave(_: Any) -> AsyncIterator[pb.WatchOfferingsResponse]:
        seen.append(current_call())
        yield pb.WatchOfferingsResponse()

    scripted.servicer.watch = behave
    async with scripted.watch() as stream:
        await stream.read()

    (call,) = seen
    assert (call.service, call.principal, call.deadline_s) == ("gateway", None, None)


async def test_call_that_takes_too_long_ends_at_the_callers_deadline(scripted: Reached) -> None:
    ended = asyncio.Event()

    async def behave(_: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    scripted.servicer.get = behave
    with pytest.raises(DeadlineExceeded):
        await scripted.get(timeout_s=0.05)

    async with asyncio.timeout(1):
        await ended.wait()


async def test_call_without_a_deadline_gets_that_of_its_method(scripted: Reached) -> None:
    seen: list[float | None] = []
    clock = FakeClock()

    async def behave(_: Any) -> pb.GetOfferingResponse:
        call = current_call()
        seen.append(call.deadline_s and call.deadline_s - call.started_s)
        return pb.GetOfferingResponse()

    scripted.servicer.get = behave
    async with scripted.plain() as stub:
        await stub.GetOffering(REQUEST, metadata=(TENANT,))

    assert clock.monotonic_s() == 1000
    assert seen == [pytest.approx(10)]


async def test_default_deadline_ends_the_call() -> None:
    async def behave(_request: bytes, _: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    failure = await call_with_policy(behave, default_deadline_s=0.02)

    got = error_of(failure)
    assert (got.code, got.reason) == (Code.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED)


async def call_with_policy(behave: Any, default_deadline_s: float) -> grpc.aio.AioRpcError:
    """Calls a method of a made-up policy, without a deadline."""
    policy = MethodPolicy(
        method="test.Service/Method",
        audience=Audience.ANONYMOUS,
        permission="",
        default_deadline_s=default_deadline_s,
        is_retry_safe=False,
    )
    handler: Any = grpc.unary_unary_rpc_method_handler(behave)
    stack = Stack(CALLERS.identity(), FakeClock())
    # Nothing is parsed here, so there is nothing to validate.
    stack._validator.check = lambda _: None  # type: ignore[method-assign, assignment] # see above
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "test.Service", {"Method": stack.wrap(handler, policy)}
            ),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            method: Any = channel.unary_unary("/test.Service/Method")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(b"")
    finally:
        await server.stop(0)
    return caught.value


async def test_caller_who_leaves_cancels_the_method(scripted: Reached) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def behave(_: Any) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.set()
            raise

    scripted.servicer.get = behave
    with capture_logs() as logs:
        async with scripted.plain() as stub:
            call = stub.GetOffering(REQUEST, metadata=(TENANT,))
            async with asyncio.timeout(1):
                await started.wait()
            call.cancel()
            async with asyncio.timeout(1):
                await ended.wait()
        await asyncio.sleep(0)

    codes = [event["code"] for event in logs if event["event"] == "rpc"]
    assert codes == ["CANCELLED"]


async def test_stream_that_the_caller_leaves_runs_its_cleanup(scripted: Reached) -> None:
    ended = asyncio.Event()

    async def behave(_: Any) -> AsyncIterator[pb.WatchOfferingsResponse]:
        try:
            while True:
                yield pb.WatchOfferingsResponse()
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    scripted.servicer.watch = behave
    async with scripted.watch() as stream:
        await stream.read()

    async with asyncio.timeout(1):
        await ended.wait()


async def test_stream_that_fails_in_the_middle_says_why(scripted: Reached) -> None:
    async def behave(_: Any) -> AsyncIterator[pb.WatchOfferingsResponse]:
        yield pb.WatchOfferingsResponse(snapshot_complete=True)
        raise invalid_field("a", FieldRule.REQUIRED, "is missing")

    scripted.servicer.watch = behave
    got: list[pb.WatchOfferingsResponse] = []
    with pytest.raises(InvalidArgument) as caught:
        await read_all(scripted, got)

    assert len(got) == 1
    assert caught.value.metadata == {"field": "a"}


async def read_all(scripted: Reached, got: list[pb.WatchOfferingsResponse]) -> None:
    async with scripted.watch() as stream:
        while (response := await stream.read()) is not grpc.aio.EOF:
            got.append(response)


async def test_method_may_write_instead_of_yielding(scripted: Reached) -> None:
    async def behave(context: Any) -> None:
        for _ in range(3):
            await context.write(pb.WatchOfferingsResponse())

    scripted.servicer.watch = behave  # type: ignore[assignment] # the other form of a handler
    got: list[pb.WatchOfferingsResponse] = []
    await read_all(scripted, got)

    assert len(got) == 3


async def test_every_call_leaves_one_event_and_one_count(scripted: Reached) -> None:
    before = RPC_COMPLETED.labels(GET, "NOT_FOUND")._value.get()
    scripted.servicer.get = raising(not_found("offerings/x"))

    with capture_logs() as logs:
        await failure_of(scripted, TENANT, ("x-request-id", "r1"))

    (event,) = [item for item in logs if item["event"] == "rpc"]
    assert event["duration_ms"] >= 0
    del event["duration_ms"]
    assert event == {
        "event": "rpc",
        "log_level": "debug",
        "method": GET,
        "code": "NOT_FOUND",
        "reason": "RESOURCE_NOT_FOUND",
        "request_id": "r1",
        "caller": "000000000002",
    }
    assert RPC_COMPLETED.labels(GET, "NOT_FOUND")._value.get() == before + 1
