"""The answer to methods that are not served here. grpc's own would carry no reason."""

from __future__ import annotations

from typing import Any

import grpc
from typing_extensions import override

from libs.errors import NotImplementedHere
from libs.rpc.stack import request_id_of
from libs.rpc.status import grpc_code, trailers

METHOD_LENGTH_MAX = 128


class Unserved(grpc.GenericRpcHandler):
    """Refuses every method. Handlers are asked in order, so it is added last."""

    @override
    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any]:
        # The caller's own words: bounded, and never a label of a metric.
        method = handler_call_details.method.lstrip("/")[:METHOD_LENGTH_MAX]

        async def refuse(_requests: Any, context: Any) -> None:
            error = NotImplementedHere(f"{method} is not served", metadata={"method": method})
            details = trailers(error, request_id_of(context))
            await context.abort(grpc_code(error.code), error.message, details)

        return grpc.stream_stream_rpc_method_handler(refuse)
