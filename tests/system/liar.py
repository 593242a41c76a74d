"""A relay in front of a suite that lies in one way: what the kit sees is wrong in that way.

All services at one address. Whatever is not the lie passes as it came.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.rpc import status_pb2
from typing_extensions import override

from tools.conformance.client import NARROW
from tools.conformance.deployment import Deployment

if TYPE_CHECKING:
    from grpc.aio import UnaryStreamMultiCallable, UnaryUnaryMultiCallable

_DETAILS = "grpc-status-details-bin"
_OPTIONS = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1), *NARROW]
"""Narrow, so that the gateway notices a client that does not read."""
_CONNECTIONS = 4
"""To each service: one takes 128 calls at a time."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lie:
    """A way to be wrong.

    Attributes:
        feature: that has to fail.
        name: for people.
        seen_as: words of the verdict.
        methods: short names of the methods that lie.
        answer: alters a response, in place.
        ask: alters a request, in place.
        refuse: alters the details of a refusal, in place.
    """

    feature: str
    name: str
    seen_as: str
    methods: frozenset[str]
    answer: Callable[[Any], None] | None = None
    ask: Callable[[Any], None] | None = None
    refuse: Callable[[status_pb2.Status], None] | None = None


class _Relay(grpc.GenericRpcHandler):
    """Passes calls on, each to the service that it is for."""

    def __init__(self, channels: Mapping[str, Iterator[grpc.aio.Channel]], lie: Lie) -> None:
        self._channels = channels
        self._lie = lie

    @override
    def service(self, handler_call_details: Any) -> Any:
        """Finds how to pass on a method."""
        path: str = handler_call_details.method
        service, _, name = path[1:].partition("/")
        method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
        channel = next(self._channels[service.split(".")[1]])
        lie = self._lie if name in self._lie.methods else None
        ask = _altering(method.input_type, lie.ask if lie else None)
        answer = _altering(method.output_type, lie.answer if lie else None)
        refuse = lie.refuse if lie else None

        async def unary(request: bytes, context: Any) -> bytes | None:
            passing: UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
            call = passing(ask(request), **_terms(context))
            try:
                return answer(await call)
            except grpc.aio.AioRpcError as failure:
                await _refuse(context, failure, refuse)
            return None

        async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
            passing: UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
            call = passing(ask(request), **_terms(context))
            try:
                async for response in call:
                    yield answer(response)
            except grpc.aio.AioRpcError as failure:
                await _refuse(context, failure, refuse)
            finally:
                call.cancel()

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)


def _altering(kind: Any, alter: Callable[[Any], None] | None) -> Callable[[bytes], bytes]:
    """Alters a serialized message."""

    def altered(raw: bytes) -> bytes:
        if alter is None:
            return raw
        message = message_factory.GetMessageClass(kind).FromString(raw)
        alter(message)
        return message.SerializeToString()

    return altered


def _terms(context: Any) -> dict[str, Any]:
    """Who calls, and for how long."""
    metadata = [
        (key, value) for key, value in context.invocation_metadata() if key == "authorization"
    ]
    return {"metadata": metadata, "timeout": context.time_remaining()}


async def _refuse(
    context: Any,
    failure: grpc.aio.AioRpcError,
    alter: Callable[[status_pb2.Status], None] | None,
) -> None:
    trailers = []
    for key, value in failure.trailing_metadata() or ():
        found = value
        if key == _DETAILS and alter is not None:
            status = status_pb2.Status.FromString(value)
            alter(status)
            found = status.SerializeToString()
        trailers.append((key, found))
    await context.abort(failure.code(), failure.details() or "", tuple(trailers))


@asynccontextmanager
async def lying(place: Deployment, lie: Lie) -> AsyncIterator[Deployment]:
    """The deployment, as somebody describes it who lies. Nothing of it may be killed."""
    addresses = {
        "inference": place.endpoint,
        "billing": place.billing,
        "auth": place.auth,
    }
    async with AsyncExitStack() as stack:
        channels = {}
        for name, address in addresses.items():
            assert address is not None
            pool = [
                grpc.aio.insecure_channel(address, options=_OPTIONS) for _ in range(_CONNECTIONS)
            ]
            for channel in pool:
                await stack.enter_async_context(channel)
            channels[name] = itertools.cycle(pool)
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((_Relay(channels, lie),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, 0)
        address = f"127.0.0.1:{port}"
        yield dataclasses.replace(
            place,
            endpoint=address,
            billing=address,
            auth=address,
            more_endpoints=(),
            # Other lies are looked at meanwhile: workers are not idle.
            scheduler=None,
            kill=None,
            kill_gateway=None,
        )
