"""A client of the token API: the calls, each frame checked, each refusal kept as it came.

Written against the contract alone. Errors are read from the status's own details: one without
details has no reason here, where the suite's own library would guess it from the code.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from maas.inference.v1 import embedding_service_pb2 as embeddings
from maas.inference.v1 import generation_pb2
from maas.inference.v1 import generation_service_pb2 as generations
from maas.inference.v1 import tokenization_service_pb2 as tokenization
from maas.inference.v1.embedding_service_pb2_grpc import EmbeddingServiceStub
from maas.inference.v1.generation_service_pb2_grpc import GenerationServiceStub
from maas.inference.v1.tokenization_service_pb2_grpc import TokenizationServiceStub

from libs.errors import Code, Reason
from tools.conformance.frames import Transcript
from tools.conformance.verdict import Mismatch

if TYPE_CHECKING:
    from grpc.aio import UnaryStreamCall, UnaryUnaryMultiCallable

    FrameCall = (
        UnaryStreamCall[generations.StreamGenerateRequest, generations.StreamGenerateResponse]
        | UnaryStreamCall[generations.ResumeGenerationRequest, generations.ResumeGenerationResponse]
    )

CALL_S = 120.0
"""Deadline of a stream."""
SHORT_CALL_S = 20.0
"""Deadline of everything else."""
NARROW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64))
"""A receive window of a few frames: what the client does not read, the server cannot write."""
_DETAILS_KEY = "grpc-status-details-bin"
_DOMAIN = "maas"

_Details = tuple[str, dict[str, str], tuple[str, ...], float | None]

Request = TypeVar("Request")
Response = TypeVar("Response")


class Refusal(Exception):
    """A status that is not OK.

    Attributes:
        code: canonical code.
        reason: of the ErrorInfo; empty when the status carried none.
        metadata: of the ErrorInfo.
        fields: paths of the bad fields.
        retry_s: of RetryInfo, seconds; None when there was none.
        message: for people.
    """

    def __init__(
        self,
        code: Code,
        reason: str,
        metadata: dict[str, str],
        fields: tuple[str, ...],
        retry_s: float | None,
        message: str,
    ) -> None:
        super().__init__(f"{code.name}/{reason or 'no reason'}: {message}")
        self.code = code
        self.reason = reason
        self.metadata = metadata
        self.fields = fields
        self.retry_s = retry_s
        self.message = message

    @classmethod
    def of(cls, failure: grpc.aio.AioRpcError) -> Refusal:
        """Reads a failed call."""
        code = Code(failure.code().value[0])
        found: _Details = ("", {}, (), None)
        for key, value in failure.trailing_metadata() or ():
            if key == _DETAILS_KEY and isinstance(value, bytes):
                found = _details(value)
        return cls(code, *found, failure.details() or "")

    def expect(self, code: Code, reason: Reason, what: str) -> None:
        """States why a call has to be refused.

        Raises:
            Mismatch: it was refused otherwise.
        """
        if (self.code, self.reason) != (code, reason.value):
            raise Mismatch(f"{what}: expected {code.name}/{reason.value}, got {self}") from self


def _details(raw: bytes) -> _Details:
    """Reads reason, metadata, the paths of bad fields, and when to repeat."""
    try:
        status = status_pb2.Status.FromString(raw)
    except DecodeError:
        return "", {}, (), None
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_s: float | None = None
    reason = ""
    metadata: dict[str, str] = {}
    fields: tuple[str, ...] = ()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == _DOMAIN:
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            fields = tuple(item.field for item in bad.field_violations)
        elif detail.Unpack(retry):
            retry_s = retry.retry_delay.ToNanoseconds() / 1e9
    return reason, metadata, fields, retry_s


@dataclass(frozen=True, slots=True)
class Arrival:
    """When a frame came.

    Attributes:
        at_s: on the loop's clock.
        output_tokens: count of the frame.
    """

    at_s: float
    output_tokens: int


class Reading:
    """One call that is read by hand, so that a test may stop reading, or leave.

    Attributes:
        transcript: what came, over all calls that fed it.
        arrivals: of this call's frames.
    """

    def __init__(self, call: FrameCall, transcript: Transcript) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self.transcript = transcript
        self.arrivals: list[Arrival] = []

    async def read(self) -> generation_pb2.GenerationFrame | None:
        """Reads and checks one frame; None at an end with status OK.

        Raises:
            Refusal: the call failed.
            Mismatch: the frame is not allowed here.
        """
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            raise Refusal.of(failure) from failure
        if not isinstance(
            response, generations.StreamGenerateResponse | generations.ResumeGenerationResponse
        ):
            # At the end, and after a failure in the middle, read() gives EOF: the status decides.
            await self._require_ok()
            self.transcript.complete()
            return None
        self.transcript.add(response.frame)
        self.arrivals.append(Arrival(self._loop.time(), response.frame.output_tokens))
        return response.frame

    async def _require_ok(self) -> None:
        code = await self._call.code()
        if code is not grpc.StatusCode.OK:
            failure = grpc.aio.AioRpcError(
                code,
                await self._call.initial_metadata(),
                await self._call.trailing_metadata(),
                details=await self._call.details(),
            )
            raise Refusal.of(failure)

    async def until(self, output_tokens: int) -> None:
        """Reads until that many tokens have come.

        Raises:
            Mismatch: the stream ended before.
        """
        while self.transcript.output_tokens < output_tokens or self.transcript.started is None:
            if await self.read() is None:
                raise Mismatch(
                    f"expected {output_tokens} tokens, the stream ended after "
                    f"{self.transcript.output_tokens}"
                )

    async def to_end(self) -> Transcript:
        """Reads the rest; it has to end with finished and OK."""
        while await self.read() is not None:
            pass
        return self.transcript

    async def refusal(self, what: str) -> Refusal:
        """Reads the rest; it has to fail.

        Raises:
            Mismatch: it ended with OK.
        """
        try:
            await self.to_end()
        except Refusal as refusal:
            return refusal
        raise Mismatch(f"{what}: expected a refusal, the stream ended OK")

    def cancel(self) -> None:
        """Cancels the call, as a client does that has seen enough."""
        self._call.cancel()


class Tenant:
    """One connection with one key."""

    def __init__(self, channel: grpc.aio.Channel, key: str, model: str) -> None:
        self.model = model
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._stub = GenerationServiceStub(channel)
        self._tokens = TokenizationServiceStub(channel)
        self._embeddings = EmbeddingServiceStub(channel)

    async def capabilities(self) -> generations.GetCapabilitiesResponse:
        """What the offering can do."""
        request = generations.GetCapabilitiesRequest(model=self.model)
        return await self.call(self._stub.GetCapabilities, request)

    async def quote(
        self, spec: generation_pb2.GenerationSpec
    ) -> generations.QuoteGenerationResponse:
        """What a generation would take."""
        request = generations.QuoteGenerationRequest(spec=spec)
        return await self.call(self._stub.QuoteGeneration, request)

    async def count(self, spec: generation_pb2.GenerationSpec) -> int:
        """Tokens of a prompt."""
        request = tokenization.CountTokensRequest(spec=spec)
        return (await self.call(self._tokens.CountTokens, request)).input_tokens

    async def tokenize(self, text: str, *, as_prompt: bool = False) -> list[int]:
        """Token ids of a text, without the one that every prompt begins with, or with it."""
        request = tokenization.TokenizeRequest(
            model=self.model, text=text, add_special_tokens=as_prompt
        )
        return list((await self.call(self._tokens.Tokenize, request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; they have to be whole characters."""
        request = tokenization.DetokenizeRequest(
            model=self.model, tokens=generation_pb2.TokenIds(ids=token_ids)
        )
        response = await self.call(self._tokens.Detokenize, request)
        if response.incomplete:
            raise Mismatch(f"{len(response.incomplete)} bytes are no whole character")
        return response.text

    async def embed(self, request: embeddings.EmbedRequest) -> embeddings.EmbedResponse:
        """Embeds inputs; the model is this tenant's, whatever the request says."""
        asked = embeddings.EmbedRequest()
        asked.CopyFrom(request)
        asked.model = self.model
        return await self.call(self._embeddings.Embed, asked)

    def spec(
        self, text: str, max_output_tokens: int, *, seed: int, stops: Sequence[str] = ()
    ) -> generation_pb2.GenerationSpec:
        """A seeded request with token ids that runs to its length."""
        return generation_pb2.GenerationSpec(
            model=self.model,
            text=text,
            sampling=generation_pb2.SamplingOptions(temperature=1.0, seed=seed),
            stop=generation_pb2.StopOptions(
                max_output_tokens=max_output_tokens, stop_sequences=stops, ignore_eos=True
            ),
            output=generation_pb2.OutputOptions(return_token_ids=True),
        )

    @asynccontextmanager
    async def stream(
        self,
        spec: generation_pb2.GenerationSpec,
        *,
        request_id: str = "",
        options: generations.StreamOptions | None = None,
        timeout_s: float = CALL_S,
        may_merge: bool = False,
    ) -> AsyncIterator[Reading]:
        """Starts a generation; the call is cancelled on exit."""
        request = generations.StreamGenerateRequest(
            spec=spec, request_id=request_id, stream=options
        )
        call = self._stub.StreamGenerate(request, metadata=self._metadata, timeout=timeout_s)
        transcript = Transcript(
            with_token_ids=spec.output.return_token_ids,
            may_merge=may_merge,
            outputs=spec.output.count or 1,
        )
        try:
            yield Reading(call, transcript)
        finally:
            call.cancel()

    async def read(
        self,
        spec: generation_pb2.GenerationSpec,
        *,
        request_id: str = "",
        options: generations.StreamOptions | None = None,
        may_merge: bool = False,
    ) -> Transcript:
        """Streams a generation to its end."""
        async with self.stream(
            spec, request_id=request_id, options=options, may_merge=may_merge
        ) as reading:
            return await reading.to_end()

    @asynccontextmanager
    async def resume(
        self, generation_id: str, transcript: Transcript, *, timeout_s: float = CALL_S
    ) -> AsyncIterator[Reading]:
        """Goes on behind the last frame of a transcript; the call is cancelled on exit."""
        request = generations.ResumeGenerationRequest(
            generation_id=generation_id, after_sequence=transcript.sequence
        )
        call = self._stub.ResumeGeneration(request, metadata=self._metadata, timeout=timeout_s)
        transcript.resume()
        try:
            yield Reading(call, transcript)
        finally:
            call.cancel()

    async def generate(
        self,
        spec: generation_pb2.GenerationSpec,
        *,
        request_id: str = "",
        timeout_s: float = CALL_S,
    ) -> generation_pb2.Generation:
        """Generates without a stream."""
        request = generations.GenerateRequest(spec=spec, request_id=request_id)
        response = await self.call(self._stub.Generate, request, timeout_s=timeout_s)
        return response.generation

    async def cancel(self, generation_id: str) -> None:
        """Calls CancelGeneration."""
        request = generations.CancelGenerationRequest(generation_id=generation_id)
        await self.call(self._stub.CancelGeneration, request)

    async def call(
        self,
        method: UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        *,
        timeout_s: float = SHORT_CALL_S,
    ) -> Response:
        """Calls a unary method of any service with this key.

        Raises:
            Refusal: it failed.
        """
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as failure:
            raise Refusal.of(failure) from failure
