"""The one stack around every method of every server.

In order: request id, deadline, authentication, authorisation, validation, the handler; around all
of it errors, log and metrics. Handlers raise `libs.errors`; nothing else aborts a call.

Health and reflection are open to everybody and pass through untouched.
"""

from __future__ import annotations

import asyncio
import functools
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc.aio import AbortError

from libs.clock import Clock
from libs.errors import (
    Cancelled,
    Code,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    MaasError,
    PermissionDenied,
    Reason,
    Unauthenticated,
)
from libs.observability.metrics import RPC_COMPLETED, RPC_DURATION
from libs.rpc.call import Call, set_current_call
from libs.rpc.identity import Identity
from libs.rpc.policy import Audience, MethodPolicy
from libs.rpc.status import REQUEST_ID_KEY, grpc_code, trailers
from libs.rpc.validation import Validator

if TYPE_CHECKING:
    from grpc.aio import ServicerContext
    from prometheus_client import Counter, Histogram

    Context = ServicerContext[Any, Any]
    Handler = Callable[[Any, Context], Awaitable[Any]]

OPEN_SERVICES = (
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_BEARER = "Bearer "
_QUIET = {Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.CANCELLED}
_LOUD = {Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS}

log = structlog.get_logger(__name__)


class Stack:
    """Wraps handlers. One for each server."""

    def __init__(self, identity: Identity, clock: Clock) -> None:
        self._identity = identity
        self._clock = clock
        self._validator = Validator()

    def wrap(
        self, handler: grpc.RpcMethodHandler[Any, Any], policy: MethodPolicy
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Puts the stack around one method of any of the four shapes."""
        wire = (handler.request_deserializer, handler.response_serializer)
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._around(_streaming(handler.stream_stream), policy, validates=False), *wire
            )
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(
                self._around(_coroutine(handler.stream_unary), policy, validates=False), *wire
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._around(_streaming(handler.unary_stream), policy, validates=True), *wire
            )
        return grpc.unary_unary_rpc_method_handler(
            self._around(_coroutine(handler.unary_unary), policy, validates=True), *wire
        )

    def _around(self, handler: Handler, policy: MethodPolicy, *, validates: bool) -> Any:
        async def around(request: Any, context: Context) -> Any:
            started_s = self._clock.monotonic_s()
            metadata = _metadata(context)
            call = Call(
                policy=policy,
                request_id=_request_id(metadata),
                started_s=started_s,
                deadline_s=self._deadline_s(context, policy, started_s),
            )
            set_current_call(call)
            error: MaasError | None = None
            try:
                self._authenticate(call, metadata.get("authorization"))
                if validates:
                    self._validator.check(request)
                context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
                if call.deadline_s is None or context.time_remaining() is not None:
                    # grpc itself cancels the handler when the client's deadline passes.
                    return await handler(request, context)
                async with asyncio.timeout(call.deadline_s - started_s):
                    return await handler(request, context)
            except AbortError:
                raise
            except MaasError as raised:
                error = raised
            except TimeoutError:
                error = DeadlineExceeded("the deadline of the call passed")
            except asyncio.CancelledError:
                error = self._cancelled(call)
                raise
            except Exception:
                log.exception("call failed", method=policy.method, request_id=call.request_id)
                error = Internal("internal error")
            finally:
                self._report(call, error)
            code = grpc_code(error.code)
            return await context.abort(code, error.message, trailers(error, call.request_id))

        return around

    def _cancelled(self, call: Call) -> MaasError:
        if call.is_overdue(self._clock.monotonic_s()):
            return DeadlineExceeded("the deadline of the call passed")
        return Cancelled("the caller cancelled")

    def _deadline_s(self, context: Context, policy: MethodPolicy, started_s: float) -> float | None:
        # types-grpcio says float; without a deadline it is None.
        remaining: float | None = context.time_remaining()
        if remaining is None:
            remaining = policy.default_deadline_s
        return None if remaining is None else started_s + remaining

    def _authenticate(self, call: Call, header: str | None) -> None:
        policy = call.policy
        if policy.audience == Audience.ANONYMOUS:
            return
        if header is None:
            raise Unauthenticated(
                "authorization metadata is missing", reason=Reason.CREDENTIALS_MISSING
            )
        if not header.startswith(_BEARER):
            raise Unauthenticated('authorization must be "Bearer <key>"')
        credential = header[len(_BEARER) :]
        if policy.audience == Audience.INTERNAL:
            call.service = self._identity.service(policy.method, credential)
            return
        call.principal = self._identity.principal(credential, self._clock.monotonic_s())
        if not self._identity.permits(call.principal, policy.permission):
            raise PermissionDenied(
                f"the key's role does not grant {policy.permission}",
                metadata={"permission": policy.permission},
            )

    def _report(self, call: Call, error: MaasError | None) -> None:
        policy = call.policy
        seconds = self._clock.monotonic_s() - call.started_s
        code = "OK" if error is None else error.code.name
        completed, duration = _meters(policy.method, code)
        completed.inc()
        duration.observe(seconds)
        fields: dict[str, object] = {
            "method": policy.method,
            "code": code,
            "duration_ms": round(seconds * 1000, 3),
            "request_id": call.request_id,
            "caller": call.service or (call.principal.key_id if call.principal else ""),
        }
        if error is None:
            if policy.audience == Audience.INTERNAL:
                log.debug("rpc", **fields)
            else:
                log.info("rpc", **fields)
            return
        fields["reason"] = error.reason.value
        if isinstance(error, InvalidArgument) and error.violations:
            fields["fields"] = [item.field for item in error.violations]
        if error.code in _QUIET:
            log.debug("rpc", **fields)
        elif error.code in _LOUD:
            log.error("rpc", **fields)
        else:
            log.info("rpc", **fields)


@functools.cache
def _meters(method: str, code: str) -> tuple[Counter, Histogram]:
    """Finds the metrics of a method and a code: both are bounded by the contract."""
    return RPC_COMPLETED.labels(method, code), RPC_DURATION.labels(method)


def _metadata(context: Context) -> dict[str, str]:
    pairs = context.invocation_metadata() or ()
    return {key: value for key, value in pairs if isinstance(value, str)}


def request_id_of(context: Context) -> str:
    """Returns the caller's request id, or makes one if there is none that can be used."""
    return _request_id(_metadata(context))


def _request_id(metadata: dict[str, str]) -> str:
    given = metadata.get(REQUEST_ID_KEY, "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def _coroutine(handler: Any) -> Handler:
    async def invoke(request: Any, context: Context) -> Any:
        return await handler(request, context)

    return invoke


def _streaming(handler: Any) -> Handler:
    """Runs a streaming handler, whether it yields messages or writes them to the context."""

    async def invoke(request: Any, context: Context) -> None:
        result = handler(request, context)
        if not hasattr(result, "__aiter__"):
            await result
            return
        try:
            async for message in result:
                await context.write(message)
        finally:
            await result.aclose()

    return invoke
