"""Frames of the token stream, made of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from maas.inference.v1 import generation_pb2

from services.gateway import convert

if TYPE_CHECKING:
    from services.gateway.running import Generation


def started(generation: Generation, *, is_replay: bool) -> generation_pb2.GenerationFrame:
    """Makes the first frame."""
    opening = generation.opening
    return generation_pb2.GenerationFrame(
        sequence=1,
        started=generation_pb2.Started(
            generation_id=opening.generation_id,
            offering=opening.offering,
            model_version=opening.model_version,
            create_time=convert.timestamp_to_pb(opening.start_time),
            input_tokens=opening.input_tokens,
            seed=generation.terms.seed,
            replayed=is_replay,
        ),
    )


def delta(
    *,
    sequence: int,
    text: str,
    token_ids: Sequence[int],
    end: generation_pb2.OutputEnd | None,
    output_tokens: int,
    first_sequence: int = 0,
) -> generation_pb2.GenerationFrame:
    """Makes a frame of new output. On the token path."""
    output = generation_pb2.OutputDelta(end=end)
    if text:
        output.text = text
    if token_ids:
        output.token_ids.extend(token_ids)
    return generation_pb2.GenerationFrame(
        sequence=sequence,
        first_sequence=first_sequence,
        delta=generation_pb2.Delta(outputs=(output,)),
        output_tokens=output_tokens,
    )


def finished(generation: Generation) -> generation_pb2.GenerationFrame:
    """Makes the last frame."""
    return generation_pb2.GenerationFrame(
        sequence=generation.sequence,
        finished=generation_pb2.Finished(
            usage=convert.usage_to_pb(generation.usage),
            timings=timings(generation),
            charge=convert.money_to_pb(generation.charge),
        ),
        output_tokens=generation.output_tokens,
    )


def timings(generation: Generation) -> generation_pb2.Timings:
    """Makes the durations of a generation that has ended."""
    times = generation.times
    assert generation.ended_s is not None
    first_s = generation.first_s if generation.first_s is not None else generation.ended_s
    return generation_pb2.Timings(
        queued=convert.duration_to_pb(times.accepted_s - times.arrived_s),
        time_to_first_token=convert.duration_to_pb(first_s - times.arrived_s),
        total=convert.duration_to_pb(generation.ended_s - times.arrived_s),
    )


def result(generation: Generation) -> generation_pb2.Generation:
    """Makes the whole result of a generation that is complete and kept a log.

    Raises:
        ValueError: the log has dropped some of it.
    """
    assert generation.log is not None
    opening = generation.opening
    output = generation_pb2.Output(
        index=0,
        text=generation.log.text(),
        token_ids=generation.token_ids if generation.terms.with_ids else (),
        end=generation.end_of_output,
    )
    return generation_pb2.Generation(
        generation_id=opening.generation_id,
        offering=opening.offering,
        model_version=opening.model_version,
        outputs=[output],
        usage=convert.usage_to_pb(generation.usage),
        timings=timings(generation),
        charge=convert.money_to_pb(generation.charge),
        create_time=convert.timestamp_to_pb(opening.start_time),
        seed=generation.terms.seed,
    )
