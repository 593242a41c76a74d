"""Frames that are written by hand are what the library reads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from maas.inference.v1 import generation_pb2, generation_service_pb2, scores_pb2

from services.gateway import frames

ENDS = st.one_of(
    st.none(),
    st.builds(
        generation_pb2.OutputEnd,
        reason=st.sampled_from(list(generation_pb2.FinishReason.values())),
    ),
)
# Around the places where a varint grows by a byte.
COUNTS = st.one_of(
    st.integers(0, 2**63 - 1), st.sampled_from([0, 127, 128, 16383, 16384, 2**21, 2**32])
)
TOKENS = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 127, 128, 16383, 16384]))


@given(
    sequence=st.integers(1, 2**64 - 1),
    first_sequence=st.integers(0, 2**64 - 1),
    text=st.text(max_size=40),
    token_ids=st.lists(TOKENS, max_size=12),
    end=ENDS,
    output_tokens=COUNTS,
)
def test_a_delta_reads_as_it_was_meant(
    sequence: int,
    first_sequence: int,
    text: str,
    token_ids: list[int],
    end: generation_pb2.OutputEnd | None,
    output_tokens: int,
) -> None:
    made = frames.delta(
        sequence=sequence,
        first_sequence=first_sequence,
        text=text,
        token_ids=token_ids,
        end=end,
        output_tokens=output_tokens,
    )

    # Absent text and an empty one are two things to the library.
    output = generation_pb2.OutputDelta(token_ids=token_ids, end=end)
    if text:
        output.text = text
    meant = generation_pb2.GenerationFrame(
        sequence=sequence,
        first_sequence=first_sequence,
        delta=generation_pb2.Delta(outputs=[output]),
        output_tokens=output_tokens,
    )
    for kind in (
        generation_service_pb2.StreamGenerateResponse,
        generation_service_pb2.ResumeGenerationResponse,
    ):
        read = kind.FromString(made.response)
        assert read.frame == meant
    assert (made.sequence, made.is_delta) == (sequence, True)
    assert made.response == generation_service_pb2.StreamGenerateResponse(
        frame=meant
    ).SerializeToString(deterministic=True)


@given(
    sequence=st.integers(1, 2**64 - 1),
    first_sequence=st.integers(0, 2**64 - 1),
    texts=st.lists(st.text(max_size=9), max_size=4),
    output_tokens=COUNTS,
)
def test_a_frame_of_encoded_deltas_reads_as_it_was_meant(
    sequence: int, first_sequence: int, texts: list[str], output_tokens: int
) -> None:
    delta = generation_pb2.Delta(
        outputs=[generation_pb2.OutputDelta(index=n, text=text) for n, text in enumerate(texts)]
    )

    made = frames.rich_delta(
        sequence=sequence,
        outputs=delta.SerializeToString(),
        output_tokens=output_tokens,
        first_sequence=first_sequence,
    )

    meant = generation_pb2.GenerationFrame(
        sequence=sequence,
        first_sequence=first_sequence,
        delta=delta,
        output_tokens=output_tokens,
    )
    assert generation_service_pb2.StreamGenerateResponse.FromString(made.response).frame == meant
    assert (made.sequence, made.is_delta) == (sequence, True)


@given(sequence=st.integers(1, 2**64 - 1), offset=st.integers(0, 2**32 - 1), output_tokens=COUNTS)
def test_a_frame_of_prompt_scores_reads_as_it_was_meant(
    sequence: int, offset: int, output_tokens: int
) -> None:
    scores = scores_pb2.PromptScores(offset=offset, scores=scores_pb2.TokenScores(token_ids=[1, 2]))

    made = frames.prompt_scores(
        sequence=sequence, scores=scores.SerializeToString(), output_tokens=output_tokens
    )

    meant = generation_pb2.GenerationFrame(
        sequence=sequence, prompt_scores=scores, output_tokens=output_tokens
    )
    assert generation_service_pb2.StreamGenerateResponse.FromString(made.response).frame == meant
    assert (made.sequence, made.is_delta) == (sequence, False)
