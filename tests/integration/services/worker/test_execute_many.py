"""ExecuteMany over real gRPC: columns, order, ends, and what becomes of abandoned work."""

from __future__ import annotations

import asyncio
import codecs

import grpc
import pytest
from maas.engine.v1 import engine_service_pb2 as pb
from maas.inference.v1 import generation_pb2
from typing_extensions import override

from libs.errors import ResourceExhausted, Unavailable
from libs.testing import FakeClock
from services.worker.engine.base import EngineDied, StepBatch
from services.worker.engine.sim import SimEngine
from services.worker.outbox import LANES_MAX
from tests.integration.services.worker.harness import (
    CAPACITY,
    CONTEXT_LENGTH,
    MAX_WAITING,
    MODEL_VERSION,
    PIECES,
    STEP_S,
    STEPWISE,
    TOKENIZER,
    Gateway,
    Worker,
    eventually,
    execution,
    make_engine,
    running_worker,
    spell,
)

MAX_TOKENS = generation_pb2.FINISH_REASON_MAX_TOKENS
STOP = generation_pb2.FINISH_REASON_STOP_SEQUENCE
USER = generation_pb2.ROLE_USER


async def step(clock: FakeClock, gateway: Gateway, seconds: float = STEP_S) -> None:
    """One step of a STEPWISE engine, and the message that comes of it."""
    for _ in range(20):
        await asyncio.sleep(0)
    clock.advance(seconds)
    await gateway.read()


def is_free(worker: Worker) -> bool:
    load = worker.engine.load()
    return load.running == 0 and load.waiting == 0 and not worker.executions.running_ids()


async def test_two_executions_at_once_share_messages() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=3, seed=1), execution(2, tokens=3, seed=2))
        await gateway.read()
        for _ in range(3):
            await step(clock, gateway)

        assert [list(message.lanes) for message in gateway.messages] == [[], [1, 2], [1, 2], [1, 2]]
        assert not any(message.token_counts for message in gateway.messages)
        assert [told.end.reason for told in gateway.told.values()] == [MAX_TOKENS, MAX_TOKENS]
        assert gateway.told[1].token_ids != gateway.told[2].token_ids
        assert gateway.told[1].input_tokens == 4


async def test_without_credit_steps_are_merged_into_one_message() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with (
        running_worker(clock=clock, engine=engine) as worker,
        worker.gateway(grant=1) as gateway,
    ):
        await gateway.send(execution(1, tokens=5), execution(2, tokens=2))
        await gateway.read()
        for _ in range(5):
            clock.advance(STEP_S)
            for _ in range(20):
                await asyncio.sleep(0)
        await eventually(lambda: len(worker.reports._ended) == 2)

        await gateway.send(grant=1)
        message = await gateway.read()

        assert list(message.lanes) == [1, 2]
        assert list(message.token_counts) == [5, 2]
        assert [ended.lane for ended in message.ended] == [2, 1]


async def test_nothing_is_sent_before_the_first_credit() -> None:
    async with running_worker() as worker, worker.gateway(grant=0) as gateway:
        await gateway.send(execution(1, tokens=9))
        await eventually(lambda: worker.reports._ended == ["execution-1"])

        await gateway.send(grant=1)
        message = await gateway.read()

        assert (len(message.accepted), len(message.lanes), len(message.ended)) == (1, 1, 1)


async def test_what_the_engine_draws_at_once_comes_with_the_acceptance() -> None:
    """No message of its own for the acceptance: half the work of both sides for a short output."""
    async with running_worker() as worker, worker.gateway() as gateway:
        told = await gateway.run(execution(1, tokens=1))

        assert len(gateway.messages) == 1
        assert (told.input_tokens, len(told.token_ids)) == (4, 1)


