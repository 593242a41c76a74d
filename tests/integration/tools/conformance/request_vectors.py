"""Embeddings of the stand-in: a token has a direction, a text the sum of its tokens'. Pure."""

from __future__ import annotations

import struct
from functools import cache

import numpy as np
from maas.inference.v1 import embedding_service_pb2 as embeddings
from numpy.typing import NDArray

from tests.integration.tools.conformance.request_faults import Wrong
from tests.integration.tools.conformance.request_rules import DIMENSIONS
from tests.integration.tools.conformance.request_text import BOS, encode

_LETTERS = {
    embeddings.VECTOR_ENCODING_FLOAT32_LE: "f",
    embeddings.VECTOR_ENCODING_FLOAT16_LE: "e",
}


@cache
def _direction(token: int) -> NDArray[np.float64]:
    return np.random.default_rng(token).normal(size=DIMENSIONS)


def tokens_of(item: embeddings.EmbedInput, wrong: Wrong) -> list[int]:
    """Tokens of an input."""
    if item.WhichOneof("input") == "tokens":
        return list(item.tokens.ids)[1 if wrong is Wrong.IDS_DIFFER else 0 :]
    return [BOS, *encode(item.text)]


def embed(request: embeddings.EmbedRequest, wrong: Wrong) -> list[embeddings.Embedding]:
    """Embeds all inputs."""
    made = []
    for place, item in enumerate(request.inputs):
        tokens = tokens_of(item, wrong)
        vector = np.sum([_direction(token) for token in tokens], axis=0)
        if wrong is Wrong.COMPANY and len(request.inputs) > 1:
            vector = vector + _direction(place)
        if wrong is Wrong.MEANINGLESS:
            vector = _direction(0)
        vector = vector / np.linalg.norm(vector)
        if request.HasField("dimensions"):
            vector = vector[: request.dimensions]
            if wrong is not Wrong.UNSCALED:
                vector = vector / np.linalg.norm(vector)
        if wrong is Wrong.NOT_UNIT:
            vector = 2 * vector
        made.append(_written(vector, request.encoding, len(tokens), wrong))
    return made


def _written(
    vector: NDArray[np.float64],
    encoding: embeddings.VectorEncoding.ValueType,
    tokens: int,
    wrong: Wrong,
) -> embeddings.Embedding:
    letter = _LETTERS.get(encoding)
    if letter is None:
        return embeddings.Embedding(values=vector.tolist(), input_tokens=tokens)
    if wrong is Wrong.HALVES_WRONG and letter == "e":
        vector = np.roll(vector, 1)
    order = ">" if wrong is Wrong.BIG_ENDIAN else "<"
    packed = struct.pack(f"{order}{len(vector)}{letter}", *vector)
    return embeddings.Embedding(packed=packed, input_tokens=tokens)
