"""CountTokens, Tokenize and Detokenize: what a worker answers without running anything."""

from __future__ import annotations

import asyncio
import threading

import pytest
from maas.engine.v1 import engine_pb2
from maas.engine.v1 import engine_service_pb2 as pb
from maas.inference.v1 import generation_pb2

from libs.errors import InvalidArgument, NotFound, Reason, ResourceExhausted
from services.worker.preparation import PREPARING_MAX
from tests.integration.services.worker.harness import (
    CONTEXT_LENGTH,
    MODEL_VERSION,
    TOKENIZER,
    Worker,
    eventually,
    execution,
    running_worker,
)

USER = generation_pb2.ROLE_USER


async def count(worker: Worker, made: engine_pb2.Execution) -> int:
    answer = await worker.peer.call(worker.stub.CountTokens, pb.CountTokensRequest(execution=made))
    assert isinstance(answer, pb.CountTokensResponse)
    return answer.input_tokens


async def tokenize(worker: Worker, text: str, *, has_bytes: bool = False) -> pb.TokenizeResponse:
    answer = await worker.peer.call(
        worker.stub.Tokenize,
        pb.TokenizeRequest(
            model_version=MODEL_VERSION,
            text=text,
            add_special_tokens=True,
            return_token_bytes=has_bytes,
        ),
    )
    assert isinstance(answer, pb.TokenizeResponse)
    return answer


async def detokenize(worker: Worker, ids: list[int]) -> pb.DetokenizeResponse:
    answer = await worker.peer.call(
        worker.stub.Detokenize,
        pb.DetokenizeRequest(model_version=MODEL_VERSION, tokens=generation_pb2.TokenIds(ids=ids)),
    )
    assert isinstance(answer, pb.DetokenizeResponse)
    return answer


@pytest.mark.parametrize(
    "made",
    [
        execution(1, text="Once upon a time"),
        execution(1, ids=[1, 2, 3]),
        execution(1, chat=[(USER, "hello"), (generation_pb2.ROLE_ASSISTANT, "hi"), (USER, "so?")]),
    ],
)
async def test_a_count_is_what_the_execution_is_accepted_with(made: engine_pb2.Execution) -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        counted = await count(worker, made)
        assert worker.executions.count == 0
        assert worker.reports.take(9) == ([], [])

        told = await gateway.run(made)

        assert counted == told.input_tokens


async def test_a_count_refuses_what_the_execution_is_refused_for() -> None:
    async with running_worker() as worker:
        with pytest.raises(InvalidArgument) as caught:
            await count(worker, execution(1, ids=[65] * CONTEXT_LENGTH))
        assert caught.value.reason is Reason.CONTEXT_LENGTH_EXCEEDED

        with pytest.raises(InvalidArgument) as caught:
            await count(worker, execution(1, stop_ids=[TOKENIZER.vocabulary_size]))
        assert caught.value.metadata == {"field": "spec.stop.stop_token_ids[0]"}

        with pytest.raises(NotFound):
            await count(worker, execution(1, model_version="models/x/versions/1"))


@pytest.mark.parametrize("text", ["", "Once upon a time", "a€😀 <|im_end|>\n"])
async def test_text_comes_back_from_its_tokens(text: str) -> None:
    async with running_worker() as worker:
        found = await tokenize(worker, text, has_bytes=True)

        assert b"".join(found.token_bytes) == text.encode()
        assert len(found.token_bytes) == len(found.token_ids)
        if text:
            back = await detokenize(worker, list(found.token_ids))
            assert (back.text, back.incomplete) == (text, b"")
        assert not (await tokenize(worker, text)).token_bytes


async def test_bytes_that_are_no_whole_character_are_told_apart() -> None:
    async with running_worker() as worker:
        answer = await detokenize(worker, [65, *"€".encode()[:2]])
        assert (answer.text, answer.incomplete) == ("A", "€".encode()[:2])

        broken = await detokenize(worker, [65, 0x80, 66])
        assert (broken.text, broken.incomplete) == ("A\ufffdB", b"")


async def test_a_token_that_is_not_in_the_vocabulary_is_named() -> None:
    async with running_worker() as worker:
        with pytest.raises(InvalidArgument) as caught:
            await detokenize(worker, [1, TOKENIZER.vocabulary_size])

        assert caught.value.metadata == {"field": "tokens.ids[1]"}


async def test_what_may_wait_for_the_thread_is_bounded() -> None:
    async with running_worker() as worker:
        go_on = threading.Event()
        blocker = asyncio.create_task(worker.executions._preparation.run("", 1, go_on.wait, 10))
        calls = [asyncio.create_task(tokenize(worker, "a")) for _ in range(PREPARING_MAX - 1)]
        await eventually(lambda: worker.executions._preparation._waiting == PREPARING_MAX)

        with pytest.raises(ResourceExhausted):
            await tokenize(worker, "a")
        go_on.set()
        await asyncio.gather(blocker, *calls)

        assert (await tokenize(worker, "A")).token_ids == [65]