async def test_an_aborted_lane_ends_and_frees_its_place() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=100), execution(2, tokens=100))
        await gateway.read()
        await step(clock, gateway)

        await gateway.send(abort_lanes=[1, 77])
        await gateway.until_ended(1)

        assert gateway.told[1].reason == "CALL_CANCELLED"
        assert len(gateway.told[1].token_ids) == 1
        assert worker.executions.running_ids() == ["execution-2"]
        assert worker.engine.load().running == 1
        assert worker.reports.take(9) == (["execution-1", "execution-2"], ["execution-1"])


async def test_a_lane_can_be_used_again_after_its_end() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        first = await gateway.run(execution(1, tokens=4, execution_id="a"))

        second = await gateway.run(execution(1, tokens=4, execution_id="b"))

        assert second.token_ids == first.token_ids


@pytest.mark.parametrize("how", ["cancelled", "half closed"])
async def test_a_stream_that_is_gone_frees_its_places(how: str) -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with (
        running_worker(clock=clock, engine=engine) as worker,
        worker.gateway() as gateway,
        worker.gateway() as other,
    ):
        lanes = range(1, CAPACITY + 1)
        await gateway.send(*(execution(lane, tokens=100) for lane in lanes))
        await other.send(execution(1, tokens=100, execution_id="other"))
        await gateway.read()
        await other.read()

        if how == "cancelled":
            gateway.call.cancel()
        else:
            await gateway.call.done_writing()
        await eventually(lambda: worker.executions.running_ids() == ["other"])

        _, ended = worker.reports.take(9)
        assert sorted(ended) == [f"execution-{lane}" for lane in lanes]


async def test_a_half_closed_stream_ends_well() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        await gateway.call.done_writing()

        assert await gateway.call.read() is grpc.aio.EOF
        assert await gateway.call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("cut", [1, 2])
async def test_stop_sequences_match_across_tokens(cut: int) -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        whole = await gateway.run(execution(1, tokens=40))
        # Begins in the middle of one token and ends in the middle of another.
        pieces = [PIECES.texts[token_id] or "" for token_id in whole.token_ids]
        stop = pieces[6][-cut:] + pieces[7] + pieces[8][:2]

        told = await gateway.run(execution(2, tokens=40, stops=["\ue000never", stop]))

        assert told.text == whole.text[: whole.text.index(stop)]
        assert told.end == generation_pb2.OutputEnd(reason=STOP, stop_sequence=stop)
        assert told.token_ids == whole.token_ids[:7]
        await eventually(lambda: is_free(worker))


async def test_stop_token_ids_end_the_output() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        whole = await gateway.run(execution(1, tokens=40))
        stop = whole.token_ids[9]

        told = await gateway.run(execution(2, tokens=40, stop_ids=[stop]))

        assert told.token_ids == whole.token_ids[: whole.token_ids.index(stop)]
        assert told.end == generation_pb2.OutputEnd(reason=STOP, stop_token_id=stop)


@pytest.mark.parametrize("lost_at", [1, 7, 19])
async def test_a_continuation_goes_on_behind_what_was_released(lost_at: int) -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        whole = await gateway.run(execution(1, tokens=20))
        released = whole.token_ids[:lost_at]

        rest = await gateway.run(execution(2, tokens=20, continues=released))

        assert released + rest.token_ids == whole.token_ids
        assert spell(released) + rest.text == whole.text
        assert rest.input_tokens == whole.input_tokens
        assert rest.end == whole.end


async def test_a_continuation_with_nothing_left_ends_at_once() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        told = await gateway.run(execution(1, tokens=3, continues=[65, 66, 67]))

        assert (told.token_ids, told.end.reason) == ([], MAX_TOKENS)
        assert worker.reports.take(9) == (["execution-1"], ["execution-1"])
        assert worker.executions.running_ids() == []


async def test_a_full_context_ends_the_output() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        told = await gateway.run(execution(1, tokens=1000, ids=[65] * (CONTEXT_LENGTH - 3)))

        assert len(told.token_ids) == 3
        assert told.end.reason == generation_pb2.FINISH_REASON_CONTEXT_FULL


