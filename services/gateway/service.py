"""The token API: parse, one operation, build. See operations.py for what happens in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maas.inference.v1 import generation_pb2, generation_service_pb2

from libs.errors import FieldRule, invalid_field
from libs.rpc import Call, current_call
from services.gateway import convert, frames
from services.gateway.admission import Asked
from services.gateway.operations import Generations
from services.gateway.reader import Reader
from services.gateway.ticker import Ticker

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

FRAME_INTERVAL_MAX_S = 1.0


class GenerationService:
    """maas.inference.v1.GenerationService."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations
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
