"""Embed: one place of the worker for each call, and what becomes of it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from maas.engine.v1 import engine_service_pb2 as pb
from maas.inference.v1 import embedding_service_pb2, generation_pb2

from libs.errors import (
    Cancelled,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    MaasError,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from libs.testing import FakeClock
from services.worker.engine.base import EngineAbilities
from tests.integration.services.worker.harness import (
    CONTEXT_LENGTH,
    MAX_WAITING,
    MODEL_VERSION,
    TOKENIZER,
    Worker,
    eventually,
    execution,
    running_worker,
)
from tests.integration.services.worker.scripted import CAPACITY, DIMENSIONS, ScriptedEngine


def new_engine() -> ScriptedEngine:
    return ScriptedEngine(TOKENIZER.vocabulary_size, context_length=CONTEXT_LENGTH)


def request(
    *texts: str, ids: list[int] | None = None, truncate: bool = False, name: str = "embed-1"
) -> pb.EmbedRequest:
    inputs = [embedding_service_pb2.EmbedInput(text=text) for text in texts]
    if ids is not None:
        tokens = generation_pb2.TokenIds(ids=ids)
        inputs.append(embedding_service_pb2.EmbedInput(tokens=tokens))
    return pb.EmbedRequest(
        execution_id=name, model_version=MODEL_VERSION, inputs=inputs, truncate=truncate
    )


async def embed(worker: Worker, asked: pb.EmbedRequest) -> pb.EmbedResponse:
    answer = await worker.peer.call(worker.stub.Embed, asked, timeout_s=10)
    assert isinstance(answer, pb.EmbedResponse)
    return answer


async def test_the_engine_time_of_the_inputs_is_told() -> None:
    """While the engine works on them: not while they wait to become ids, or for their answer."""
    engine, clock = new_engine(), FakeClock()
    engine.may_embed.clear()
    async with running_worker(engine=engine, clock=clock) as worker:
        clock.advance(7.0)
        answer = asyncio.create_task(embed(worker, request("A")))
        await eventually(lambda: len(engine.embedding) == 1)
        clock.advance(0.25)
        engine.may_embed.set()

        assert (await answer).engine_time.ToNanoseconds() == 250_000_000


async def test_inputs_are_embedded_in_their_order() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker:
        answer = await embed(worker, request("A", "B", ids=[67, 1]))

        vectors = np.frombuffer(answer.vectors, dtype="<f4").reshape(3, DIMENSIONS)
        assert answer.dimensions == DIMENSIONS
        assert vectors.argmax(axis=1).tolist() == [65 % 4, 66 % 4, 68 % 4]
        assert list(answer.input_tokens) == [1, 1, 2]
        assert not answer.truncated_inputs
        assert worker.reports.take(9) == (["embed-1"], ["embed-1"])


async def test_a_call_takes_a_place_that_is_free_again_after_it() -> None:
    engine = new_engine()
    engine.may_embed.clear()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        calls = [
            asyncio.create_task(embed(worker, request("a", name=f"embed-{number}")))
            for number in range(CAPACITY + MAX_WAITING)
        ]
        await eventually(lambda: len(engine.embedding) == len(calls))
        assert len(worker.executions.running_ids()) == len(calls)

        told = await gateway.run(execution(1))
        assert told.reason == "QUEUE_FULL"
        with pytest.raises(ResourceExhausted):
            await embed(worker, request("a", name="one more"))
        engine.may_embed.set()
        await asyncio.gather(*calls)

        assert worker.executions.count == 0


@pytest.mark.parametrize("how", ["caller", "abort"])
async def test_a_call_that_is_stopped_frees_engine_and_place(how: str) -> None:
    engine = new_engine()
    engine.may_embed.clear()
    async with running_worker(engine=engine) as worker:
        call = asyncio.create_task(embed(worker, request("a")))
        await eventually(lambda: bool(engine.embedding))

        if how == "caller":
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        else:
            assert worker.executions.abort_ids(["embed-1"]) == (["embed-1"], [])
            with pytest.raises(Cancelled):
                await call

        await eventually(lambda: not engine.embedding)
        await eventually(lambda: worker.executions.count == 0)
        assert worker.reports.take(9) == (["embed-1"], ["embed-1"])


@pytest.mark.parametrize(
    ("asked", "error", "reason", "field"),
    [
        (request("a", ""), InvalidArgument, Reason.INVALID_FIELD, "inputs[1].text"),
        (
            request("q" * (CONTEXT_LENGTH + 1)),
            InvalidArgument,
            Reason.CONTEXT_LENGTH_EXCEEDED,
            "inputs[0]",
        ),
        (
            request("a", "q" * 100_000),
            InvalidArgument,
            Reason.CONTEXT_LENGTH_EXCEEDED,
            "inputs[1]",
        ),
        (
            request("a", ids=[1, TOKENIZER.vocabulary_size]),
            InvalidArgument,
            Reason.INVALID_FIELD,
            "inputs[1].tokens.ids[1]",
        ),
        (request(), InvalidArgument, Reason.INVALID_FIELD, "inputs"),
    ],
)
async def test_bad_inputs_are_refused_by_name(
    asked: pb.EmbedRequest, error: type[MaasError], reason: Reason, field: str
) -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker:
        with pytest.raises(error) as caught:
            await embed(worker, asked)

        assert caught.value.reason is reason
        assert [violation.field for violation in caught.value.violations] == [field]
        assert worker.executions.count == 0


async def test_inputs_that_are_too_long_are_cut_when_that_is_asked_for() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker:
        answer = await embed(
            worker, request("a", "q" * 100_000, ids=[1] * CONTEXT_LENGTH, truncate=True)
        )

        assert list(answer.input_tokens) == [1, CONTEXT_LENGTH, CONTEXT_LENGTH]
        assert list(answer.truncated_inputs) == [1]


async def test_another_version_and_an_old_epoch_are_refused() -> None:
    async with running_worker(engine=new_engine()) as worker:
        worker.executions.epoch = 5
        asked = request("a")
        with pytest.raises(FailedPrecondition) as caught:
            await embed(worker, asked)
        assert caught.value.reason is Reason.FENCED
        asked.model_version = "models/x/versions/1"
        with pytest.raises(NotFound):
            await embed(worker, asked)


async def test_a_model_without_embeddings_says_so() -> None:
    engine = ScriptedEngine(TOKENIZER.vocabulary_size, abilities=EngineAbilities())
    async with running_worker(engine=engine) as worker:
        with pytest.raises(InvalidArgument) as caught:
            await embed(worker, request("a"))

        assert caught.value.reason is Reason.FEATURE_UNSUPPORTED
        assert caught.value.metadata["feature"] == "embedding_dimensions"


async def test_an_engine_that_fails_on_inputs_fails_only_on_them() -> None:
    engine = new_engine()
    engine.refusal = "no memory"
    async with running_worker(engine=engine) as worker:
        with pytest.raises(Internal) as caught:
            await embed(worker, request("a"))
        assert caught.value.reason is Reason.ENGINE_FAILURE
        engine.refusal = ""

        assert (await embed(worker, request("a"))).dimensions == DIMENSIONS


async def test_the_engines_death_ends_the_call() -> None:
    engine = new_engine()
    engine.may_embed.clear()
    async with running_worker(engine=engine, on_failure=lambda _: None) as worker:
        call = asyncio.create_task(embed(worker, request("a")))
        await eventually(lambda: bool(engine.embedding))
        engine.die()

        with pytest.raises(Unavailable) as caught:
            await call
        assert caught.value.reason is Reason.WORKER_LOST
        assert worker.executions.count == 0


async def test_a_drain_waits_for_the_call() -> None:
    engine = new_engine()
    engine.may_embed.clear()
    async with running_worker(engine=engine) as worker:
        call = asyncio.create_task(embed(worker, request("a")))
        await eventually(lambda: bool(engine.embedding))
        drain = asyncio.create_task(worker.executions.drain())
        await asyncio.sleep(0)
        assert not drain.done()
        with pytest.raises(Unavailable):
            await embed(worker, request("a", name="late"))
        engine.may_embed.set()

        assert (await call).dimensions == DIMENSIONS
        await drain
