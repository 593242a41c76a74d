"""A connection to another service of the suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from libs import limits
from libs.rpc.policy import policies_of, service_config
from libs.rpc.status import error_of
from libs.rpc.true_status import keep_true_status

if TYPE_CHECKING:
    from grpc.aio import (
        StreamStreamCall,
        StreamStreamMultiCallable,
        UnaryStreamCall,
        UnaryStreamMultiCallable,
        UnaryUnaryMultiCallable,
    )

Request = TypeVar("Request")
Response = TypeVar("Response")

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", limits.INTERNAL_MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", limits.KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", limits.KEEPALIVE_TIMEOUT_MS),
    # A service that restarts is back in a second: do not wait out a long backoff.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 1),
]


class Peer:
    """One service at one address. An async context manager; closing cancels its calls.

    Use it with generated stubs: `await peer.call(stub.GetModel, request)`. Calls carry the token,
    have a deadline, and raise `libs.errors`.
    """

    def __init__(
        self, endpoint: str, credential: str, services: Sequence[ServiceDescriptor]
    ) -> None:
        self.endpoint = endpoint
        self.channel = grpc.aio.insecure_channel(
            endpoint,
            options=[*_OPTIONS, ("grpc.service_config", service_config(list(services)))],
        )
        self._metadata = (("authorization", f"Bearer {credential}"),)
        self._deadlines: dict[bytes, float | None] = {
            f"/{policy.method}".encode(): policy.default_deadline_s
            for service in services
            for policy in policies_of(service).values()
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; running calls end as cancelled."""
        await self.channel.close()

    async def call(
        self,
        method: UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        timeout_s: float | None = None,
    ) -> Response:
        """Calls a unary method.

        Args:
            method: from a stub made of `channel`.
            request: its request.
            timeout_s: deadline; None takes the method's default.

        Raises:
            MaasError: what the service raised, or Unavailable when it cannot be reached.
        """
        deadline = timeout_s if timeout_s is not None else self._default(method)
        try:
            return await method(request, timeout=deadline, metadata=self._metadata)
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from failure

    @asynccontextmanager
    async def stream(
        self, method: UnaryStreamMultiCallable[Request, Response], request: Request
    ) -> AsyncIterator[UnaryStreamCall[Request, Response]]:
        """Opens a server stream, cancelled on exit: leaving an `async for` alone would not.

        Raises:
            MaasError: when the stream fails inside the block.
        """
        call = method(request, timeout=self._default(method), metadata=self._metadata)
        try:
            yield call
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from failure
        finally:
            call.cancel()

    @asynccontextmanager
    async def both_ways(
        self, method: StreamStreamMultiCallable[Request, Response]
    ) -> AsyncIterator[StreamStreamCall[Request, Response]]:
        """Opens a stream in both directions for explicit read and write, cancelled on exit.

        One task writes: concurrent writes kill the call.

        Raises:
            MaasError: when the stream fails inside the block.
        """
        call = method(metadata=self._metadata)
        keep_true_status(call)
        try:
            yield call
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from failure
        finally:
            call.cancel()

    def _default(self, method: object) -> float | None:
        return self._deadlines[getattr(method, "_method")]  # noqa: B009 - grpc's own attribute, absent from its types
