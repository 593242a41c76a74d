"""The simulator's costs, under a clock that the tests move."""

from __future__ import annotations

import asyncio
import statistics

import pytest

from libs.testing import FakeClock
from services.worker.engine.base import (
    Ended,
    EndReason,
    EngineRequest,
    EngineStartError,
    Sampling,
    StepBatch,
)
from services.worker.engine.sim import FLAT_OUT, SimCosts, SimEngine
from services.worker.engine.sim_tokenizer import SimTokenizer

TOKENIZER = SimTokenizer()
COSTS = SimCosts(
    prefill_tokens_per_s=1000,
    prefill_chunk_tokens=100,
    decode_base_s=0.010,
    decode_per_lane_s=0.001,
)


def make(
    clock: FakeClock,
    *,
    capacity: int = 4,
    context_length: int = 1000,
    kv_tokens: int = 4000,
    costs: SimCosts = COSTS,
) -> SimEngine:
    return SimEngine(
        clock,
        TOKENIZER,
        capacity=capacity,
        context_length=context_length,
        kv_tokens=kv_tokens,
        costs=costs,
    )


def ask(
    prompt: int, tokens: int, *, seed: int = 1, stops: frozenset[int] = frozenset()
) -> EngineRequest:
    return EngineRequest(
        prompt_ids=tuple(range(prompt)),
        max_output_tokens=tokens,
        stop_token_ids=stops,
        sampling=Sampling(temperature=1, top_p=1, top_k=0, seed=seed),
    )


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def step_after(engine: SimEngine, clock: FakeClock, seconds: float) -> StepBatch:
    """The next batch, which comes after exactly that long."""
    waiting = asyncio.ensure_future(engine.next_step())
    await settle()
    clock.advance(seconds - 0.0001)
    await settle()
    assert not waiting.done(), "came early"
    clock.advance(0.0001 + 1e-9)
    await settle()
    assert waiting.done(), "comes late"
    return waiting.result()


async def test_a_step_costs_prefill_base_and_lanes() -> None:
    clock = FakeClock()
    engine = make(clock)
    engine.submit(1, ask(prompt=50, tokens=3))

    first = await step_after(engine, clock, 0.050 + 0.010)
    second = await step_after(engine, clock, 0.010 + 0.001)

    assert (len(first.prefilled), len(first.lanes)) == (1, 1)
    assert second.lanes == [1]
    await engine.stop()


async def test_long_prompts_are_prefilled_in_chunks_while_others_decode() -> None:
    clock = FakeClock()
    engine = make(clock)
    engine.submit(1, ask(prompt=10, tokens=10))
    await step_after(engine, clock, 0.010 + 0.010)
    engine.submit(2, ask(prompt=150, tokens=10))

    await_first = await step_after(engine, clock, 0.100 + 0.010 + 0.001)
    assert (await_first.lanes, await_first.prefilled) == ([1], [])
    assert engine.load().waiting_tokens == 50

    second = await step_after(engine, clock, 0.050 + 0.010 + 0.001)
    assert second.lanes == [1, 2]
    await engine.stop()


async def test_an_abort_does_not_wait_for_the_step() -> None:
    clock = FakeClock()
    engine = make(clock)
    engine.submit(1, ask(prompt=50, tokens=3))
    waiting = asyncio.ensure_future(engine.next_step())
    await settle()

    engine.abort(1)
    await settle()

    assert waiting.result().ended == [Ended(1, EndReason.ABORTED)]
    assert engine.load().running == 0
    assert engine.load().waiting_tokens == 0
    await engine.stop()


async def test_a_late_consumer_finds_one_step_done_and_not_more() -> None:
    clock = FakeClock()
    engine = make(clock)
    engine.submit(1, ask(prompt=50, tokens=9))
    await step_after(engine, clock, 0.060)
    clock.advance(5.0)

    await asyncio.wait_for(engine.next_step(), 1)
    await step_after(engine, clock, 0.011)
    await engine.stop()


async def test_who_does_not_fit_into_the_cache_waits() -> None:
    engine = make(FakeClock(), kv_tokens=1000, costs=FLAT_OUT)
    engine.submit(1, ask(prompt=400, tokens=300))
    engine.submit(2, ask(prompt=200, tokens=101))
    engine.submit(3, ask(prompt=1, tokens=1))

    batch = await engine.next_step()

    assert batch.lanes == [1]
    assert engine.load().waiting == 2
    assert engine.load().kv_used_tokens == 400
    await engine.stop()


