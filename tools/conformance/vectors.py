"""Features of embeddings and of LoRA adapters: W-16, W-17."""

from __future__ import annotations

import asyncio
import math
import struct

from maas.catalog.v1 import model_pb2
from maas.inference.v1 import embedding_service_pb2, generation_pb2

from libs.errors import Code, Reason
from tools.conformance.ability import refused
from tools.conformance.client import Refusal, Tenant
from tools.conformance.requests import greedy
from tools.conformance.trial import Trial
from tools.conformance.verdict import expect, expect_equal, expect_same_text

_TEXTS = (
    "The small dog sleeps in the garden.",
    "The small dog sleeps in the kitchen.",
    "Numbers are added one after the other.",
)
_CLOSE = 1e-3
_HALF_CLOSE = 5e-3
_ANSWER_BYTES_MAX = 3 * 1024 * 1024

EmbedRequest = embedding_service_pb2.EmbedRequest
EmbedInput = embedding_service_pb2.EmbedInput
TokenIds = generation_pb2.TokenIds


def _request(dimensions: int = 0, encoding: int = 0) -> EmbedRequest:
    request = EmbedRequest(inputs=[EmbedInput(text=text) for text in _TEXTS])
    request.encoding = embedding_service_pb2.VectorEncoding.ValueType(encoding)
    if dimensions:
        request.dimensions = dimensions
    return request


