"""Frames of the token stream, made of a generation and written as the contract says.

Deltas are written by hand: there is one for nearly every token, and building and writing four
nested messages for each costs several microseconds. A test compares them with what the library
reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from maas.inference.v1 import generation_pb2, generation_service_pb2

from services.gateway import convert
from services.gateway.wire import SHORT, VARINTS, field, varint

if TYPE_CHECKING:
    from services.gateway.running import Generation

# Numbers of fields with their wire types, as they stand on the wire (varints: 0, lengths: 2).
_RESPONSE_FRAME = b"\x0a"
_FRAME_SEQUENCE = b"\x08"
_FRAME_DELTA = b"\x1a"
_FRAME_FIRST_SEQUENCE = b"\x40"
_FRAME_OUTPUT_TOKENS = b"\x48"
_DELTA_OUTPUTS = b"\x0a"
_OUTPUT_TEXT = b"\x12"
_OUTPUT_TOKEN_IDS = b"\x1a"
_OUTPUT_END = b"\x2a"
_FRAME_PROMPT_SCORES = b"\x3a"
# Lengths below are of one byte as varints.
_SHORT_TEXT = 0x70


class Frame(NamedTuple):
    """A frame, ready to be sent.

    Attributes:
        sequence: its number.
        response: StreamGenerateResponse or ResumeGenerationResponse: they look the same.
        is_delta: it brings output.
    """

    sequence: int
    response: bytes
    is_delta: bool = False


def started(generation: Generation, *, is_replay: bool) -> Frame:
    """Makes the first frame."""
    opening = generation.opening
    return _frame(
        generation_pb2.GenerationFrame(
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
    )


def delta(
    *,
    sequence: int,
    text: str,
    token_ids: Sequence[int],
    end: generation_pb2.OutputEnd | None,
    output_tokens: int,
    first_sequence: int = 0,
) -> Frame:
    """Makes a frame of new output. On the token path."""
    data = text.encode("utf-8")
    if (
        data
        and len(data) < _SHORT_TEXT
        and sequence < SHORT
        and output_tokens < SHORT
        and not token_ids
        and end is None
        and not first_sequence
    ):
        # Nearly every frame. Its parts are ready-made but for the text.
        frame = _SEQUENCES[sequence] + _TEXTS[len(data)] + data + _COUNTS[output_tokens]
        return Frame(sequence, _RESPONSES[len(frame)] + frame, True)
    output = field(_OUTPUT_TEXT, data) if data else b""
    if token_ids:
        output += field(_OUTPUT_TOKEN_IDS, b"".join([varint(token_id) for token_id in token_ids]))
    if end is not None:
        output += field(_OUTPUT_END, end.SerializeToString())
    return rich_delta(
        sequence=sequence,
        outputs=field(_DELTA_OUTPUTS, output),
        output_tokens=output_tokens,
        first_sequence=first_sequence,
    )


def rich_delta(
    *, sequence: int, outputs: bytes, output_tokens: int, first_sequence: int = 0
) -> Frame:
    """Makes a frame of output that is encoded already, as the entries of Delta.outputs."""
    frame = _FRAME_SEQUENCE + varint(sequence) + field(_FRAME_DELTA, outputs)
    if first_sequence:
        frame += _FRAME_FIRST_SEQUENCE + varint(first_sequence)
    if output_tokens:
        frame += _FRAME_OUTPUT_TOKENS + varint(output_tokens)
    return Frame(sequence, field(_RESPONSE_FRAME, frame), is_delta=True)


def prompt_scores(*, sequence: int, scores: bytes, output_tokens: int) -> Frame:
    """Makes a frame of log-probabilities of the prompt, which are encoded already."""
    frame = _FRAME_SEQUENCE + varint(sequence) + field(_FRAME_PROMPT_SCORES, scores)
    if output_tokens:
        frame += _FRAME_OUTPUT_TOKENS + varint(output_tokens)
    return Frame(sequence, field(_RESPONSE_FRAME, frame))


def finished(generation: Generation) -> Frame:
    """Makes the last frame."""
    return _frame(
        generation_pb2.GenerationFrame(
            sequence=generation.sequence,
            finished=generation_pb2.Finished(
                usage=convert.usage_to_pb(generation.usage),
                timings=timings(generation),
                charge=convert.money_to_pb(generation.charge),
                receipt=convert.receipt_to_pb(generation.receipt),
            ),
            output_tokens=generation.output_tokens,
        )
    )


def _frame(frame: generation_pb2.GenerationFrame) -> Frame:
    response = generation_service_pb2.StreamGenerateResponse(frame=frame)
    return Frame(frame.sequence, response.SerializeToString())


_SEQUENCES = [_FRAME_SEQUENCE + number for number in VARINTS]
_COUNTS = [b"", *(_FRAME_OUTPUT_TOKENS + number for number in VARINTS[1:])]
_RESPONSES = [_RESPONSE_FRAME + varint(length) for length in range(2 * _SHORT_TEXT)]
# What stands before a text of each length: the heads of delta, outputs and text.
_TEXTS = [
    b"".join(
        head + varint(length + rest)
        for head, rest in ((_FRAME_DELTA, 4), (_DELTA_OUTPUTS, 2), (_OUTPUT_TEXT, 0))
    )
    for length in range(_SHORT_TEXT)
]


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
    opening = generation.opening
    outputs, scores = generation.outputs()
    return generation_pb2.Generation(
        generation_id=opening.generation_id,
        offering=opening.offering,
        model_version=opening.model_version,
        outputs=outputs,
        prompt_scores=scores,
        usage=convert.usage_to_pb(generation.usage),
        timings=timings(generation),
        charge=convert.money_to_pb(generation.charge),
        create_time=convert.timestamp_to_pb(opening.start_time),
        seed=generation.terms.seed,
        receipt=convert.receipt_to_pb(generation.receipt),
    )
