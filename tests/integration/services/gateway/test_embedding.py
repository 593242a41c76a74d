"""One call to embed, whatever its worker and its caller do: what it answers, and what it costs."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from maas.inference.v1 import embedding_service_pb2
from typing_extensions import override

from libs.errors import (
    Cancelled,
    Code,
    FailedPrecondition,
    FieldRule,
    Internal,
    InvalidArgument,
    MaasError,
    NotFound,
    Reason,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    unavailable,
)
from libs.testing import eventually
from services.gateway.domain import Closing, EndCause, Opening
from services.gateway.journal import Journal
from services.gateway.meter import ENGINE_TIME_MAX_NS
from tests.integration.services.gateway.client_unary import Asker, answer, embed_request
from tests.integration.services.gateway.harness import World, gateway
from tests.integration.services.gateway.neighbours import (
    ALICE,
    BOB,
    EVE,
    NANOS_PER_TOKEN,
    VERSION,
    revoke,
)
from tests.integration.services.gateway.neighbours_unary import (
    CONTEXT_LENGTH,
    DIMENSIONS,
    abilities,
    tokens_of,
    vector_of,
)

DRAINING = Unavailable("draining", reason=Reason.WORKER_DRAINING)


@asynccontextmanager
async def embedder(folder: Path, **options: Any) -> AsyncIterator[tuple[World, Asker]]:
    """Serves a gateway whose workers embed."""
    options.setdefault("capabilities", abilities())
    async with gateway(folder, **options) as world, Asker(world.endpoint) as asker:
        world.table.complete()
        yield world, asker


async def _no_charge(world: World) -> None:
    """Sees that nothing is charged, and that nothing stays held."""

    async def is_free() -> bool:
        await world.book.close_idle(0.0)
        return world.book.open_ids() == []

    await eventually(is_free)
    await world.no_settlement()


async def test_inputs_become_vectors_and_are_charged_once_for_their_tokens(
    tmp_path: Path,
) -> None:
    async with embedder(tmp_path) as (world, asker):
        request = embed_request("a fox", "in the snow", labels={"team": "a"}, end_user="u1")
        request.inputs.add().tokens.ids.extend([5, 6, 7])

        said = await asker.call(asker.embeddings.Embed, request)

        inputs = [tokens_of("a fox"), tokens_of("in the snow"), [5, 6, 7]]
        for embedding, tokens in zip(said.embeddings, inputs, strict=True):
            assert list(embedding.values) == pytest.approx(vector_of(tokens))
            assert embedding.input_tokens == len(tokens)
            assert not embedding.truncated
        count = sum(len(tokens) for tokens in inputs)
        assert (said.usage.input_tokens, said.usage.output_tokens) == (count, 0)
        assert said.charge.nanos == count * NANOS_PER_TOKEN
        assert (said.offering, said.model_version) == ("offerings/m", VERSION)

        settled = await world.only_settlement()
        opening = settled.opening
        assert (settled.owed, opening.input_tokens) == (count * NANOS_PER_TOKEN, count)
        assert (settled.closing.cause, settled.closing.output_tokens) == (EndCause.COMPLETED, 0)
        assert opening.generation_id == said.generation_id
        assert opening.generation_id.startswith("gen_g1_")
        assert (opening.account, opening.project) == ("accounts/o", "projects/p")
        assert opening.api_key == f"apiKeys/{ALICE.key_id}"
        assert (dict(opening.labels), opening.end_user) == ({"team": "a"}, "u1")
        # The worker reports the end of what it has served.
        assert world.scheduler.released == []


@pytest.mark.parametrize(
    ("told_s", "settled_ns"), [(0.25, 250_000_000), (-1.0, 0), (1e9, ENGINE_TIME_MAX_NS)]
)
async def test_the_engine_time_of_the_inputs_is_settled(
    tmp_path: Path, told_s: float, settled_ns: int
) -> None:
    """Cut to what can be: billing refuses the rest, and then nobody would pay."""
    async with embedder(tmp_path) as (world, asker):
        world.workers[0].engine_time.FromNanoseconds(round(told_s * 1e9))

        await asker.call(asker.embeddings.Embed, embed_request("a fox"))

        settled = await world.only_settlement()
        assert settled.engine_time_ns == settled.closing.engine_time_ns == settled_ns


async def test_the_worker_gets_the_inputs_under_the_execution_of_its_slot(tmp_path: Path) -> None:
    async with embedder(tmp_path) as (world, asker):
        said = await asker.call(asker.embeddings.Embed, embed_request("a", truncate=True))

        (asked,) = world.workers[0].asked
        assert asked.execution_id.startswith(said.generation_id)
        assert (asked.epoch, asked.model_version, asked.truncate) == (1, VERSION, True)
        assert [item.text for item in asked.inputs] == ["a"]


@pytest.mark.parametrize(
    ("encoding", "kind"),
    [
        (embedding_service_pb2.VECTOR_ENCODING_FLOAT32_LE, "<f4"),
        (embedding_service_pb2.VECTOR_ENCODING_FLOAT16_LE, "<f2"),
    ],
)
async def test_vectors_are_cut_scaled_and_packed(
    tmp_path: Path, encoding: embedding_service_pb2.VectorEncoding.ValueType, kind: str
) -> None:
    async with embedder(tmp_path) as (_, asker):
        request = embed_request("a fox", dimensions=3, encoding=encoding)

        (embedding,) = (await asker.call(asker.embeddings.Embed, request)).embeddings

        first = np.array(vector_of(tokens_of("a fox"))[:3])
        numbers = np.frombuffer(embedding.packed, kind)
        assert np.allclose(numbers, first / np.linalg.norm(first), atol=1e-3)
        assert not embedding.values


async def test_inputs_that_are_too_long_are_refused_or_cut(tmp_path: Path) -> None:
    async with embedder(tmp_path) as (world, asker):
        refused = await asker.refusal(asker.embeddings.Embed, embed_request("a", "x" * 2000))
        await _no_charge(world)
        said = await asker.call(
            asker.embeddings.Embed, embed_request("a", "x" * 2000, truncate=True)
        )

        assert refused.reason is Reason.CONTEXT_LENGTH_EXCEEDED
        assert refused.violations[0].field == "inputs[1]"
        assert [item.truncated for item in said.embeddings] == [False, True]
        assert [item.input_tokens for item in said.embeddings] == [2, CONTEXT_LENGTH]
        assert (await world.only_settlement()).opening.input_tokens == 2 + CONTEXT_LENGTH


async def test_what_is_asked_for_wrongly_is_refused_with_its_path_before_money_moves(
    tmp_path: Path,
) -> None:
    async with embedder(tmp_path, available=0) as (world, asker):
        world.offerings.complete()
        embed = asker.embeddings.Embed
        nothing = embed_request("a")
        nothing.inputs.add()
        empty = embed_request("a")
        empty.inputs.add().tokens.SetInParent()
        cases = [
            (embed_request(), "inputs", FieldRule.REQUIRED),
            (nothing, "inputs[1]", FieldRule.REQUIRED),
            (empty, "inputs[1].tokens.ids", FieldRule.REQUIRED),
            (embed_request("a", ""), "inputs[1].text", FieldRule.REQUIRED),
            (embed_request("a", dimensions=0), "dimensions", FieldRule.OUT_OF_RANGE),
            (embed_request("a", dimensions=DIMENSIONS + 1), "dimensions", FieldRule.OUT_OF_RANGE),
            (embed_request("a", encoding=99), "encoding", FieldRule.UNKNOWN_ENUM),
        ]
        for request, field, rule in cases:
            error = await asker.refusal(embed, request)
            assert isinstance(error, InvalidArgument), field
            assert (error.violations[0].field, error.violations[0].rule) == (field, rule)
        unknown = embedding_service_pb2.EmbedRequest(model="other", inputs=nothing.inputs[:1])
        assert isinstance(await asker.refusal(embed, unknown), NotFound)
        assert world.workers[0].asked == []


@pytest.mark.parametrize(("dimensions", "field"), [(None, "model"), (4, "dimensions")])
async def test_a_model_that_makes_no_embeddings_says_so(
    tmp_path: Path, dimensions: int | None, field: str
) -> None:
    async with embedder(tmp_path, capabilities=abilities(dimensions=0)) as (world, asker):
        error = await asker.refusal(
            asker.embeddings.Embed, embed_request("a", dimensions=dimensions)
        )

        assert error.reason is Reason.FEATURE_UNSUPPORTED
        assert error.metadata == {"model": "offerings/m", "feature": "embedding_dimensions"}
        assert (error.violations[0].field, error.violations[0].rule) == (
            field,
            FieldRule.UNSUPPORTED,
        )
        assert world.workers[0].asked == []


async def test_an_answer_that_would_be_too_large_is_refused_before_any_work(
    tmp_path: Path,
) -> None:
    async with embedder(tmp_path, capabilities=abilities(dimensions=4096)) as (world, asker):
        error = await asker.refusal(asker.embeddings.Embed, embed_request(*["a"] * 300))

        assert error.violations[0].field == "encoding"
        assert "VECTOR_ENCODING_FLOAT16_LE" in error.message
        assert world.workers[0].asked == []
        await _no_charge(world)


async def test_the_worst_case_is_held_and_not_a_nano_more_is_needed(tmp_path: Path) -> None:
    # Of each text its bytes and two more, of ids their number, and of none more than the context.
    most = (5 + 2) + 3 + CONTEXT_LENGTH
    request = embed_request("a fox", "x" * 3000, truncate=True)
    request.inputs.add().tokens.ids.extend([5])
    async with embedder(tmp_path / "1", available=most * NANOS_PER_TOKEN) as (world, asker):
        await asker.call(asker.embeddings.Embed, request)
        assert world.billing.available == 0
    async with embedder(tmp_path / "2", available=most * NANOS_PER_TOKEN - 1) as (world, asker):
        error = await asker.refusal(asker.embeddings.Embed, request)
        assert error.reason is Reason.INSUFFICIENT_CREDIT
        assert world.workers[0].asked == []


async def test_a_worker_that_takes_nothing_is_replaced_and_one_is_charged(tmp_path: Path) -> None:
    async with embedder(tmp_path, worker_count=3) as (world, asker):
        world.workers[0].refusals.append(DRAINING)
        world.workers[1].refusals.append(Unavailable("gone"))

        said = await asker.call(asker.embeddings.Embed, embed_request("a"))

        assert [len(worker.asked) for worker in world.workers] == [1, 1, 1]
        assert said.charge.nanos == 2 * NANOS_PER_TOKEN
        assert (await world.only_settlement()).owed == 2 * NANOS_PER_TOKEN


async def test_when_no_worker_is_left_the_last_ones_word_is_told_and_the_slot_goes_back(
    tmp_path: Path,
) -> None:
    async with embedder(tmp_path, worker_count=2) as (world, asker):
        for worker in world.workers:
            worker.refusals += [DRAINING] * 9

        error = await asker.refusal(asker.embeddings.Embed, embed_request("a"))

        assert error.reason is Reason.WORKER_DRAINING
        assert [len(worker.asked) for worker in world.workers] == [1, 1]
        assert len(world.scheduler.released) == 1
        await _no_charge(world)


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (NotFound("models/x/versions/1"), Reason.NO_READY_WORKER),
        (FailedPrecondition("an older epoch", reason=Reason.FENCED), Reason.WORKER_LOST),
        (Cancelled("the worker ends"), Reason.WORKER_LOST),
    ],
    ids=lambda value: getattr(value, "value", value.__class__.__name__),
)
async def test_what_workers_say_of_themselves_is_no_fault_of_the_caller(
    tmp_path: Path, refusal: MaasError, reason: Reason
) -> None:
    async with embedder(tmp_path, worker_count=2) as (world, asker):
        for worker in world.workers:
            worker.refusals += [refusal] * 9

        error = await asker.refusal(asker.embeddings.Embed, embed_request("a"))

        # The offering is there; that no worker serves it now may pass.
        assert (error.code, error.reason) == (Code.UNAVAILABLE, reason)
        await _no_charge(world)


@pytest.mark.parametrize(
    ("refusal", "code", "reason"),
    [
        (Internal("x", reason=Reason.ENGINE_FAILURE), Code.INTERNAL, Reason.ENGINE_FAILURE),
        (InvalidArgument("no such token"), Code.INVALID_ARGUMENT, Reason.INVALID_FIELD),
        (
            FailedPrecondition("older", reason=Reason.WRONG_STATE),
            Code.FAILED_PRECONDITION,
            Reason.WRONG_STATE,
        ),
    ],
    ids=lambda value: getattr(value, "value", value.__class__.__name__),
)
async def test_what_another_worker_would_say_too_ends_it_free_of_charge(
    tmp_path: Path, refusal: Internal, code: Code, reason: Reason
) -> None:
    async with embedder(tmp_path, worker_count=2) as (world, asker):
        world.workers[0].refusals.append(refusal)

        error = await asker.refusal(asker.embeddings.Embed, embed_request("a"))

        assert (error.code, error.reason) == (code, reason)
        assert world.workers[1].asked == []
        assert len(world.scheduler.released) == 1
        await _no_charge(world)


async def test_a_worker_that_answers_nonsense_is_not_paid_for(tmp_path: Path) -> None:
    async with embedder(tmp_path) as (world, asker):
        # It has said that its vectors have more numbers than they have.
        world.workers[0].dimensions = DIMENSIONS - 1

        error = await asker.refusal(asker.embeddings.Embed, embed_request("a"))

        assert error.reason is Reason.ENGINE_FAILURE
        await _no_charge(world)


async def test_while_the_scheduler_is_away_workers_come_from_the_table(tmp_path: Path) -> None:
    async with embedder(tmp_path, worker_count=2) as (world, asker):
        world.scheduler.is_away = True
        world.workers[0].refusals.append(DRAINING)

        said = await asker.call(asker.embeddings.Embed, embed_request("a"))

        assert said.usage.input_tokens == 2
        assert world.scheduler.released == []


async def test_without_a_worker_nothing_is_held(tmp_path: Path) -> None:
    async with embedder(tmp_path) as (world, asker):
        world.table.drop("workers/w0")

        error = await asker.refusal(asker.embeddings.Embed, embed_request("a"))

        assert error.reason is Reason.NO_READY_WORKER
        await _no_charge(world)


async def test_a_caller_that_goes_away_frees_the_worker_and_pays_nothing(tmp_path: Path) -> None:
    async with embedder(tmp_path) as (world, asker):
        (worker,) = world.workers
        worker.going.clear()
        call = asker.begin(asker.embeddings.Embed, embed_request("a"))
        await eventually(lambda: worker.waiting == 1)

        call.cancel()

        await eventually(lambda: worker.left == 1)
        await eventually(lambda: len(world.scheduler.released) == 1)
        await _no_charge(world)


async def test_a_deadline_frees_the_worker_and_costs_nothing(tmp_path: Path) -> None:
    async with embedder(tmp_path) as (world, asker):
        (worker,) = world.workers
        worker.going.clear()

        error = await asker.refusal(asker.embeddings.Embed, embed_request("a"), timeout_s=0.3)

        assert error.code is Code.DEADLINE_EXCEEDED
        await eventually(lambda: worker.left == 1)
        await eventually(lambda: len(world.scheduler.released) == 1)
        await _no_charge(world)


@pytest.mark.parametrize("is_answered", [False, True])
async def test_a_key_that_is_revoked_meanwhile_gets_nothing_and_pays_nothing(
    tmp_path: Path, *, is_answered: bool
) -> None:
    async with embedder(tmp_path) as (world, asker):
        (worker,) = world.workers
        worker.going.clear()
        call = asker.begin(asker.embeddings.Embed, embed_request("a"))
        await eventually(lambda: worker.waiting == 1)

        revoke(world.keys, ALICE)
        if is_answered:
            # What the worker says in that moment is too late.
            worker.going.set()

        with pytest.raises(Unauthenticated) as caught:
            await answer(call)
        assert caught.value.reason is Reason.CREDENTIALS_REVOKED
        await eventually(lambda: worker.waiting == 0)
        await _no_charge(world)


async def test_calls_of_other_keys_go_on_when_one_is_revoked(tmp_path: Path) -> None:
    async with embedder(tmp_path) as (world, asker), Asker(world.endpoint, BOB) as other:
        (worker,) = world.workers
        worker.going.clear()
        mine = asker.begin(asker.embeddings.Embed, embed_request("a"))
        others = other.begin(other.embeddings.Embed, embed_request("bc"))
        await eventually(lambda: worker.waiting == 2)

        revoke(world.keys, ALICE)
        with pytest.raises(Unauthenticated):
            await answer(mine)
        worker.going.set()

        assert (await answer(others)).usage.input_tokens == 3
        assert (await world.only_settlement()).opening.api_key == f"apiKeys/{BOB.key_id}"


class FullJournal(Journal):
    """A journal on a disk that is full once generations come."""

    @override
    def opened(self, opening: Opening) -> int:
        raise unavailable("journal")


async def test_what_cannot_be_journaled_is_neither_charged_nor_answered(tmp_path: Path) -> None:
    async with embedder(tmp_path, make_journal=FullJournal) as (world, asker):
        error = await asker.refusal(asker.embeddings.Embed, embed_request("a"))

        assert error.metadata == {"dependency": "journal"}
        await _no_charge(world)


async def test_a_drain_waits_for_calls_in_flight_and_lets_no_new_ones_in(tmp_path: Path) -> None:
    async with embedder(tmp_path) as (world, asker):
        (worker,) = world.workers
        worker.going.clear()
        call = asker.begin(asker.embeddings.Embed, embed_request("a"))
        await eventually(lambda: worker.waiting == 1)

        draining = asyncio.create_task(world.embeddings.drain())
        await asyncio.sleep(0)
        refused = await asker.refusal(asker.embeddings.Embed, embed_request("a"))
        assert not draining.done()
        worker.going.set()
        said = await answer(call)
        async with asyncio.timeout(5):
            await draining

        assert refused.reason is Reason.SERVICE_UNAVAILABLE
        assert said.usage.input_tokens == 2


async def test_calls_are_bounded_in_all_and_of_each_project(tmp_path: Path) -> None:
    async with embedder(tmp_path, calls_max=4) as (world, asker), Asker(world.endpoint, EVE) as eve:
        (worker,) = world.workers
        worker.going.clear()
        calls = [asker.begin(asker.embeddings.Embed, embed_request("a"))]
        await eventually(lambda: worker.waiting == 1)

        refused = await asker.refusal(asker.embeddings.Embed, embed_request("a"))
        calls.append(eve.begin(eve.embeddings.Embed, embed_request("a")))
        await eventually(lambda: worker.waiting == 2)
        worker.going.set()
        for call in calls:
            await answer(call)

        assert isinstance(refused, ResourceExhausted)
        assert refused.retry_after_s is not None
        accounts = {item.opening.account for item in await world.settlements(2)}
        assert accounts == {"accounts/o", "accounts/o2"}


async def test_however_calls_end_what_is_charged_is_what_was_answered(tmp_path: Path) -> None:
    async with embedder(tmp_path, worker_count=2) as (world, asker):
        for worker in world.workers:
            worker.refusals += [None, DRAINING, Internal("x"), InvalidArgument("y")] * 4
        texts = ["a" * length for length in range(1, 13)]

        calls = [asker.begin(asker.embeddings.Embed, embed_request(text)) for text in texts]
        ends = await asyncio.gather(*map(answer, calls), return_exceptions=True)

        answers = [end for end in ends if isinstance(end, embedding_service_pb2.EmbedResponse)]
        assert 0 < len(answers) < len(texts)
        settled = {
            item.opening.generation_id: (item.owed, item.opening.input_tokens)
            for item in await world.settlements(len(answers))
        }
        assert settled == {
            said.generation_id: (said.charge.nanos, said.usage.input_tokens) for said in answers
        }
        await world.book.close_idle(0.0)
        assert world.book.open_ids() == []


class CutJournal(Journal):
    """A journal whose process dies before it has written an end."""

    @override
    def closed(self, ordinal: int, closing: Closing) -> None:
        raise unavailable("journal")


@pytest.mark.parametrize(
    ("make_journal", "cause"),
    [(Journal, EndCause.COMPLETED), (CutJournal, EndCause.GATEWAY_LOST)],
)
async def test_the_journal_has_all_that_a_next_process_settles(
    tmp_path: Path, make_journal: type[Journal], cause: EndCause
) -> None:
    async with embedder(tmp_path / "first", make_journal=make_journal) as (world, asker):
        said = await asker.call(asker.embeddings.Embed, embed_request("a", labels={"team": "a"}))
        shutil.copytree(tmp_path / "first", tmp_path / "next")
        settled = await world.only_settlement()

    following = Journal(tmp_path / "next")
    ((opening, closing),) = following.recover(settled.closing.end_time).settlements
    following.close()

    assert opening == settled.opening
    assert opening.generation_id == said.generation_id
    assert (closing.cause, closing.output_tokens) == (cause, 0)
