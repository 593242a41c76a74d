"""Executions of several outputs: one place, one prompt, a lane for each output."""

from __future__ import annotations

import pytest
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from libs.testing import FakeClock
from libs.units import Rates
from services.worker.engine.base import StepBatch
from services.worker.requests import seed_of
from tests.integration.services.worker.harness import (
    CAPACITY,
    MAX_WAITING,
    PIECES,
    STEPWISE,
    TOKENIZER,
    Worker,
    eventually,
    execution,
    make_engine,
    running_worker,
)
from tests.integration.services.worker.scripted import ScriptedEngine

MAX_TOKENS = generation_pb2.FINISH_REASON_MAX_TOKENS
STOP = generation_pb2.FINISH_REASON_STOP_SEQUENCE


def is_free(worker: Worker) -> bool:
    load = worker.engine.load()
    return load.running == 0 and load.waiting == 0 and worker.executions.count == 0


async def test_several_outputs_have_one_acceptance_and_an_end_each() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        await gateway.send(execution(3, more_lanes=[9, 4], tokens=12))
        await gateway.until_ended(3, 9, 4)

        accepted = [item.lane for message in gateway.messages for item in message.accepted]
        assert accepted == [3]
        ends = [gateway.told[lane].end.reason for lane in (3, 9, 4)]
        assert ends == [MAX_TOKENS] * 3
        assert worker.reports.take(9) == (["execution-3"], ["execution-3"])
        await eventually(lambda: is_free(worker))


async def test_each_output_has_its_own_seed_and_the_first_has_the_requests() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, more_lanes=[2, 3], tokens=30, seed=99))
        await gateway.until_ended(1, 2, 3)
        alone = [
            await gateway.run(execution(10 + output, tokens=30, seed=seed_of(99, output)))
            for output in range(3)
        ]

        together = [gateway.told[lane].token_ids for lane in (1, 2, 3)]
        assert together == [told.token_ids for told in alone]
        assert len({tuple(token_ids) for token_ids in together}) == 3


async def test_a_stop_sequence_ends_only_its_output_and_the_place_stays_taken() -> None:
    clock = FakeClock()
    async with running_worker() as worker, worker.gateway() as gateway:
        whole = await gateway.run(execution(1, tokens=40, seed=5))
    stop = (PIECES.texts[whole.token_ids[2]] or "") + (PIECES.texts[whole.token_ids[3]] or "")
    engine = ScriptedEngine(TOKENIZER.vocabulary_size)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, more_lanes=[2], tokens=9, stops=[stop]))
        await gateway.read()
        first, second = sorted(engine.running)
        for token_id in whole.token_ids[:4]:
            engine.say(StepBatch(lanes=[first, second], token_ids=[token_id, 65]))
        await gateway.until_ended(1)

        assert gateway.told[1].end == generation_pb2.OutputEnd(reason=STOP, stop_sequence=stop)
        assert worker.executions.running_ids() == ["execution-1"]
        engine.end(second)
        await gateway.until_ended(2)
        assert gateway.told[2].end.reason == generation_pb2.FINISH_REASON_END
        assert gateway.told[2].text == "AAAA"
        assert worker.reports.take(9) == (["execution-1"], ["execution-1"])


@pytest.mark.parametrize("how", ["lane of output 0", "lane of output 1", "id", "deadline"])
async def test_whatever_stops_an_execution_stops_all_its_outputs(how: str) -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        budget_s = 5.0 if how == "deadline" else None
        await gateway.send(execution(1, more_lanes=[2], tokens=100, budget_s=budget_s))
        await gateway.read()

        match how:
            case "id":
                assert worker.executions.abort_ids(["execution-1"]) == (["execution-1"], [])
            case "deadline":
                await eventually(lambda: bool(engine.load().running))
                clock.advance(budget_s or 0)
            case _:
                await gateway.send(abort_lanes=[1 if how.endswith("0") else 2])
        await gateway.until_ended(1, 2)

        want = "DEADLINE_EXCEEDED" if how == "deadline" else "CALL_CANCELLED"
        assert {gateway.told[1].reason, gateway.told[2].reason} == {want}
        await eventually(lambda: is_free(worker))
        assert worker.reports.take(9) == (["execution-1"], ["execution-1"])