async def vectors_are_exact(trial: Trial) -> None:
    """W-16: unit vectors, the same in every encoding and alone; dimensions; charged as input."""
    books = trial.require_books()
    async with trial.tenant() as tenant:
        most = (await tenant.capabilities()).capabilities.embedding_dimensions
        if not most:
            trial.lack("embeddings: the model makes none")
            return
        before = await books.posted()
        plain = await tenant.embed(_request())
        vectors = [list(embedding.values) for embedding in plain.embeddings]
        _check_vectors(vectors, most)
        spent = plain.charge.nanos + await _encodings(tenant, vectors)
        spent += await _shorter(tenant, vectors, most // 2)
        spent += await _alone(tenant, vectors)
        tokens = [len(await tenant.tokenize(text)) for text in _TEXTS]
        counts = [embedding.input_tokens for embedding in plain.embeddings]
        expect(
            all(got >= want for got, want in zip(counts, tokens, strict=True)),
            f"embedded {counts} tokens of texts that have {tokens}",
        )
        expect_equal(plain.usage.input_tokens, sum(counts), "input tokens")
        expect_equal(plain.usage.output_tokens, 0, "output tokens of an embedding")
        record = await books.record(plain.generation_id)
        expect_equal(record.usage, plain.usage, "usage of the record")
        expect_equal(record.charge, plain.charge, "charge of the record")
        expect(await books.is_priced(record), "the charge is not the price of the input tokens")
        await _too_large(trial, tenant, most)
        expect_equal(before - await books.posted(), spent, "nanos taken from the balance")
    trial.show(
        f"vectors of {most} numbers and length 1, the same in three encodings, alone and from"
        f" token ids; {sum(counts)} input tokens charged once; too many dimensions refused"
    )


def _check_vectors(vectors: list[list[float]], most: int) -> None:
    expect_equal([len(vector) for vector in vectors], [most] * len(vectors), "numbers of vectors")
    lengths = [math.hypot(*vector) for vector in vectors]
    expect(all(abs(length - 1) < _CLOSE for length in lengths), f"lengths are {lengths}")
    near, far = _cosine(vectors[0], vectors[1]), _cosine(vectors[0], vectors[2])
    expect(near > far, f"like sentences are {near:.3f} close, unlike ones {far:.3f}")


def _cosine(one: list[float], other: list[float]) -> float:
    return math.fsum(left * right for left, right in zip(one, other, strict=True))


def _far(one: list[float], other: list[float]) -> float:
    return max(abs(left - right) for left, right in zip(one, other, strict=True))


async def _encodings(tenant: Tenant, vectors: list[list[float]]) -> int:
    nanos = 0
    for encoding, letter, close in (
        (embedding_service_pb2.VECTOR_ENCODING_FLOAT32_LE, "f", _CLOSE),
        (embedding_service_pb2.VECTOR_ENCODING_FLOAT16_LE, "e", _HALF_CLOSE),
    ):
        answer = await tenant.embed(_request(encoding=encoding))
        nanos += answer.charge.nanos
        for embedding, vector in zip(answer.embeddings, vectors, strict=True):
            got = list(struct.unpack(f"<{len(vector)}{letter}", embedding.packed))
            expect(_far(got, vector) < close, f"encoding {encoding} gives another vector")
    return nanos


async def _shorter(tenant: Tenant, vectors: list[list[float]], dimensions: int) -> int:
    answer = await tenant.embed(_request(dimensions=dimensions))
    for embedding, vector in zip(answer.embeddings, vectors, strict=True):
        length = math.hypot(*vector[:dimensions])
        wanted = [value / length for value in vector[:dimensions]]
        expect(_far(list(embedding.values), wanted) < _CLOSE, "a shorter vector is another one")
    return answer.charge.nanos


async def _alone(tenant: Tenant, vectors: list[list[float]]) -> int:
    """Each input by itself, as text; and the first as the token ids that its text has."""
    nanos = 0
    requests = [EmbedRequest(inputs=[EmbedInput(text=text)]) for text in _TEXTS]
    for request, vector in zip(requests, vectors, strict=True):
        answer = await tenant.embed(request)
        nanos += answer.charge.nanos
        expect(_far(list(answer.embeddings[0].values), vector) < _CLOSE, "company changes a vector")
    ids = await tenant.tokenize(_TEXTS[0], as_prompt=True)
    answer = await tenant.embed(EmbedRequest(inputs=[EmbedInput(tokens=TokenIds(ids=ids))]))
    far = _far(list(answer.embeddings[0].values), vectors[0])
    expect(far < _CLOSE, "the token ids of a text give another vector than the text")
    return nanos + answer.charge.nanos


async def _too_large(trial: Trial, tenant: Tenant, dimensions: int) -> None:
    count = _ANSWER_BYTES_MAX // (4 * dimensions) + 1
    if count <= 2048:  # noqa: PLR2004 - of the contract
        request = EmbedRequest(inputs=[EmbedInput(text="x")] * count)
        refusal = await refused(tenant, request, "an answer above 3 MiB")
        expect(refusal.code is Code.INVALID_ARGUMENT, f"an answer above 3 MiB: {refusal}")
        trial.show("an answer above 3 MiB refused")
    else:
        trial.show(f"no answer of {dimensions} dimensions can be above 3 MiB")
    refusal = await refused(tenant, _request(dimensions=dimensions + 1), "too many dimensions")
    expect_equal(refusal.fields, ("dimensions",), "field of the refusal")


async def adapters_are_applied(trial: Trial) -> None:
    """W-17: an adapter by name, loaded when asked for; conflicts and unknown names are typed."""
    async with trial.tenant() as tenant:
        if not (await tenant.capabilities()).capabilities.adapters:
            trial.lack("adapters: the model takes none")
            return
        unknown = greedy(tenant)
        unknown.adapter = "adapters/none-such"
        refusal = await refused(tenant, unknown, "an unknown adapter")
        refusal.expect(Code.NOT_FOUND, Reason.RESOURCE_NOT_FOUND, "an unknown adapter")
        trial.show("an unknown name is refused")
        file = trial.deployment.adapter
        if file is None:
            trial.lack("an adapter: needs --adapter")
            return
        name = f"adapters/{file.adapter_id}"
        if file.path:
            await _create(trial, tenant, name)
        await _applied(trial, tenant, name)


async def _create(trial: Trial, tenant: Tenant, name: str) -> None:
    desk, file = trial.require_adapters(), trial.deployment.adapter
    assert file is not None
    version = (await tenant.capabilities()).model_version
    made = await desk.create(
        file.adapter_id,
        model_pb2.Adapter(model_version=version, path=file.path, digest=file.digest),
    )
    again = await desk.create(file.adapter_id, made)
    expect_equal(again, made, "an adapter that was created twice")
    other = model_pb2.Adapter()
    other.CopyFrom(made)
    other.digest = f"sha256:{0:064x}"
    try:
        await desk.create(file.adapter_id, other)
        expect(is_so=False, otherwise="an adapter's name was given to other content")
    except Refusal as refused_:
        refused_.expect(Code.ALREADY_EXISTS, Reason.RESOURCE_EXISTS, "other content")
    await trial.known(tenant, name)
    trial.show("creating is idempotent, other content under its name ALREADY_EXISTS")


async def _applied(trial: Trial, tenant: Tenant, name: str) -> None:
    spec = greedy(tenant, 64)
    before = await tenant.generate(spec)
    adapted = generation_pb2.GenerationSpec()
    adapted.CopyFrom(spec)
    adapted.adapter = name
    *results, beside = await asyncio.gather(
        *(tenant.generate(adapted) for _ in range(3)), tenant.generate(spec)
    )
    texts = {result.outputs[0].text for result in results}
    expect_equal(len(texts), 1, "outputs of one adapter and one seed")
    after = await tenant.generate(spec)
    expect(before.outputs[0].text not in texts, "the adapter changes nothing")
    for base, what in ((beside, "beside"), (after, "after")):
        expect_same_text(
            base.outputs[0].text, before.outputs[0].text, f"the base model {what} an adapter"
        )
    trial.show("applied by name, the base model unchanged beside it")
