"""Vectors: from what a worker has made to what a caller asked for. Pure.

A worker makes all numbers, as 32-bit floats. The first of them, scaled to length 1 again, are an
embedding of fewer dimensions. How large an answer becomes follows from how many there are, so it is
known, and refused, before any work is done.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
from maas.engine.v1 import engine_service_pb2
from maas.inference.v1 import embedding_service_pb2

from libs.errors import FieldRule, InvalidArgument, invalid_field
from libs.limits import INTERNAL_MESSAGE_BYTES_MAX

RESPONSE_BYTES_MAX = 3 * 1024 * 1024
# Counts, marks and lengths around the numbers of one embedding, and of the whole answer.
EMBEDDING_OVERHEAD_BYTES = 32
RESPONSE_OVERHEAD_BYTES = 1024
FLOAT_BYTES = 4
# Vectors in a worker's answer, with as much again for all the rest.
MADE_BYTES_MAX = INTERNAL_MESSAGE_BYTES_MAX // 2

_FLOAT16 = embedding_service_pb2.VECTOR_ENCODING_FLOAT16_LE
_PACKED = {embedding_service_pb2.VECTOR_ENCODING_FLOAT32_LE: "<f4", _FLOAT16: "<f2"}
# Field 1 of Embedding, with a length: all its numbers at once.
_VALUES_TAG = b"\x0a"


def check_size(
    count: int,
    *,
    dimensions: int,
    made: int,
    encoding: embedding_service_pb2.VectorEncoding.ValueType,
) -> None:
    """Sees that the answer fits.

    Args:
        count: of inputs.
        dimensions: numbers of each embedding of the answer.
        made: numbers that the worker makes of each input.
        encoding: of the answer.

    Raises:
        InvalidArgument: it does not; says what would.
    """
    most = _most_inputs(dimensions, encoding)
    if count > most:
        limit = f"the answer would be larger than {RESPONSE_BYTES_MAX} bytes"
        if encoding != _FLOAT16 and count <= _most_inputs(dimensions, _FLOAT16):
            raise invalid_field(
                "encoding",
                FieldRule.OUT_OF_RANGE,
                f"{limit}: send at most {most} inputs, or ask for VECTOR_ENCODING_FLOAT16_LE",
            )
        raise _too_many(f"{limit}: send at most {most} inputs, or ask for fewer dimensions")
    most = MADE_BYTES_MAX // (made * FLOAT_BYTES)
    if count > most:
        raise _too_many(f"send at most {most}: the model makes {made} numbers of each")


def embeddings_to_pb(
    made: engine_service_pb2.EmbedResponse,
    count: int,
    *,
    dimensions: int,
    encoding: embedding_service_pb2.VectorEncoding.ValueType,
) -> list[embedding_service_pb2.Embedding]:
    """Makes the embeddings of an answer.

    Args:
        made: by the worker.
        count: of inputs.
        dimensions: numbers of each embedding.
        encoding: of the answer.

    Raises:
        ValueError: the worker has not made what was asked for.
    """
    vectors = _shortened(_vectors(made, count), dimensions)
    packed = _PACKED.get(encoding)
    rows = vectors.astype(packed or "<f4")
    cut: Collection[int] = frozenset(made.truncated_inputs)
    embeddings = []
    for place, input_tokens in enumerate(made.input_tokens):
        numbers = rows[place].tobytes()
        embedding = embedding_service_pb2.Embedding(packed=numbers)
        if not packed:
            # On the wire a list of floats is their bytes, like `packed` but for the field's number.
            # One by one, half a million numbers would hold everybody else up.
            wire = _VALUES_TAG + embedding.SerializeToString()[1:]
            embedding = embedding_service_pb2.Embedding.FromString(wire)
        embedding.input_tokens = input_tokens
        embedding.truncated = place in cut
        embeddings.append(embedding)
    return embeddings


def _vectors(made: engine_service_pb2.EmbedResponse, count: int) -> npt.NDArray[np.float32]:
    if len(made.input_tokens) != count:
        raise ValueError("a count of tokens for each input is missing")
    if any(place >= count for place in made.truncated_inputs):
        raise ValueError("an input was cut that is not there")
    vectors = np.frombuffer(made.vectors, dtype="<f4")
    if vectors.size != count * made.dimensions:
        raise ValueError("a vector for each input is missing")
    return vectors.reshape(count, made.dimensions)


def _shortened(vectors: npt.NDArray[np.float32], dimensions: int) -> npt.NDArray[np.float32]:
    if dimensions > vectors.shape[1]:
        raise ValueError("the vectors are too short")
    first = vectors[:, :dimensions]
    if not np.isfinite(first).all():
        raise ValueError("the vectors are not numbers")
    if dimensions == vectors.shape[1]:
        return first
    lengths = np.sqrt(np.square(first, dtype=np.float64).sum(axis=1, keepdims=True))
    # A beginning that is all zeros has no direction; it stays as it is.
    return (first / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def _most_inputs(dimensions: int, encoding: embedding_service_pb2.VectorEncoding.ValueType) -> int:
    size = 2 if encoding == _FLOAT16 else FLOAT_BYTES
    one = dimensions * size + EMBEDDING_OVERHEAD_BYTES
    return (RESPONSE_BYTES_MAX - RESPONSE_OVERHEAD_BYTES) // one


def _too_many(description: str) -> InvalidArgument:
    return invalid_field("inputs", FieldRule.TOO_MANY, description)
