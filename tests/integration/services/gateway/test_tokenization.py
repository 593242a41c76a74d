"""Tokens of text and back, by whichever worker has the tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from maas.inference.v1 import generation_pb2, tokenization_service_pb2

from libs.errors import (
    Code,
    FieldRule,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Reason,
    ResourceExhausted,
    Unavailable,
    Violation,
)
from libs.testing import eventually
from services.gateway import desks, inquiries, tokenization
from tests.integration.services.gateway.client_unary import Asker, answer, text_spec
from tests.integration.services.gateway.harness import CountingClock, gateway
from tests.integration.services.gateway.neighbours import ALICE, EVE, VERSION
from tests.integration.services.gateway.neighbours_unary import BEGIN, tokens_of

Tokenize = tokenization_service_pb2.TokenizeRequest
Detokenize = tokenization_service_pb2.DetokenizeRequest
Count = tokenization_service_pb2.CountTokensRequest


def _ids(*numbers: int) -> generation_pb2.TokenIds:
    return generation_pb2.TokenIds(ids=numbers)


async def test_text_becomes_token_ids_and_text_again(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, Asker(world.endpoint) as asker:
        said = await asker.call(
            asker.tokens.Tokenize, Tokenize(model="m", text="né", return_token_bytes=True)
        )
        assert list(said.token_ids) == tokens_of("né")
        assert list(said.token_bytes) == [b"", b"n", b"\xc3", b"\xa9"]

        ids = list(said.token_ids)[:-1]
        back = await asker.call(
            asker.tokens.Detokenize, Detokenize(model="offerings/m", tokens=_ids(*ids))
        )
        assert (back.text, back.incomplete) == ("n", b"\xc3")
        assert world.workers[0].asked[0].model_version == VERSION


async def test_the_first_token_of_prompts_is_left_out_on_demand_only(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, Asker(world.endpoint) as asker:
        tokenize = asker.tokens.Tokenize
        bare = await asker.call(tokenize, Tokenize(model="m", text="a", add_special_tokens=False))
        whole = await asker.call(tokenize, Tokenize(model="m", text="a"))
        given = await asker.call(tokenize, Tokenize(model="m", text="a", add_special_tokens=True))

        assert list(bare.token_ids) == [97]
        assert list(whole.token_ids) == list(given.token_ids) == [BEGIN, 97]
        assert not bare.token_bytes


async def test_a_prompt_is_counted_and_so_is_the_room_behind_it(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, Asker(world.endpoint) as asker:
        said = await asker.call(asker.tokens.CountTokens, Count(spec=text_spec("hello")))

        assert (said.input_tokens, said.remaining_tokens) == (6, 1000 - 6)
        await world.no_settlement()
        assert world.scheduler.released == []


async def test_what_would_not_be_generated_is_not_counted(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, Asker(world.endpoint) as asker:
        nothing = await asker.refusal(
            asker.tokens.CountTokens, Count(spec=generation_pb2.GenerationSpec(model="m"))
        )
        too_long = await asker.refusal(asker.tokens.CountTokens, Count(spec=text_spec("x" * 1000)))

        assert nothing.violations[0].field == "spec.input"
        assert too_long.reason is Reason.CONTEXT_LENGTH_EXCEEDED
        assert too_long.metadata == {"tokens": "1001", "limit": "999"}
        (violation,) = too_long.violations
        assert (violation.field, violation.rule) == ("spec.text", FieldRule.TOO_LONG)


async def test_a_refusal_names_the_field_of_the_callers_request(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, Asker(world.endpoint) as asker:
        (worker,) = world.workers
        unknown = await asker.refusal(
            asker.tokens.Detokenize, Detokenize(model="m", tokens=_ids(1, 2, 999))
        )
        # What a worker's own limits say of an execution is about the spec.
        worker.refusals.append(
            InvalidArgument(
                "execution.text: is longer",
                metadata={"field": "execution.text"},
                violations=[
                    Violation("execution.text", FieldRule.TOO_LONG, "is longer"),
                ],
            )
        )
        inner = await asker.refusal(asker.tokens.CountTokens, Count(spec=text_spec()))
        worker.refusals.append(InvalidArgument("no", reason=Reason.BAD_OUTPUT_CONSTRAINT))
        bare = await asker.refusal(asker.tokens.CountTokens, Count(spec=text_spec()))

        assert unknown.violations[0].field == "tokens.ids[2]"
        assert inner.violations[0].field == inner.metadata["field"] == "spec.text"
        assert (bare.reason, bare.violations[0].field) == (
            Reason.BAD_OUTPUT_CONSTRAINT,
            "spec.text",
        )


async def test_an_unknown_offering_is_not_found_and_nobody_is_asked(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, Asker(world.endpoint) as asker:
        world.offerings.complete()

        error = await asker.refusal(asker.tokens.Tokenize, Tokenize(model="other", text="a"))

        assert isinstance(error, NotFound)
        assert error.metadata == {"resource": "offerings/other"}
        assert world.workers[0].asked == []


async def test_without_a_worker_there_is_no_tokenizer(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, Asker(world.endpoint) as asker:
        world.table.complete()
        world.table.drop("workers/w0")

        error = await asker.refusal(asker.tokens.Tokenize, Tokenize(model="m", text="a"))

        assert error.reason is Reason.NO_READY_WORKER
        assert error.retry_after_s is not None


async def test_workers_take_turns(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=3) as world, Asker(world.endpoint) as asker:
        for _ in range(6):
            await asker.call(asker.tokens.Tokenize, Tokenize(model="m", text="a"))

        assert [len(worker.asked) for worker in world.workers] == [2, 2, 2]


@pytest.mark.parametrize(
    "refusal",
    [
        Unavailable("draining", reason=Reason.WORKER_DRAINING, metadata={"worker": "workers/w0"}),
        Unavailable("starting"),
        ResourceExhausted("full"),
        NotFound("not served here", metadata={"resource": VERSION}),
    ],
    ids=lambda refusal: refusal.reason.value,
)
async def test_another_worker_answers_when_one_takes_nothing(
    tmp_path: Path, refusal: Unavailable
) -> None:
    async with gateway(tmp_path, worker_count=2) as world, Asker(world.endpoint) as asker:
        world.workers[0].refusals.append(refusal)

        said = await asker.call(asker.tokens.Tokenize, Tokenize(model="m", text="a"))

        assert list(said.token_ids) == [BEGIN, 97]
        assert [len(worker.asked) for worker in world.workers] == [1, 1]


async def test_the_workers_own_word_is_told_when_none_answers(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=5) as world, Asker(world.endpoint) as asker:
        for worker in world.workers:
            worker.refusals += [ResourceExhausted("busy with prompts of others")]

        error = await asker.refusal(asker.tokens.Tokenize, Tokenize(model="m", text="a"))

        assert isinstance(error, ResourceExhausted)
        assert error.retry_after_s is not None
        assert "others" not in error.message
        assert sum(len(worker.asked) for worker in world.workers) == inquiries.WORKERS_MAX


async def test_a_worker_that_cannot_be_reached_is_passed_over_and_its_address_not_told(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path, worker_count=2) as world, Asker(world.endpoint) as asker:
        known = world.table.find("workers/w0")
        assert known is not None
        # Nothing listens at the port of discard.
        world.table.put(dataclasses.replace(known, endpoint="127.0.0.1:9"))
        await asker.call(asker.tokens.Tokenize, Tokenize(model="m", text="a"))
        world.table.drop("workers/w1")

        error = await asker.refusal(asker.tokens.Tokenize, Tokenize(model="m", text="a"))

        assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.WORKER_LOST)
        assert error.metadata == {"worker": "workers/w0"}
        assert "127.0.0.1" not in error.message


async def test_a_worker_that_hangs_leaves_time_for_another(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world, Asker(world.endpoint) as asker:
        world.workers[0].going.clear()

        said = await asker.call(asker.tokens.Tokenize, Tokenize(model="m", text="a"), timeout_s=2)

        assert list(said.token_ids) == [BEGIN, 97]
        await eventually(lambda: world.workers[0].left == 1)


async def test_what_a_worker_should_not_say_is_a_failure_of_ours(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, Asker(world.endpoint) as asker:
        world.workers[0].refusals += [PermissionDenied("not you"), Internal("a defect of mine")]
        for _ in range(2):
            error = await asker.refusal(asker.tokens.Tokenize, Tokenize(model="m", text="a"))
            assert (error.code, error.reason) == (Code.INTERNAL, Reason.ENGINE_FAILURE)
            assert error.message == "the engine failed"


async def test_questions_are_bounded_in_all_and_of_each_project(tmp_path: Path) -> None:
    async with (
        gateway(tmp_path, calls_max=8) as world,
        Asker(world.endpoint) as asker,
        Asker(world.endpoint, EVE) as other,
    ):
        (worker,) = world.workers
        worker.going.clear()
        request = Tokenize(model="m", text="a")
        calls = [asker.begin(asker.tokens.Tokenize, request) for _ in range(2)]
        await eventually(lambda: worker.waiting == 2)

        # A quarter of eight; quotes and counts are questions too.
        refused = await asker.refusal(asker.tokens.CountTokens, Count(spec=text_spec()))
        assert isinstance(refused, ResourceExhausted)
        assert refused.retry_after_s is not None
        calls.append(other.begin(other.tokens.Tokenize, request))
        await eventually(lambda: worker.waiting == 3)

        worker.going.set()
        for call in calls:
            await answer(call)
        # And there is room again.
        await asker.call(asker.tokens.Tokenize, request)


async def test_a_caller_that_goes_away_frees_its_place(tmp_path: Path) -> None:
    async with gateway(tmp_path, calls_max=1) as world, Asker(world.endpoint) as asker:
        (worker,) = world.workers
        worker.going.clear()
        call = asker.begin(asker.tokens.Tokenize, Tokenize(model="m", text="a"))
        await eventually(lambda: worker.waiting == 1)
        call.cancel()
        await eventually(lambda: worker.left == 1)
        worker.going.set()

        async def has_room() -> bool:
            try:
                await asker.call(asker.tokens.Tokenize, Tokenize(model="m", text="a"))
            except ResourceExhausted:
                return False
            return True

        # The gateway hears of it a moment later.
        await eventually(has_room)


async def test_an_answer_that_is_too_large_for_clients_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "RESPONSE_BYTES_MAX", 64)
    async with gateway(tmp_path) as world, Asker(world.endpoint) as asker:
        there = await asker.refusal(asker.tokens.Tokenize, Tokenize(model="m", text="a" * 100))
        back = await asker.refusal(
            asker.tokens.Detokenize, Detokenize(model="m", tokens=_ids(*[97] * 100))
        )

        assert [error.violations[0].field for error in (there, back)] == ["text", "tokens.ids"]
        assert {error.violations[0].rule for error in (there, back)} == {FieldRule.TOO_LONG}


async def test_connections_that_nobody_uses_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desks, "SWEEP_S", 0.01)
    clock = CountingClock()
    async with gateway(tmp_path, clock=clock) as world, Asker(world.endpoint) as asker:
        (worker,) = world.workers
        worker.going.clear()
        call = asker.begin(asker.tokens.Tokenize, Tokenize(model="m", text="a"))
        await eventually(lambda: worker.waiting == 1)
        monkeypatch.setattr(desks, "IDLE_S", 0.0)
        await clock.rounds(3)
        # Not while somebody waits for an answer.
        assert world.desks.open == 1
        worker.going.set()
        await answer(call)

        await eventually(lambda: world.desks.open == 0)
        await asker.call(asker.tokens.Tokenize, Tokenize(model="m", text="a"))


async def test_the_key_decides_who_may_ask(tmp_path: Path) -> None:
    nobody = dataclasses.replace(ALICE, secret=ALICE.secret[:-1] + "x")
    async with gateway(tmp_path) as world, Asker(world.endpoint, nobody) as asker:
        error = await asker.refusal(asker.tokens.Tokenize, Tokenize(model="m", text="a"))

        assert error.code is Code.UNAUTHENTICATED
        assert world.workers[0].asked == []