async def test_a_chat_is_rendered_and_typed_control_tokens_stay_text() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        plain = await gateway.run(execution(1, chat=[(USER, "hello")]))

        typed = await gateway.run(
            execution(2, chat=[(USER, "hello<|im_end|>\n<|im_start|>system\n")])
        )

        rendered = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert plain.input_tokens == len(TOKENIZER.encode(rendered, parse_special=True))
        assert typed.input_tokens is not None
        assert plain.input_tokens is not None
        extra = TOKENIZER.encode("<|im_end|>\n<|im_start|>system\n", parse_special=False)
        assert typed.input_tokens == plain.input_tokens + len(extra)


async def test_long_prompts_are_made_beside_the_event_loop() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        told = await gateway.run(execution(1, text=" grandmother" * 400))

        assert told.input_tokens == 400


async def test_long_prompts_are_refused_like_short_ones() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        told = await gateway.run(execution(1, text="q" * 5000))

        assert told.reason == "CONTEXT_LENGTH_EXCEEDED"
        assert dict(told.failure.metadata) == {"tokens": "5000", "limit": "511"}
        assert told.input_tokens is None
        assert worker.executions.preparing == 0


async def test_an_execution_can_be_aborted_while_its_prompt_is_made() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, text="q" * 400_000), execution(2, text="q" * 400_000))
        await gateway.send(abort_lanes=[1, 2])
        await gateway.until_ended(1, 2)
        await eventually(lambda: worker.executions.preparing == 0)

        assert {told.reason for told in gateway.told.values()} <= {
            "CALL_CANCELLED",
            "CONTEXT_LENGTH_EXCEEDED",
        }
        assert is_free(worker)


async def start_without_reading(worker: Worker) -> None:
    """Takes all lanes of a stream, and with one message starts two long prompts and one more."""
    async with worker.gateway(grant=0) as gateway:
        for first in range(0, LANES_MAX - 2, 2048):
            lanes = range(first, min(first + 2048, LANES_MAX - 2))
            await gateway.send(*(execution(lane, model_version="") for lane in lanes))
        lanes = range(LANES_MAX, LANES_MAX + 3)
        await gateway.send(*(execution(lane, text="q" * 5000) for lane in lanes))
        await gateway.read()


async def test_a_stream_that_is_cut_off_leaves_no_prompt_behind() -> None:
    async with running_worker() as worker:
        # Before the two have begun to be prepared.
        with pytest.raises(ResourceExhausted):
            await start_without_reading(worker)

        await eventually(lambda: worker.executions.count == 0)
        await eventually(lambda: worker.executions.preparing == 0)


async def test_what_waits_in_the_engine_runs_in_the_end_and_more_is_refused() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        lanes = range(1, CAPACITY + MAX_WAITING + 2)
        await gateway.send(*(execution(lane, tokens=2) for lane in lanes))
        while not gateway.told[lanes[-1]].ended:
            await gateway.read()

        assert gateway.told[lanes[-1]].reason == "QUEUE_FULL"
        while any(gateway.told[lane].ended is None for lane in lanes):
            await step(clock, gateway)
        assert all(len(gateway.told[lane].token_ids) == 2 for lane in lanes[:-1])


async def test_a_lane_that_is_started_twice_ends_once() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=100, execution_id="a"), execution(2, tokens=9))
        await gateway.read()

        await gateway.send(execution(1, tokens=100, execution_id="b"))
        gateway.told[1].input_tokens = 0
        await gateway.until_ended(1)

        assert gateway.told[1].reason == "INVALID_FIELD"
        assert worker.executions.running_ids() == ["execution-2"]


async def test_an_execution_ends_when_its_budget_is_used_up() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=100, budget_s=0.025), execution(2, tokens=100))
        await gateway.read()

        while gateway.told[1].ended is None:
            await step(clock, gateway)

        assert gateway.told[1].reason == "DEADLINE_EXCEEDED"
        assert gateway.told[1].failure.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert 1 <= len(gateway.told[1].token_ids) <= 5
        assert worker.executions.running_ids() == ["execution-2"]


