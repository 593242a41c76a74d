"""The token API: parse, one operation, build. See operations.py for what happens in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maas.inference.v1 import generation_pb2, generation_service_pb2

from libs.clock import Clock
from libs.rpc import current_call
from services.gateway import convert
from services.gateway.domain import EndCause
from services.gateway.operations import Generations
from services.gateway.running import RunningGeneration

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]


class GenerationService:
    """maas.inference.v1.GenerationService."""

    def __init__(self, generations: Generations, clock: Clock) -> None:
        self._generations = generations
        self._clock = clock

    async def StreamGenerate(
        self, request: generation_service_pb2.StreamGenerateRequest, context: Context
    ) -> None:
        """Streams frames as the worker makes tokens; packs what is ready into one frame."""
        spec = request.spec
        with_ids = spec.output.return_token_ids
        async with self._generations.run(spec, current_call()) as generation:
            sequence = 1
            await self._write(context, generation, sequence, started=_started(generation))
            is_over = False
            while not is_over:
                chunk = await generation.take()
                is_over = chunk.end is not None
                generation.release(chunk)
                sequence += 1
                output = generation_pb2.OutputDelta(end=chunk.end)
                if chunk.text:
                    output.text = chunk.text
                if with_ids:
                    output.token_ids.extend(chunk.token_ids)
                delta = generation_pb2.Delta(outputs=(output,))
                await self._write(context, generation, sequence, delta=delta)
            generation.finish(EndCause.COMPLETED)
            finished = self._finished(generation)
            await self._write(context, generation, sequence + 1, finished=finished)

    async def Generate(
        self,
        request: generation_service_pb2.GenerateRequest,
        context: Context,  # noqa: ARG002 - signature of grpc
    ) -> generation_service_pb2.GenerateResponse:
        """Collects all output; it counts as released with the answer."""
        spec = request.spec
        texts: list[str] = []
        token_ids: list[int] = []
        async with self._generations.run(spec, current_call()) as generation:
            end = None
            chunks = []
            while end is None:
                chunk = await generation.take()
                chunks.append(chunk)
                texts.append(chunk.text)
                token_ids += chunk.token_ids
                end = chunk.end
            for chunk in chunks:
                generation.release(chunk)
            generation.finish(EndCause.COMPLETED)
            output = generation_pb2.Output(
                index=0,
                text="".join(texts),
                token_ids=token_ids if spec.output.return_token_ids else (),
                end=end,
            )
            return generation_service_pb2.GenerateResponse(
                generation=self._generation(generation, output)
            )

    async def CancelGeneration(
        self,
        request: generation_service_pb2.CancelGenerationRequest,
        context: Context,  # noqa: ARG002 - signature of grpc
    ) -> generation_service_pb2.CancelGenerationResponse:
        """Stops a generation of the caller's project."""
        principal = current_call().require_principal()
        self._generations.cancel(request.generation_id, principal)
        return generation_service_pb2.CancelGenerationResponse()

    async def _write(
        self,
        context: Context,
        generation: RunningGeneration,
        sequence: int,
        *,
        started: generation_pb2.Started | None = None,
        delta: generation_pb2.Delta | None = None,
        finished: generation_pb2.Finished | None = None,
    ) -> None:
        frame = generation_pb2.GenerationFrame(
            sequence=sequence,
            started=started,
            delta=delta,
            finished=finished,
            output_tokens=generation.output_tokens,
        )
        generation.writing_since_s = self._clock.monotonic_s()
        await context.write(generation_service_pb2.StreamGenerateResponse(frame=frame))
        generation.writing_since_s = None

    def _finished(self, generation: RunningGeneration) -> generation_pb2.Finished:
        return generation_pb2.Finished(
            usage=convert.usage_to_pb(generation.usage),
            timings=self._timings(generation),
            charge=convert.money_to_pb(generation.charge),
        )

    def _generation(
        self, generation: RunningGeneration, output: generation_pb2.Output
    ) -> generation_pb2.Generation:
        opening = generation.opening
        return generation_pb2.Generation(
            generation_id=opening.generation_id,
            offering=opening.offering,
            model_version=opening.model_version,
            outputs=[output],
            usage=convert.usage_to_pb(generation.usage),
            timings=self._timings(generation),
            charge=convert.money_to_pb(generation.charge),
            create_time=convert.timestamp_to_pb(opening.start_time),
            seed=generation.seed,
        )

    def _timings(self, generation: RunningGeneration) -> generation_pb2.Timings:
        times = generation.times
        end_s = generation.ended_s or self._clock.monotonic_s()
        first_s = generation.first_s if generation.first_s is not None else end_s
        return generation_pb2.Timings(
            queued=convert.duration_to_pb(times.accepted_s - times.arrived_s),
            time_to_first_token=convert.duration_to_pb(first_s - times.arrived_s),
            total=convert.duration_to_pb(end_s - times.arrived_s),
        )


def _started(generation: RunningGeneration) -> generation_pb2.Started:
    opening = generation.opening
    return generation_pb2.Started(
        generation_id=opening.generation_id,
        offering=opening.offering,
        model_version=opening.model_version,
        create_time=convert.timestamp_to_pb(opening.start_time),
        input_tokens=opening.input_tokens,
        seed=generation.seed,
    )
