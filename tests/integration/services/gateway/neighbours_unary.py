"""The unary methods of a worker under test: a tokenizer of bytes, and vectors of its tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.duration_pb2 import Duration
from maas.common.v1 import capabilities_pb2
from maas.engine.v1 import engine_service_pb2
from maas.inference.v1 import embedding_service_pb2

from libs.errors import FieldRule, InvalidArgument, MaasError, Reason, Violation, invalid_field

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

# Stands before every prompt that asks for it.
BEGIN = 256
VOCABULARY = 257
DIMENSIONS = 8
CONTEXT_LENGTH = 1000


def abilities(*, dimensions: int = DIMENSIONS) -> capabilities_pb2.Capabilities:
    """Makes what such a worker says it can do."""
    return capabilities_pb2.Capabilities(
        chat=True, min_p=True, max_outputs=4, embedding_dimensions=dimensions
    )


def tokens_of(text: str, *, begins: bool = True) -> list[int]:
    """Tokenizes: a token for each byte."""
    return [BEGIN] * begins + list(text.encode())


def vector_of(tokens: Sequence[int], dimensions: int = DIMENSIONS) -> list[float]:
    """Embeds: length 1, and another one for other tokens."""
    numbers = np.array(
        [1.0 + sum(token * (place + 1) for token in tokens) % 97 for place in range(dimensions)]
    )
    return [float(number) for number in (numbers / np.linalg.norm(numbers)).astype(np.float32)]


class UnaryMethods:
    """Answers what is asked, unless the test says otherwise.

    Attributes:
        asked: requests, in the order in which they came.
        refusals: what the next calls are refused with, one each; None lets one pass.
        going: cleared by a test to make calls wait.
        waiting: calls that have come and not left.
        left: calls that were cancelled.
        dimensions: numbers of a vector.
        engine_time: that inputs take.
    """

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.refusals: list[MaasError | None] = []
        self.going = asyncio.Event()
        self.going.set()
        self.waiting = 0
        self.left = 0
        self.dimensions = DIMENSIONS
        self.engine_time = Duration(nanos=1)

    async def Embed(  # noqa: N802
        self, request: engine_service_pb2.EmbedRequest, _: Context
    ) -> engine_service_pb2.EmbedResponse:
        await self._enter(request)
        inputs = [_tokens(item) for item in request.inputs]
        cut = [place for place, tokens in enumerate(inputs) if len(tokens) > CONTEXT_LENGTH]
        if cut and not request.truncate:
            raise _too_long(f"inputs[{cut[0]}]", len(inputs[cut[0]]))
        inputs = [tokens[:CONTEXT_LENGTH] for tokens in inputs]
        vectors = [vector_of(tokens, self.dimensions) for tokens in inputs]
        return engine_service_pb2.EmbedResponse(
            dimensions=self.dimensions,
            vectors=np.array(vectors, dtype="<f4").tobytes(),
            input_tokens=[len(tokens) for tokens in inputs],
            truncated_inputs=cut,
            engine_time=self.engine_time,
        )

    async def CountTokens(  # noqa: N802
        self, request: engine_service_pb2.CountTokensRequest, _: Context
    ) -> engine_service_pb2.CountTokensResponse:
        await self._enter(request)
        execution = request.execution
        match execution.WhichOneof("input"):
            case "text":
                tokens = tokens_of(execution.text)
            case "tokens":
                tokens = list(execution.tokens.ids)
            case _:
                parts = [part.text for turn in execution.chat.messages for part in turn.parts]
                tokens = tokens_of("".join(f"[{part}]" for part in parts))
        if len(tokens) >= CONTEXT_LENGTH:
            # As a worker does, which leaves the path to the gateway.
            raise InvalidArgument(
                "the prompt does not fit",
                reason=Reason.CONTEXT_LENGTH_EXCEEDED,
                metadata={"tokens": str(len(tokens)), "limit": str(CONTEXT_LENGTH - 1)},
            )
        return engine_service_pb2.CountTokensResponse(input_tokens=len(tokens))

    async def Tokenize(  # noqa: N802
        self, request: engine_service_pb2.TokenizeRequest, _: Context
    ) -> engine_service_pb2.TokenizeResponse:
        await self._enter(request)
        ids = tokens_of(request.text, begins=request.add_special_tokens)
        shown = [b"" if token == BEGIN else bytes([token]) for token in ids]
        return engine_service_pb2.TokenizeResponse(
            token_ids=ids, token_bytes=shown if request.return_token_bytes else []
        )

    async def Detokenize(  # noqa: N802
        self, request: engine_service_pb2.DetokenizeRequest, _: Context
    ) -> engine_service_pb2.DetokenizeResponse:
        await self._enter(request)
        for place, token in enumerate(request.tokens.ids):
            if token >= VOCABULARY:
                raise invalid_field(
                    f"tokens.ids[{place}]", FieldRule.OUT_OF_RANGE, "is not in the vocabulary"
                )
        data = bytes(token for token in request.tokens.ids if token != BEGIN)
        text = data.decode(errors="ignore")
        return engine_service_pb2.DetokenizeResponse(
            text=text, incomplete=data[len(text.encode()) :]
        )

    async def _enter(self, request: object) -> None:
        self.asked.append(request)
        refusal = self.refusals.pop(0) if self.refusals else None
        if refusal is not None:
            raise refusal
        self.waiting += 1
        try:
            await self.going.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self.waiting -= 1


def _tokens(item: embedding_service_pb2.EmbedInput) -> list[int]:
    if item.WhichOneof("input") == "tokens":
        return list(item.tokens.ids)
    return tokens_of(item.text)


def _too_long(field: str, tokens: int) -> InvalidArgument:
    return InvalidArgument(
        f"{field}: does not fit",
        reason=Reason.CONTEXT_LENGTH_EXCEEDED,
        metadata={"tokens": str(tokens), "limit": str(CONTEXT_LENGTH)},
        violations=[Violation(field, FieldRule.TOO_LONG, "does not fit")],
    )
