"""A client of what a gateway answers beside generations."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
import pytest
from maas.inference.v1 import (
    embedding_service_pb2,
    embedding_service_pb2_grpc,
    generation_pb2,
    generation_service_pb2_grpc,
    tokenization_service_pb2_grpc,
)

from libs.errors import MaasError
from libs.rpc.status import error_of
from tests.integration.services.gateway.neighbours import ALICE, Caller

if TYPE_CHECKING:
    from grpc.aio import UnaryUnaryCall, UnaryUnaryMultiCallable

Request = TypeVar("Request")
Response = TypeVar("Response")

# Longer than anything that a test waits for: what hangs fails.
WAIT_S = 10.0
# What was refused is refused: a client that repeats by itself would only make tests slow.
_OPTIONS = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]


class Asker:
    """One connection with one key. An async context manager."""

    def __init__(self, endpoint: str, caller: Caller = ALICE) -> None:
        self._channel = grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        self.generations = generation_service_pb2_grpc.GenerationServiceStub(self._channel)
        self.tokens = tokenization_service_pb2_grpc.TokenizationServiceStub(self._channel)
        self.embeddings = embedding_service_pb2_grpc.EmbeddingServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {caller.secret}"),)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    def begin(
        self,
        method: UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        timeout_s: float | None = None,
    ) -> UnaryUnaryCall[Request, Response]:
        """Begins a call."""
        return method(request, metadata=self._metadata, timeout=timeout_s)

    async def call(
        self,
        method: UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        timeout_s: float | None = None,
    ) -> Response:
        """Makes a call.

        Raises:
            MaasError: what the gateway raised.
        """
        return await answer(self.begin(method, request, timeout_s=timeout_s))

    async def refusal(
        self,
        method: UnaryUnaryMultiCallable[Request, Any],
        request: Request,
        *,
        timeout_s: float | None = None,
    ) -> MaasError:
        """Makes a call that has to fail."""
        with pytest.raises(MaasError) as caught:
            await self.call(method, request, timeout_s=timeout_s)
        return caught.value


async def answer(call: Awaitable[Response]) -> Response:
    """Waits for an answer.

    Raises:
        MaasError: what the gateway raised.
    """
    try:
        async with asyncio.timeout(WAIT_S):
            return await call
    except grpc.aio.AioRpcError as failure:
        raise error_of(failure) from failure


def embed_request(*texts: str, **fields: Any) -> embedding_service_pb2.EmbedRequest:
    """Makes a request to embed texts."""
    inputs = [embedding_service_pb2.EmbedInput(text=text) for text in texts]
    return embedding_service_pb2.EmbedRequest(model="m", inputs=inputs, **fields)


def text_spec(text: str = "hello", most: int = 100) -> generation_pb2.GenerationSpec:
    """Makes a spec of plain text."""
    return generation_pb2.GenerationSpec(
        model="m", text=text, stop=generation_pb2.StopOptions(max_output_tokens=most)
    )