async def test_the_engines_death_ends_every_output() -> None:
    engine = ScriptedEngine(TOKENIZER.vocabulary_size)
    async with (
        running_worker(engine=engine, on_failure=lambda _: None) as worker,
        worker.gateway() as gateway,
    ):
        await gateway.send(execution(1, more_lanes=[2, 3]))
        await gateway.read()
        engine.die()
        await gateway.until_ended(1, 2, 3)

        assert {gateway.told[lane].reason for lane in (1, 2, 3)} == {"WORKER_LOST"}


def without_a_lane(made: engine_pb2.Execution) -> None:
    made.more_lanes.pop()


def with_a_lane_too_many(made: engine_pb2.Execution) -> None:
    made.more_lanes.append(77)


@pytest.mark.parametrize("change", [without_a_lane, with_a_lane_too_many])
async def test_lanes_that_do_not_match_the_count_are_refused_whole(change: object) -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        made = execution(1, more_lanes=[2, 3])
        assert callable(change)
        change(made)
        lanes = [made.lane, *made.more_lanes]
        await gateway.send(made)
        await gateway.until_ended(*lanes)

        for lane in lanes:
            assert dict(gateway.told[lane].failure.metadata) == {"field": "more_lanes"}
        assert worker.reports.take(9) == ([], [])
        assert (await gateway.run(execution(2, execution_id="next"))).end.reason == MAX_TOKENS


async def test_a_lane_that_is_named_twice_refuses_the_execution() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, more_lanes=[2, 1]))
        await gateway.until_ended(1, 2)

        assert {gateway.told[lane].reason for lane in (1, 2)} == {"INVALID_FIELD"}
        assert worker.executions.count == 0


async def test_a_lane_in_use_ends_both_executions() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=100))
        await gateway.read()
        first = gateway.told[1]
        await gateway.send(execution(5, more_lanes=[1], tokens=100))
        gateway.told[1] = first
        await gateway.until_ended(1, 5)

        assert gateway.told[1].reason == gateway.told[5].reason == "INVALID_FIELD"
        await eventually(lambda: is_free(worker))


async def test_the_queue_counts_outputs() -> None:
    clock = FakeClock()
    engine = make_engine(clock, STEPWISE)
    most = CAPACITY + MAX_WAITING
    async with running_worker(clock=clock, engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(
            execution(1, more_lanes=[2, 3, 4], tokens=100),
            execution(11, tokens=100),
            execution(21, more_lanes=[22], tokens=100),
        )
        await gateway.until_ended(21, 22)

        assert most == 6, "four and one run; two more do not fit"
        assert gateway.told[21].reason == gateway.told[22].reason == "QUEUE_FULL"
        assert worker.executions.running_ids() == ["execution-1", "execution-11"]


async def test_outputs_have_equal_shares_of_the_charge_limit() -> None:
    limit = engine_pb2.ChargeLimit(nanos=100, input_price=10**6, output_price=10 * 10**6)
    async with running_worker() as worker, worker.gateway() as gateway:
        await gateway.send(
            execution(1, more_lanes=[2, 3], ids=[65, 66], tokens=50, charge_limit=limit)
        )
        await gateway.until_ended(1, 2, 3)

        shares = [len(gateway.told[lane].token_ids) for lane in (1, 2, 3)]
        assert shares == [3, 3, 3], "9.8 tokens can be paid for"
        ends = {gateway.told[lane].end.reason for lane in (1, 2, 3)}
        assert ends == {generation_pb2.FINISH_REASON_CHARGE_LIMIT}
        rates = Rates(input_price=10**6, output_price=10 * 10**6)
        spent = rates.charge(input_tokens=2, output_tokens=9)
        assert spent <= limit.nanos


async def test_a_charge_limit_that_leaves_one_output_nothing_refuses_all() -> None:
    limit = engine_pb2.ChargeLimit(nanos=22, input_price=10**6, output_price=10 * 10**6)
    async with running_worker() as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, more_lanes=[2, 3], ids=[65, 66], charge_limit=limit))
        await gateway.until_ended(1, 2, 3)

        assert "must be 10 nanos more" in gateway.told[1].failure.message
        assert gateway.told[3].reason == "INVALID_FIELD"


async def test_more_outputs_than_run_at_once_are_refused_by_name() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        lanes = list(range(2, CAPACITY + 2))
        await gateway.send(execution(1, more_lanes=lanes))
        await gateway.until_ended(1, *lanes)

        assert dict(gateway.told[1].failure.metadata) == {"field": "spec.output.count"}
