"""The token API: parse, one operation, build. See operations.py for what happens in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maas.inference.v1 import (
    embedding_service_pb2,
    generation_pb2,
    generation_service_pb2,
    tokenization_service_pb2,
)

from libs.errors import FieldRule, invalid_field
from libs.rpc import Call, current_call
from services.gateway import convert, frames
from services.gateway.admission import Asked
from services.gateway.embedding import Embeddings
from services.gateway.operations import Generations
from services.gateway.quote import Quotes
from services.gateway.reader import Reader
from services.gateway.ticker import Ticker
from services.gateway.tokenization import Tokenization

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

FRAME_INTERVAL_MAX_S = 1.0


class GenerationService:
    """maas.inference.v1.GenerationService."""

    def __init__(self, generations: Generations, quotes: Quotes) -> None:
        self._generations = generations
        self._quotes = quotes
        self._ticker = Ticker()

    async def StreamGenerate(
        self, request: generation_service_pb2.StreamGenerateRequest, context: Context
    ) -> None:
        """Streams frames as the worker makes tokens."""
        call = current_call()
        interval_s = _interval_s(request.stream.frame_interval, "stream.frame_interval")
        asked = _asked(
            request.spec,
            request.request_id,
            request.stream.on_disconnect,
            call,
            interval_s=interval_s,
        )
        generation, is_repeat = await self._generations.open(asked, call)
        reader = Reader(
            asked.principal.key_id,
            write=context.write,
            ticker=self._ticker,
            interval_s=interval_s,
            is_replay=is_repeat,
        )
        await self._generations.read(generation, reader, call)

    async def Generate(
        self,
        request: generation_service_pb2.GenerateRequest,
        context: Context,  # noqa: ARG002 - signature of grpc
    ) -> generation_service_pb2.GenerateResponse:
        """Waits for the end; the output counts as released with the answer."""
        call = current_call()
        asked = _asked(request.spec, request.request_id, request.on_disconnect, call)
        generation, _ = await self._generations.open(asked, call)
        result = await self._generations.read_whole(
            generation, Reader(asked.principal.key_id), call, frames.result
        )
        return generation_service_pb2.GenerateResponse(generation=result)

    async def ResumeGeneration(
        self, request: generation_service_pb2.ResumeGenerationRequest, context: Context
    ) -> None:
        """Streams what was missed, then what is new."""
        call = current_call()
        interval_s = _interval_s(request.frame_interval, "frame_interval")
        principal = call.require_principal()
        generation = self._generations.find(request.generation_id, principal)
        if request.after_sequence > generation.sequence:
            raise invalid_field(
                "after_sequence",
                FieldRule.OUT_OF_RANGE,
                f"must be at most {generation.sequence}, the last frame so far",
            )
        reader = Reader(
            principal.key_id,
            write=context.write,
            ticker=self._ticker,
            interval_s=interval_s,
            after_sequence=request.after_sequence,
        )
        await self._generations.read(generation, reader, call)

    async def CancelGeneration(
        self,
        request: generation_service_pb2.CancelGenerationRequest,
        context: Context,  # noqa: ARG002 - signature of grpc
    ) -> generation_service_pb2.CancelGenerationResponse:
        """Stops a generation of the caller's project."""
        principal = current_call().require_principal()
        self._generations.cancel(request.generation_id, principal)
        return generation_service_pb2.CancelGenerationResponse()

    async def QuoteGeneration(
        self,
        request: generation_service_pb2.QuoteGenerationRequest,
        context: Context,  # noqa: ARG002 - signature of grpc
    ) -> generation_service_pb2.QuoteGenerationResponse:
        """Says what a generation would take."""
        return await self._quotes.quote(request.spec, current_call())

    async def GetCapabilities(
        self,
        request: generation_service_pb2.GetCapabilitiesRequest,
        context: Context,  # noqa: ARG002 - signature of grpc
    ) -> generation_service_pb2.GetCapabilitiesResponse:
        """Says what an offering can do now."""
        return self._quotes.capabilities(request.model)


class TokenizationService:
    """maas.inference.v1.TokenizationService."""

    def __init__(self, tokenization: Tokenization) -> None:
        self._tokenization = tokenization

    async def CountTokens(
        self,
        request: tokenization_service_pb2.CountTokensRequest,
        context: Context,  # noqa: ARG002 - signature of grpc
    ) -> tokenization_service_pb2.CountTokensResponse:
        """Counts the tokens of a prompt."""
        return await self._tokenization.count(request, current_call())

    async def Tokenize(
        self,
        request: tokenization_service_pb2.TokenizeRequest,
        context: Context,  # noqa: ARG002 - signature of grpc
    ) -> tokenization_service_pb2.TokenizeResponse:
        """Turns text into token ids."""
        return await self._tokenization.tokenize(request, current_call())

    async def Detokenize(
        self,
        request: tokenization_service_pb2.DetokenizeRequest,
        context: Context,  # noqa: ARG002 - signature of grpc
    ) -> tokenization_service_pb2.DetokenizeResponse:
        """Turns token ids into text."""
        return await self._tokenization.detokenize(request, current_call())


class EmbeddingService:
    """maas.inference.v1.EmbeddingService."""

    def __init__(self, embeddings: Embeddings) -> None:
        self._embeddings = embeddings

    async def Embed(
        self,
        request: embedding_service_pb2.EmbedRequest,
        context: Context,  # noqa: ARG002 - signature of grpc
    ) -> embedding_service_pb2.EmbedResponse:
        """Embeds all inputs."""
        return await self._embeddings.embed(request, current_call())


def _asked(
    spec: generation_pb2.GenerationSpec,
    request_id: str,
    on_disconnect: generation_service_pb2.DisconnectPolicy.ValueType,
    call: Call,
    *,
    interval_s: float | None = None,
) -> Asked:
    """Reads what is asked for. Without an interval the answer is the whole result."""
    lives_on = on_disconnect == generation_service_pb2.DISCONNECT_POLICY_CONTINUE
    deadline_s = call.deadline_s
    if lives_on and call.policy.default_deadline_s is not None:
        # It does not depend on its caller's patience, but not even so does it run for ever.
        deadline_s = call.started_s + call.policy.default_deadline_s
    return Asked(
        spec=spec,
        request_id=request_id,
        # Once: a prompt may be a megabyte.
        request_sha256=convert.sha256_of(spec) if request_id else "",
        lives_on=lives_on,
        is_unary=interval_s is None,
        interval_s=interval_s or 0.0,
        principal=call.require_principal(),
        arrived_s=call.started_s,
        deadline_s=deadline_s,
    )


def _interval_s(duration: Duration, field: str) -> float:
    seconds = convert.seconds_of(duration)
    if not 0 <= seconds <= FRAME_INTERVAL_MAX_S:
        raise invalid_field(
            field, FieldRule.OUT_OF_RANGE, f"must be from 0 to {FRAME_INTERVAL_MAX_S:g} s"
        )
    return seconds
