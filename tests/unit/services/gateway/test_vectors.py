"""From a worker's vectors to a caller's: how many numbers, how they are written, how large."""

from __future__ import annotations

import numpy as np
import pytest
from maas.engine.v1 import engine_service_pb2
from maas.inference.v1 import embedding_service_pb2 as pb

from libs.errors import FieldRule, InvalidArgument
from services.gateway import vectors

FLOAT, FLOAT32, FLOAT16 = (
    pb.VECTOR_ENCODING_FLOAT,
    pb.VECTOR_ENCODING_FLOAT32_LE,
    pb.VECTOR_ENCODING_FLOAT16_LE,
)
MIB = 1024 * 1024


def _made(rows: list[list[float]], **fields: object) -> engine_service_pb2.EmbedResponse:
    made = engine_service_pb2.EmbedResponse(
        dimensions=len(rows[0]),
        vectors=np.array(rows, dtype="<f4").tobytes(),
        input_tokens=[number + 1 for number in range(len(rows))],
    )
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(made, name)[:] = value
        else:
            setattr(made, name, value)
    return made


def _unit(count: int, dimensions: int) -> list[list[float]]:
    numbers = np.random.default_rng(7).normal(size=(count, dimensions))
    rows: list[list[float]] = (numbers / np.linalg.norm(numbers, axis=1, keepdims=True)).tolist()
    return rows


def test_all_encodings_say_the_same_numbers() -> None:
    rows = _unit(3, 384)
    made = _made(rows, truncated_inputs=[1])

    def of(encoding: pb.VectorEncoding.ValueType) -> list[pb.Embedding]:
        return vectors.embeddings_to_pb(made, 3, dimensions=384, encoding=encoding)

    for place, (plain, unsaid, packed, half) in enumerate(
        zip(of(FLOAT), of(pb.VECTOR_ENCODING_UNSPECIFIED), of(FLOAT32), of(FLOAT16), strict=True)
    ):
        assert list(plain.values) == list(unsaid.values)
        assert not plain.packed
        assert np.allclose(plain.values, rows[place], atol=1e-6)
        assert np.array_equal(np.frombuffer(packed.packed, "<f4"), np.array(plain.values, "<f4"))
        assert np.allclose(np.frombuffer(half.packed, "<f2"), plain.values, atol=1e-3)
        assert not packed.values
        assert len(half.packed) == 2 * 384
        assert plain.input_tokens == place + 1
        assert plain.truncated is half.truncated is (place == 1)


def test_fewer_dimensions_are_the_first_numbers_at_length_one() -> None:
    rows = _unit(2, 64)

    for embedding, row in zip(
        vectors.embeddings_to_pb(_made(rows), 2, dimensions=16, encoding=FLOAT), rows, strict=True
    ):
        first = np.array(row[:16])
        assert len(embedding.values) == 16
        assert np.allclose(embedding.values, first / np.linalg.norm(first), atol=1e-6)
        assert np.linalg.norm(embedding.values) == pytest.approx(1.0, abs=1e-6)


def test_a_beginning_without_a_direction_stays_as_it_is() -> None:
    (embedding,) = vectors.embeddings_to_pb(
        _made([[0.0, 0.0, 1.0]]), 1, dimensions=2, encoding=FLOAT
    )

    assert list(embedding.values) == [0.0, 0.0]


@pytest.mark.parametrize(
    "made",
    [
        _made(_unit(1, 8)),
        _made(_unit(3, 8)),
        _made(_unit(2, 8), dimensions=4),
        _made(_unit(2, 8), dimensions=0),
        _made(_unit(2, 8), vectors=b""),
        _made(_unit(2, 8), vectors=b"\0" * 63),
        _made(_unit(2, 8), input_tokens=[1]),
        _made(_unit(2, 8), truncated_inputs=[2]),
        _made(_unit(2, 4)),
        _made([[float("nan")] * 8] * 2),
    ],
)
def test_what_a_worker_has_not_made_as_asked_is_noticed(
    made: engine_service_pb2.EmbedResponse,
) -> None:
    with pytest.raises(ValueError, match=r"missing|not there|too short|not numbers|size"):
        vectors.embeddings_to_pb(made, 2, dimensions=8, encoding=FLOAT)


@pytest.mark.parametrize("encoding", [FLOAT, FLOAT32, FLOAT16])
@pytest.mark.parametrize("dimensions", [1, 384, 4096, 65_536])
def test_what_passes_fits_and_one_input_more_is_refused(
    encoding: pb.VectorEncoding.ValueType, dimensions: int
) -> None:
    most = vectors._most_inputs(dimensions, encoding)
    vectors.check_size(most, dimensions=dimensions, made=1, encoding=encoding)
    with pytest.raises(InvalidArgument):
        vectors.check_size(most + 1, dimensions=dimensions, made=1, encoding=encoding)

    size = 2 if encoding == FLOAT16 else 4
    packed = b"x" * (dimensions * size)
    embedding = pb.Embedding(packed=packed, input_tokens=2**24, truncated=True)
    whole = pb.EmbedResponse(embeddings=[embedding] * min(most, 2048), generation_id="g" * 96)
    assert whole.ByteSize() <= 3 * MIB


def test_the_refusal_says_what_would_fit() -> None:
    with pytest.raises(InvalidArgument) as by_encoding:
        vectors.check_size(1000, dimensions=1024, made=1024, encoding=FLOAT)
    with pytest.raises(InvalidArgument) as by_count:
        vectors.check_size(2000, dimensions=1024, made=1024, encoding=FLOAT)
    with pytest.raises(InvalidArgument) as half:
        vectors.check_size(2000, dimensions=1024, made=1024, encoding=FLOAT16)

    fields = [
        (caught.value.violations[0].field, caught.value.violations[0].rule)
        for caught in (by_encoding, by_count, half)
    ]
    assert fields == [
        ("encoding", FieldRule.OUT_OF_RANGE),
        ("inputs", FieldRule.TOO_MANY),
        ("inputs", FieldRule.TOO_MANY),
    ]
    assert "VECTOR_ENCODING_FLOAT16_LE" in by_encoding.value.message
    assert str(vectors._most_inputs(1024, FLOAT)) in by_count.value.message
    assert str(vectors._most_inputs(1024, FLOAT16)) in half.value.message


def test_what_a_worker_could_not_send_is_refused_before_it_is_asked() -> None:
    vectors.check_size(2048, dimensions=8, made=4096, encoding=FLOAT)
    with pytest.raises(InvalidArgument) as caught:
        vectors.check_size(2048, dimensions=8, made=4097, encoding=FLOAT)

    assert caught.value.violations[0].field == "inputs"