async def test_a_cache_smaller_than_a_context_is_refused() -> None:
    with pytest.raises(EngineStartError, match="kv_tokens"):
        await make(FakeClock(), context_length=100, kv_tokens=99).start()


async def finish(engine: SimEngine, lanes: int) -> dict[int, tuple[int, Ended]]:
    counts = dict.fromkeys(range(lanes), 0)
    found: dict[int, tuple[int, Ended]] = {}
    while len(found) < lanes:
        batch = await engine.next_step()
        for lane in batch.lanes:
            counts[lane] += 1
        for ended in batch.ended:
            found[ended.lane] = (counts[ended.lane], ended)
    await engine.stop()
    return found


async def test_by_default_the_model_never_ends_by_itself() -> None:
    engine = make(FakeClock(), costs=FLAT_OUT)
    for lane in range(4):
        engine.submit(lane, ask(prompt=1, tokens=900, seed=lane))

    ends = await finish(engine, 4)

    assert {count for count, _ in ends.values()} == {900}


async def test_outputs_end_by_themselves_around_the_mean() -> None:
    costs = SimCosts(
        prefill_tokens_per_s=0, decode_base_s=0, decode_per_lane_s=0, mean_output_tokens=40
    )
    engine = make(FakeClock(), capacity=400, kv_tokens=400_000, costs=costs)
    for lane in range(400):
        engine.submit(lane, ask(prompt=1, tokens=900, seed=lane))

    ends = await finish(engine, 400)

    assert {ended.reason for _, ended in ends.values()} == {EndReason.END_OF_SEQUENCE}
    assert statistics.mean(count for count, _ in ends.values()) == pytest.approx(40, rel=0.2)


async def test_a_stop_token_at_once_gives_no_output() -> None:
    engine = make(FakeClock(), costs=FLAT_OUT)
    engine.submit(0, ask(prompt=3, tokens=5))
    first = (await engine.next_step()).token_ids[0]
    engine = make(FakeClock(), costs=FLAT_OUT)
    engine.submit(0, ask(prompt=3, tokens=5, stops=frozenset({first})))

    ends = await finish(engine, 1)

    assert ends[0] == (0, Ended(0, EndReason.STOP_TOKEN, first))


async def test_aborted_executions_leave_nothing_behind() -> None:
    engine = make(FakeClock(), costs=FLAT_OUT)
    for lane in range(50):
        engine.submit(lane, ask(prompt=3, tokens=500))
        await engine.next_step()
        engine.abort(lane)
        await engine.next_step()

    assert not any(engine._endings.values())
    assert not engine._decoding
    assert engine._kv_reserved == 0
    await engine.stop()


async def test_output_reads_like_sentences() -> None:
    engine = make(FakeClock(), costs=FLAT_OUT)
    engine.submit(0, ask(prompt=3, tokens=60))
    data = b""
    while True:
        batch = await engine.next_step()
        data += b"".join(TOKENIZER.token_bytes(token_id) for token_id in batch.token_ids)
        if batch.ended:
            break

    text = data.decode("ascii")
    assert text[0].isupper()
    assert ". " in text
    assert len(text.split()) > 40
    await engine.stop()


async def test_what_is_said_does_not_depend_on_who_comes_and_goes() -> None:
    """Tokens are drawn ahead; those of another company are drawn anew."""
    alone: dict[int, list[int]] = {}
    for lane in range(6):
        engine = make(FakeClock(), costs=FLAT_OUT)
        engine.submit(0, ask(prompt=3, tokens=100, seed=lane))
        said: list[int] = []
        while not (batch := await engine.next_step()).ended:
            said += batch.token_ids
        alone[lane] = said + batch.token_ids

    engine = make(FakeClock(), costs=FLAT_OUT, capacity=6, kv_tokens=6000)
    together: dict[int, list[int]] = {lane: [] for lane in range(6)}
    ended = 0
    for step in range(1000):
        lane = step // 13
        if step % 13 == 0 and lane < 6:
            engine.submit(lane, ask(prompt=3, tokens=100, seed=lane))
        batch = await engine.next_step()
        for at, token_id in zip(batch.lanes, batch.token_ids, strict=True):
            together[at].append(token_id)
        ended += len(batch.ended)
        if ended == 6:
            break

    assert together == alone
    assert {len(said) for said in alone.values()} == {100}
    await engine.stop()
