"""A client of a gateway under test: what it asks for, and what it got."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from maas.common.v1 import money_pb2
from maas.inference.v1 import generation_pb2, generation_service_pb2, generation_service_pb2_grpc

from libs import limits
from libs.errors import MaasError
from libs.rpc.status import error_of
from tests.integration.services.gateway.neighbours import ALICE, Caller

if TYPE_CHECKING:
    from grpc.aio import UnaryStreamCall, UnaryUnaryCall

    Stream = UnaryStreamCall[Any, Any]
    Unary = UnaryUnaryCall[
        generation_service_pb2.GenerateRequest, generation_service_pb2.GenerateResponse
    ]

CANCEL = generation_service_pb2.DISCONNECT_POLICY_CANCEL
CONTINUE = generation_service_pb2.DISCONNECT_POLICY_CONTINUE
# Longer than anything that a test waits for: what hangs fails.
WAIT_S = 10.0
# What was refused is refused: a client that repeats by itself would only make tests slow.
_OPTIONS = [
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", limits.INTERNAL_MESSAGE_BYTES_MAX),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a test wants to be generated, and how.

    Attributes:
        text: the prompt.
        most: output tokens.
        request_id: idempotency key.
        on_disconnect: what happens when the caller leaves.
        interval_s: seconds between frames.
        with_ids: whether token ids come back.
        max_charge: nanos; None for no limit.
        currency: of max_charge.
    """

    text: str = "hello"
    most: int = 100
    request_id: str = ""
    on_disconnect: generation_service_pb2.DisconnectPolicy.ValueType = CANCEL
    interval_s: float = 0.0
    with_ids: bool = False
    max_charge: int | None = None
    currency: str = "USD"

    def spec(self) -> generation_pb2.GenerationSpec:
        """Makes the spec."""
        spec = generation_pb2.GenerationSpec(
            model="m",
            text=self.text,
            stop=generation_pb2.StopOptions(max_output_tokens=self.most),
            output=generation_pb2.OutputOptions(return_token_ids=self.with_ids),
        )
        if self.max_charge is not None:
            money = money_pb2.Money(currency_code=self.currency, nanos=self.max_charge)
            spec.max_charge.CopyFrom(money)
        return spec

    def stream_request(self) -> generation_service_pb2.StreamGenerateRequest:
        """Makes the request for a stream."""
        return generation_service_pb2.StreamGenerateRequest(
            spec=self.spec(),
            request_id=self.request_id,
            stream=generation_service_pb2.StreamOptions(
                frame_interval=duration(self.interval_s), on_disconnect=self.on_disconnect
            ),
        )

    def unary_request(self) -> generation_service_pb2.GenerateRequest:
        """Makes the request for a whole result."""
        return generation_service_pb2.GenerateRequest(
            spec=self.spec(), request_id=self.request_id, on_disconnect=self.on_disconnect
        )


def duration(seconds: float) -> Duration:
    """Makes a Duration, to the millisecond."""
    message = Duration()
    message.FromMilliseconds(round(seconds * 1000))
    return message


@dataclass(slots=True, eq=False)
class Reading:
    """One call that reads a stream.

    Attributes:
        call: as grpc gave it.
        frames: read so far.
    """

    call: Stream
    frames: list[generation_pb2.GenerationFrame] = field(default_factory=list)

    async def next(self) -> generation_pb2.GenerationFrame | None:
        """Reads a frame; None at the end.

        Raises:
            MaasError: what the gateway raised.
        """
        try:
            async with asyncio.timeout(WAIT_S):
                response: Any = await self.call.read()
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from failure
        if response is grpc.aio.EOF:
            return None
        self.frames.append(response.frame)
        return self.frames[-1]

    async def until(self, tokens: int) -> Self:
        """Reads until that many output tokens have come, or `started` for none."""
        while not self.frames or self.frames[-1].output_tokens < tokens:
            assert await self.next() is not None
        return self

    async def rest(self) -> Self:
        """Reads to the end."""
        while await self.next() is not None:
            pass
        return self

    async def failure(self) -> MaasError:
        """Reads a stream that has to fail."""
        with pytest.raises(MaasError) as caught:
            await self.rest()
        return caught.value

    @property
    def text(self) -> str:
        """All text."""
        return "".join(out.text for frame in self.frames for out in frame.delta.outputs)

    @property
    def token_ids(self) -> list[int]:
        """All token ids."""
        return [
            token for frame in self.frames for out in frame.delta.outputs for token in out.token_ids
        ]

    @property
    def sequences(self) -> list[int]:
        """Numbers of all frames, those of merged ones too."""
        return [
            number
            for frame in self.frames
            for number in range(frame.first_sequence or frame.sequence, frame.sequence + 1)
        ]

    @property
    def last(self) -> generation_pb2.GenerationFrame:
        """Frame read last."""
        return self.frames[-1]

    @property
    def generation_id(self) -> str:
        """From `started`."""
        return self.frames[0].started.generation_id

    @property
    def kinds(self) -> list[str | None]:
        """What each frame says."""
        return [frame.WhichOneof("event") for frame in self.frames]


class Client:
    """One connection with one key. An async context manager; leaving drops the connection."""

    def __init__(self, endpoint: str, caller: Caller = ALICE) -> None:
        self._channel = grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        self.stub = generation_service_pb2_grpc.GenerationServiceStub(self._channel)
        self.metadata = (("authorization", f"Bearer {caller.secret}"),)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drop()

    async def drop(self) -> None:
        """Breaks the connection, calls and all."""
        await self._channel.close()

    def stream(self, wish: Wish | None = None, *, timeout_s: float | None = None) -> Reading:
        """Asks for a stream."""
        request = (wish or Wish()).stream_request()
        return Reading(self.stub.StreamGenerate(request, metadata=self.metadata, timeout=timeout_s))

    def resume(self, generation_id: str, after: int = 0, interval_s: float = 0.0) -> Reading:
        """Asks for the rest of a stream."""
        request = generation_service_pb2.ResumeGenerationRequest(
            generation_id=generation_id, after_sequence=after, frame_interval=duration(interval_s)
        )
        return Reading(self.stub.ResumeGeneration(request, metadata=self.metadata))

    def unary(self, wish: Wish | None = None, *, timeout_s: float | None = None) -> Unary:
        """Asks for a whole result; read it with `answer` or `refusal`."""
        request = (wish or Wish()).unary_request()
        call: Unary = self.stub.Generate(request, metadata=self.metadata, timeout=timeout_s)
        return call

    async def cancel(self, generation_id: str) -> None:
        """Stops a generation.

        Raises:
            MaasError: what the gateway raised.
        """
        request = generation_service_pb2.CancelGenerationRequest(generation_id=generation_id)
        try:
            await self.stub.CancelGeneration(request, metadata=self.metadata)
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from failure


async def answer(call: Unary) -> generation_pb2.Generation:
    """Waits for a whole result.

    Raises:
        MaasError: what the gateway raised.
    """
    try:
        async with asyncio.timeout(WAIT_S):
            response = await call
    except grpc.aio.AioRpcError as failure:
        raise error_of(failure) from failure
    return response.generation


async def refusal(call: Unary) -> MaasError:
    """Waits for a call that has to fail."""
    with pytest.raises(MaasError) as caught:
        await answer(call)
    return caught.value
