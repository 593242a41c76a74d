"""Several outputs, reasoning, calls of tools and log-probabilities, streamed and whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from maas.common.v1.capabilities_pb2 import Capabilities
from maas.inference.v1 import generation_pb2, generation_service_pb2
from typing_extensions import override

from libs.clock import SystemClock
from libs.errors import FieldRule, InvalidArgument, OutOfRange, Reason
from libs.testing import eventually
from services.gateway import rich, rich_generation, whole
from services.gateway.domain import EndCause
from services.gateway.tables import Worker as KnownWorker
from tests.integration.services.gateway.client import CANCEL, CONTINUE, Wish, answer, refusal
from tests.integration.services.gateway.harness import END, Worker, gateway
from tests.integration.services.gateway.neighbours import NANOS_PER_TOKEN, VERSION
from tests.integration.services.gateway.richly import (
    Rich,
    Spec,
    called,
    chat,
    deltas_of,
    lanes_of,
    said,
    score,
    score_prompt,
    scored,
    scores_of,
    several,
    tell,
    text_of,
    thought,
    thoughtless,
)


async def test_several_outputs_come_in_one_stream_and_each_ends(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(Rich(change=several(3)))
        execution = await world.accepted(input_tokens=3)
        lanes = lanes_of(execution)
        assert len(set(lanes)) == execution.output.count == 3

        worker.step(lanes, ["a", "b", "c"])
        await stream.until(3)
        worker.end(lanes[1])
        worker.say(lanes[0], "A")
        await stream.until(4)
        assert not any(frame.HasField("finished") for frame in stream.frames)
        worker.end(lanes[0])
        worker.say(lanes[2], "C")
        worker.end(lanes[2])
        await stream.rest()

        assert [text_of(stream, index) for index in range(3)] == ["aA", "b", "cC"]
        for index in range(3):
            ends = [delta.HasField("end") for delta in deltas_of(stream, index)]
            assert ends == [False] * (len(ends) - 1) + [True]
        assert stream.sequences == list(range(1, stream.last.sequence + 1))
        usage = stream.last.finished.usage
        assert (usage.input_tokens, usage.output_tokens) == (3, 5)
        # The prompt is charged once.
        assert stream.last.finished.charge.nanos == (3 + 5) * NANOS_PER_TOKEN
        assert (await world.only_settlement()).owed == (3 + 5) * NANOS_PER_TOKEN


async def test_a_whole_result_has_all_outputs(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        call = world.client.unary(Rich(change=several(2), with_ids=True))
        lanes = lanes_of(await world.accepted())
        worker.step(lanes, ["a", "b"])
        worker.say(lanes[1], "B", first=7)
        for lane in lanes:
            worker.end(lane)

        generation = await answer(call)

        assert [(out.index, out.text, list(out.token_ids)) for out in generation.outputs] == [
            (0, "a", [0]),
            (1, "bB", [1, 7]),
        ]
        assert [out.end for out in generation.outputs] == [END, END]
        assert generation.usage.output_tokens == 3


async def test_the_hold_covers_all_outputs(tmp_path: Path) -> None:
    wish = Rich(change=several(3), most=100)
    worst = (5 + 2 + 3 * 100) * NANOS_PER_TOKEN
    async with gateway(tmp_path, available=worst - 1) as world:
        error = await world.client.stream(wish).failure()
        assert error.reason is Reason.INSUFFICIENT_CREDIT
    async with gateway(tmp_path, available=worst) as world:
        stream = world.client.stream(wish)
        execution = await world.accepted()
        for lane in lanes_of(execution):
            world.workers[0].end(lane)
        await stream.rest()


async def test_leaving_stops_all_outputs(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Rich(change=several(3)))
        lanes = lanes_of(await world.accepted())
        await stream.until(0)

        stream.call.cancel()

        assert {await world.workers[0].next_abort() for _ in lanes} == set(lanes)
        assert (await world.only_settlement()).closing.cause is EndCause.CLIENT_CANCELLED


async def test_reasoning_and_calls_are_split_from_text(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(Rich(change=chat, with_ids=True))
        lane = (await world.accepted()).lane
        tell(worker, lane, thought("hm"), token_ids=[1, 2], reasoning_tokens=2)
        worker.say(lane, "so ", first=3)
        tell(worker, lane, called('{"a"', id_="c1", name="f"), token_ids=[4, 5])
        tell(worker, lane, called(":1}"), token_ids=[6])
        worker.end(lane)
        await stream.rest()

        made = deltas_of(stream)
        assert [delta.WhichOneof("content") for delta in made] == [
            "reasoning", "text", "tool_call", "tool_call", None,
        ]  # fmt: skip
        assert [list(delta.token_ids) for delta in made] == [[1, 2], [3], [4, 5], [6], []]
        assert (made[2].tool_call.id, made[2].tool_call.name) == ("c1", "f")
        assert stream.last.finished.usage.reasoning_tokens == 2
        closing = (await world.only_settlement()).closing
        assert (closing.output_tokens, closing.reasoning_tokens) == (6, 2)


async def test_a_whole_result_has_reasoning_and_calls(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        call = world.client.unary(Rich(change=chat))
        lane = (await world.accepted()).lane
        tell(worker, lane, thought("h"), reasoning_tokens=1)
        tell(worker, lane, thought("m"), said("so"), token_ids=[1, 2], reasoning_tokens=1)
        tell(worker, lane, called("{", id_="c1", name="f"))
        tell(worker, lane, called("}"), called("{}", index=1, id_="c2", name="g"))
        worker.end(lane)

        (output,) = (await answer(call)).outputs

        assert (output.reasoning, output.text) == ("hm", "so")
        assert [(made.id, made.name, made.arguments_json) for made in output.tool_calls] == [
            ("c1", "f", "{}"),
            ("c2", "g", "{}"),
        ]


async def test_reasoning_that_is_not_wanted_is_counted_at_once_and_not_sent(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(Rich(change=thoughtless))
        lane = (await world.accepted()).lane
        tell(worker, lane, thought("secret"), token_ids=[1, 2], reasoning_tokens=2)
        await stream.until(2)
        assert deltas_of(stream) == []
        worker.say(lane, "so")
        worker.end(lane)
        await stream.rest()

        assert text_of(stream) == "so"
        assert not any(delta.reasoning for delta in deltas_of(stream))
        usage = stream.last.finished.usage
        assert (usage.output_tokens, usage.reasoning_tokens) == (3, 2)


async def test_scores_stand_beside_their_tokens(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(Rich(change=scored))
        lane = (await world.accepted()).lane
        score(worker, lane, "a", 4)
        await stream.until(1)
        score(worker, lane, "bc", 5, 6)
        worker.end(lane)
        await stream.rest()

        made = [delta for delta in deltas_of(stream) if delta.text]
        assert [(delta.text, delta.scores) for delta in made] == [
            ("a", scores_of(4)),
            ("bc", scores_of(5, 6)),
        ]
        assert not any(delta.token_ids for delta in made)


def conversation(spec: Spec) -> None:
    chat(spec)
    spec.ClearField("tools")


def prompted(spec: Spec) -> None:
    scored(spec)
    spec.output.return_prompt_logprobs = True


async def test_scores_of_the_prompt_come_before_all_output(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(Rich(change=prompted))
        call = world.client.unary(Rich(change=prompted))
        for _ in range(2):
            lane = (await world.accepted()).lane
            score_prompt(worker, lane, 0, 1, 2)
            score_prompt(worker, lane, 2, 3)
            score(worker, lane, "a", 4)
            worker.end(lane)
        await stream.rest()
        whole = await answer(call)

        assert stream.kinds[:3] == ["started", "prompt_scores", "prompt_scores"]
        assert "prompt_scores" not in stream.kinds[3:]
        parts = [frame.prompt_scores for frame in stream.frames[1:3]]
        assert [(part.offset, part.scores) for part in parts] == [
            (0, scores_of(1, 2)),
            (2, scores_of(3)),
        ]
        assert stream.frames[1].output_tokens == 0
        assert whole.prompt_scores.scores == scores_of(1, 2, 3)
        assert whole.outputs[0].scores == scores_of(4)


async def test_rich_frames_are_replayed_as_they_were(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(Rich(change=prompted, request_id="r-1"))
        lane = (await world.accepted()).lane
        score_prompt(worker, lane, 0, 1, 2)
        for number, word in enumerate("abc", 4):
            score(worker, lane, word, number)
            await stream.until(number - 3)
        worker.end(lane)
        await stream.rest()

        for after in range(stream.last.sequence + 1):
            again = await world.client.resume(stream.generation_id, after=after).rest()
            assert again.sequences == list(range(after + 1, stream.last.sequence + 1))
            missed = "".join(
                delta.text
                for frame in stream.frames
                if frame.sequence > after
                for delta in frame.delta.outputs
            )
            assert text_of(again) == missed
            if again.frames:
                assert again.last == stream.last
        whole = await answer(world.client.unary(Rich(change=prompted, request_id="r-1")))
        assert whole.outputs[0].text == "abc"
        assert whole.prompt_scores.scores == scores_of(1, 2)


async def test_a_rich_generation_lives_on_without_a_reader(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(Rich(change=several(2), on_disconnect=CONTINUE))
        lanes = lanes_of(await world.accepted())
        await stream.until(0)
        stream.call.cancel()
        worker.step(lanes, ["a", "b"])
        for lane in lanes:
            worker.end(lane)

        assert (await world.only_settlement()).closing.output_tokens == 2
        again = await world.client.resume(stream.generation_id).rest()
        assert [text_of(again, index) for index in range(2)] == ["a", "b"]


@pytest.mark.parametrize("request_id", ["", "r-1"])
async def test_a_result_that_outgrows_an_answer_ends_and_pays_for_its_prompt(
    tmp_path: Path, request_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rich_generation, "WHOLE_BYTES_MAX", 1000)
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        call = world.client.unary(Rich(change=scored, request_id=request_id))
        lane = (await world.accepted()).lane
        for number in range(60):
            score(worker, lane, "x" * 20, number)
        worker.end(lane)

        error = await refusal(call)

        assert isinstance(error, OutOfRange)
        settled = await world.only_settlement()
        # Nothing of it was released.
        assert (settled.closing.output_tokens, settled.owed) == (0, 3 * NANOS_PER_TOKEN)
        assert world.budget.used == 0


class Sleeper(SystemClock):
    """Real time in which nothing that happens once a while ever happens."""

    @override
    async def sleep_s(self, seconds: float) -> None:
        """Sleeps for ever."""
        await asyncio.Event().wait()


async def test_a_result_that_outgrows_an_answer_ends_before_the_worker_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rich_generation, "WHOLE_BYTES_MAX", 1000)
    monkeypatch.setattr(rich, "ALARM_BYTES", 1000)
    async with gateway(tmp_path, clock=Sleeper()) as world:
        (worker,) = world.workers
        call = world.client.unary(Rich(change=scored))
        lane = (await world.accepted()).lane
        for number in range(60):
            score(worker, lane, "x" * 20, number)

        assert isinstance(await refusal(call), OutOfRange)
        assert await worker.next_abort() == lane


def scored_prompt(spec: Spec) -> None:
    spec.output.return_prompt_logprobs = True
    spec.output.return_logprobs = True
    spec.output.top_logprobs = 20


@pytest.mark.parametrize(
    ("change", "most", "field"),
    [(scored, 100, "return_logprobs"), (scored_prompt, 1, "return_prompt_logprobs")],
)
async def test_a_result_that_cannot_be_one_answer_is_refused_free_of_charge(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Spec], object],
    most: int,
    field: str,
) -> None:
    monkeypatch.setattr(whole, "WHOLE_BYTES_MAX", 600)
    async with gateway(tmp_path) as world:
        wish = Rich(change=change, most=most)
        call = world.client.unary(wish)
        if field == "return_prompt_logprobs":
            # Only the worker knows how many tokens the prompt has.
            execution = await world.accepted(input_tokens=5)
            assert await world.workers[0].next_abort() == execution.lane

        error = await refusal(call)

        assert isinstance(error, InvalidArgument)
        assert [(bad.field, bad.rule) for bad in error.violations] == [
            (f"spec.output.{field}", FieldRule.OUT_OF_RANGE)
        ]
        await world.no_settlement()
        # A stream has no such bound.
        stream = world.client.stream(wish)
        world.workers[0].end((await world.accepted(input_tokens=5)).lane)
        await stream.rest()


# Together more than any window takes while nobody reads.
WORDS = 100
WORD = "x" * 200_000


def flood(worker: Worker, lanes: list[int]) -> None:
    """Says more than the client reads, which reads nothing."""
    for number in range(WORDS):
        worker.say(lanes[number % len(lanes)], WORD, first=number)


@pytest.mark.parametrize("on_disconnect", [CANCEL, CONTINUE])
async def test_a_reader_that_leaves_too_much_waiting_is_cut_off(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_disconnect: generation_service_pb2.DisconnectPolicy.ValueType,
) -> None:
    monkeypatch.setattr(rich_generation, "WAITING_BYTES_MAX", 1_000_000)
    monkeypatch.setattr(rich, "ALARM_BYTES", 1_000_000)
    lives_on = on_disconnect == CONTINUE
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(
            Rich(change=several(2), most=1000, on_disconnect=on_disconnect)
        )
        lanes = lanes_of(await world.accepted())
        await stream.until(0)
        flood(worker, lanes)
        if lives_on:
            for lane in lanes:
                worker.end(lane)
        else:
            assert {await worker.next_abort() for _ in lanes} == set(lanes)

        settled = await world.only_settlement()

        assert settled.closing.cause is (EndCause.COMPLETED if lives_on else EndCause.STALLED)
        assert settled.owed == (3 + settled.closing.output_tokens) * NANOS_PER_TOKEN
        if lives_on:
            assert settled.closing.output_tokens == WORDS
        else:
            assert 0 < settled.closing.output_tokens < WORDS
            assert world.budget.used == 0
        error = await stream.failure()
        assert error.reason is Reason.CONSUMER_STALLED
        assert error.metadata.keys() == {"stallSeconds", "generationId", "resumable"}


async def test_what_waits_counts_with_what_is_kept(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(Rich(change=several(2), most=1000))
        lanes = lanes_of(await world.accepted())
        await stream.until(0)
        flood(worker, lanes)
        await eventually(lambda: world.budget.used > 1_000_000)

        for lane in lanes:
            worker.end(lane)
        await stream.rest()

        assert world.budget.used == 0


async def test_a_conversation_is_told_apart_if_any_of_the_workers_reasons(tmp_path: Path) -> None:
    """The scheduler may name one that does, though not all of the version do."""
    able = Capabilities(chat=True, tool_calls=True, max_outputs=1)
    async with gateway(tmp_path, worker_count=2, capabilities=able) as world:
        target = world.scheduler.targets[0]
        world.table.put(
            KnownWorker(
                name=target.worker,
                endpoint=target.endpoint,
                epoch=target.epoch,
                model_versions=frozenset({VERSION}),
                capabilities=Capabilities(
                    chat=True, tool_calls=True, reasoning=True, max_outputs=1
                ),
            )
        )
        stream = world.client.stream(Rich(change=conversation))
        lane = (await world.accepted()).lane
        tell(world.workers[0], lane, thought("hm"), reasoning_tokens=1)
        world.workers[0].say(lane, "so")
        world.workers[0].end(lane)
        await stream.rest()

        assert "".join(delta.reasoning for delta in deltas_of(stream)) == "hm"
        assert text_of(stream) == "so"


async def test_a_plain_request_that_gets_more_than_text_fails(tmp_path: Path) -> None:
    """A worker that breaks its promise: what it says could not be shown."""
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Wish())
        lane = (await world.accepted()).lane
        tell(world.workers[0], lane, thought("hm"), reasoning_tokens=1)

        assert (await stream.failure()).reason is Reason.ENGINE_FAILURE
        assert (await world.only_settlement()).owed == 0


async def test_more_output_than_agreed_on_is_cut(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        stream = world.client.stream(Rich(change=several(2), most=2))
        lanes = lanes_of(await world.accepted())
        worker.say(lanes[0], *"abcde")

        assert (await stream.failure()).reason is Reason.ENGINE_FAILURE
        assert sum(len(delta.text) for delta in deltas_of(stream)) <= 4
        assert {await worker.next_abort() for _ in lanes} == set(lanes)
        assert (await world.only_settlement()).closing.cause is EndCause.ENGINE_FAILURE


async def test_an_end_is_passed_on_as_the_worker_says_it(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Rich(change=chat))
        lane = (await world.accepted()).lane
        how = generation_pb2.OutputEnd(reason=generation_pb2.FINISH_REASON_TOOL_CALLS)
        tell(world.workers[0], lane, called("{}", id_="c1", name="f"))
        world.workers[0].end(lane, how)
        await stream.rest()

        assert deltas_of(stream)[-1].end == how