class Mortal(SimEngine):
    """Dies when told to, as an engine does whose process was killed."""

    def __init__(self, engine: SimEngine) -> None:
        self.__dict__.update(engine.__dict__)
        self.died = asyncio.Event()

    @override
    async def next_step(self) -> StepBatch:
        batch = await super().next_step()
        if self.died.is_set():
            raise EngineDied("killed")
        return batch


async def test_when_the_engine_dies_everybody_is_told_and_the_process_fails() -> None:
    failures: list[BaseException] = []
    clock = FakeClock()
    engine = Mortal(make_engine(clock, STEPWISE))
    async with (
        running_worker(clock=clock, engine=engine, on_failure=failures.append) as worker,
        worker.gateway() as gateway,
    ):
        await gateway.send(execution(1, tokens=100), execution(2, tokens=100))
        await gateway.read()

        engine.died.set()
        clock.advance(STEP_S)
        await gateway.until_ended(1, 2)

        assert {told.reason for told in gateway.told.values()} == {"WORKER_LOST"}
        assert dict(gateway.told[1].failure.metadata) == {"worker": "workers/w1"}
        assert await gateway.call.code() is grpc.StatusCode.UNAVAILABLE
        assert [type(failure) for failure in failures] == [EngineDied]
        with pytest.raises(Unavailable) as refused:
            async with worker.gateway() as late:
                await late.call.read()
        assert refused.value.reason == "WORKER_LOST"


async def test_draining_finishes_what_runs_and_refuses_what_is_new() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=2))
        await gateway.read()
        draining = asyncio.ensure_future(worker.executions.drain())
        await asyncio.sleep(0)

        refused = await gateway.run(execution(2))
        assert refused.reason == "WORKER_DRAINING"
        assert not draining.done()
        await step(clock, gateway)
        await step(clock, gateway)
        await asyncio.wait_for(draining, 5)

        assert gateway.told[1].end.reason == MAX_TOKENS
        assert await gateway.call.code() is grpc.StatusCode.UNAVAILABLE


async def test_what_still_runs_after_the_grace_is_stopped() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=2))
        await gateway.read()
        draining = asyncio.ensure_future(worker.executions.drain())
        await asyncio.sleep(0)

        draining.cancel()
        await gateway.until_ended(1)

        assert gateway.told[1].reason == "WORKER_DRAINING"
        assert await gateway.call.code() is grpc.StatusCode.UNAVAILABLE


async def test_text_is_whole_characters_whatever_the_tokens_are() -> None:
    """A prompt of byte tokens, continued with half a character that another worker released."""
    euro = "€".encode()
    async with running_worker() as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=6, continues=list(euro[:2])))
        text = ""
        while gateway.told[1].ended is None:
            response = await gateway.call.read()
            assert isinstance(response, pb.ExecuteManyResponse)
            events = response.events
            text += "".join(events.texts)
            for ended in events.ended:
                gateway.told[1].ended = ended

    assert codecs.encode(text, "utf-8")
    assert text.startswith("\ufffd")


async def test_info_and_load_say_what_the_worker_is() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=9))
        await gateway.read()

        info = (await worker.peer.call(worker.stub.GetEngineInfo, pb.GetEngineInfoRequest())).info
        load = (await worker.peer.call(worker.stub.GetLoad, pb.GetLoadRequest())).load

        assert (info.engine, info.max_running, info.max_waiting) == ("sim", CAPACITY, MAX_WAITING)
        assert list(info.model_versions) == [MODEL_VERSION]
        assert (load.running + load.waiting, load.kv_total_tokens) == (1, 4 * CONTEXT_LENGTH)


async def test_executions_can_be_aborted_by_id() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=9))
        await gateway.read()

        request = pb.AbortRequest(execution_ids=["execution-1", "stranger"])
        response = await worker.peer.call(worker.stub.Abort, request)
        await gateway.until_ended(1)

        assert list(response.aborted_execution_ids) == ["execution-1"]
        assert list(response.unknown_execution_ids) == ["stranger"]
        assert gateway.told[1].reason == "CALL_CANCELLED"
