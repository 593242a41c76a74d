"""A server of the suite: limits, the stack, health, reflection, drain."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from libs import limits
from libs.clock import Clock, SystemClock
from libs.config import ServerSection
from libs.process import StartError, stop_signal
from libs.rpc import reflection
from libs.rpc.identity import Identity
from libs.rpc.policy import policies_of
from libs.rpc.stack import OPEN_SERVICES, Stack
from libs.rpc.unserved import Unserved

if TYPE_CHECKING:
    from grpc.aio import Server as GrpcServer

log = structlog.get_logger(__name__)


def server_options(*, is_public: bool, message_bytes_max: int) -> list[tuple[str, Any]]:
    """Returns the channel arguments of a listener, each with its reason in libs/limits.py."""
    options: list[tuple[str, Any]] = [
        # Else a second suite binds the same port in silence and takes part of the traffic.
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", limits.CONCURRENT_STREAMS_MAX),
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.max_send_message_length", limits.INTERNAL_MESSAGE_BYTES_MAX),
        ("grpc.max_metadata_size", limits.METADATA_BYTES_MAX),
        ("grpc.absolute_max_metadata_size", 2 * limits.METADATA_BYTES_MAX),
        ("grpc.keepalive_time_ms", limits.KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", limits.KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # The names with "recv_ping" that are found in many places do not exist.
        ("grpc.http2.min_ping_interval_without_data_ms", limits.PING_INTERVAL_MIN_MS),
        ("grpc.http2.max_ping_strikes", limits.PING_STRIKES_MAX),
        ("grpc.server_handshake_timeout_ms", 5_000),
    ]
    if is_public:
        options += [
            ("grpc.max_connection_age_ms", limits.CONNECTION_AGE_MAX_MS),
            ("grpc.max_connection_age_grace_ms", limits.CONNECTION_AGE_GRACE_MS),
        ]
    return options


class Server:
    """One listener with its services.

    Build it, `add` services, then `serve`, which returns after the drain. Health says NOT_SERVING
    until `set_serving(True)`.
    """

    def __init__(
        self,
        config: ServerSection,
        identity: Identity,
        *,
        clock: Clock | None = None,
        is_public: bool = False,
        message_bytes_max: int = limits.PUBLIC_REQUEST_BYTES_MAX,
    ) -> None:
        self._config = config
        self._identity = identity
        self._clock = clock if clock is not None else SystemClock()
        self._stack = Stack(identity, self._clock)
        self._server: GrpcServer = grpc.aio.server(
            options=server_options(is_public=is_public, message_bytes_max=message_bytes_max)
        )
        self._health = HealthServicer()
        self._services: list[str] = list(OPEN_SERVICES)
        self._failed = asyncio.Event()

    def add(self, servicer: object, service: ServiceDescriptor) -> None:
        """Serves a service: each of its methods is an attribute of the servicer.

        Raises:
            ConfigError: an internal method has no allow-list.
            AttributeError: the servicer lacks a method.
        """
        policies = policies_of(service)
        self._identity.require_allow_lists(policies.values())
        handlers = {
            method.name: self._stack.wrap(
                _method_handler(getattr(servicer, method.name), method), policies[method.name]
            )
            for method in service.methods
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service.full_name, handlers),)
        )
        self._services.append(service.full_name)

    async def start(self) -> int:
        """Binds and starts; returns the port.

        Raises:
            StartError: the port is taken.
        """
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers(reflection.handlers(self._services))
        self._server.add_generic_rpc_handlers((Unserved(),))
        try:
            port = self._server.add_insecure_port(self._config.listen)
        except RuntimeError as error:
            raise StartError(f"{self._config.listen} cannot be bound: {error}") from error
        await self.set_serving(False)
        await self._server.start()
        log.info("listening", address=self._config.listen, port=port)
        return port

    async def set_serving(self, is_serving: bool) -> None:  # noqa: FBT001 - a state, not a flag
        """Sets what health says, for the server and each service."""
        serving = health_pb2.HealthCheckResponse.SERVING
        status = serving if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, status)

    def fail(self, error: BaseException) -> None:
        """Ends `serve` as if it had been signalled, and makes it raise."""
        self._failure = error
        self._failed.set()

    _failure: BaseException | None = None

    async def serve(
        self,
        *,
        drain: Callable[[], Awaitable[None]] | None = None,
        abandon: Callable[[], None] | None = None,
    ) -> None:
        """Says SERVING and runs until SIGTERM, SIGINT or `fail`, then drains and stops.

        Args:
            drain: finishes what runs; is given the grace of the configuration.
            abandon: called instead after a failure, before the running calls are cut.

        Raises:
            StartError: something that the process cannot live without failed.
        """
        # All that the process was built of stays for its life: no collection has to look at it.
        gc.collect()
        gc.freeze()
        await self.set_serving(True)
        await self._wait_for_stop()
        log.info("draining", grace_s=self._config.drain_grace)
        await self.set_serving(False)
        if self._failure is not None:
            if abandon is not None:
                abandon()
        elif drain is not None:
            try:
                async with asyncio.timeout(self._config.drain_grace):
                    await drain()
            except TimeoutError:
                log.warning("drain ran out of time")
        await self.stop(0.5)
        if self._failure is not None:
            raise StartError(f"stopped: {self._failure}") from self._failure

    async def stop(self, grace_s: float) -> None:
        """Stops listening, and ends running calls after the grace."""
        await self._server.stop(grace_s)

    async def _wait_for_stop(self) -> None:
        waits = [
            asyncio.create_task(stop_signal(), name="stop signal"),
            asyncio.create_task(self._failed.wait(), name="failure"),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


def _method_handler(behaviour: Any, method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
    """Makes grpc's handler of a method of any shape, from its descriptor."""
    shape = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.client_streaming, method.server_streaming]
    request = GetMessageClass(method.input_type)
    return shape(behaviour, request.FromString, _serialized)


def _serialized(message: Any) -> bytes:
    """Writes a response, unless the handler has done so: bytes are sent as they are."""
    return message if isinstance(message, bytes) else message.SerializeToString()
