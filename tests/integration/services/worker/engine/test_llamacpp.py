"""What the llamacpp engine promises beyond the common contract, on the small model."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import pytest_asyncio

from libs.testing.eventually import eventually
from services.worker.engine.base import (
    ConstraintKind,
    Ended,
    EndReason,
    EngineAbilities,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    Sampling,
    StepBatch,
)
from services.worker.engine.llamacpp import LlamaCppEngine

# One engine for the whole module: each test leaves it idle, which the fixture checks.
pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = Path(__file__).parents[5] / "services" / "worker" / "models" / "maas-tiny-story.gguf"
CAPACITY = 9
CONTEXT = 600
PATIENCE_S = 30.0

GREEDY = Sampling(temperature=0, top_p=1, top_k=0, seed=0)
DRAWN = Sampling(temperature=1, top_p=0.95, top_k=0, seed=12345)
SAMPLINGS = [GREEDY, DRAWN, Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=7)]


def prompt_of(length: int, *, seed: int = 0) -> tuple[int, ...]:
    """Ids that are no control tokens."""
    return tuple(random.Random(seed).choices(range(16, 2000), k=length))  # noqa: S311 - no secret


def ask(
    prompt: tuple[int, ...],
    tokens: int,
    sampling: Sampling = GREEDY,
    *,
    continues: tuple[int, ...] = (),
) -> EngineRequest:
    return EngineRequest(
        prompt_ids=prompt,
        continue_ids=continues,
        max_output_tokens=tokens,
        ignore_eos=True,
        sampling=sampling,
    )


@dataclass
class Bench:
    """An engine, and what it told."""

    engine: LlamaCppEngine
    info: EngineInfo
    outputs: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    ended: dict[int, Ended] = field(default_factory=dict)
    lanes: int = 0

    def submit(self, request: EngineRequest) -> int:
        self.lanes += 1
        self.engine.submit(self.lanes, request)
        return self.lanes

    async def step(self) -> StepBatch:
        async with asyncio.timeout(PATIENCE_S):
            batch = await self.engine.next_step()
        for lane, token_id in zip(batch.lanes, batch.token_ids, strict=True):
            self.outputs[lane].append(token_id)
        for ended in batch.ended:
            assert ended.lane not in self.ended
            self.ended[ended.lane] = ended
        return batch

    async def until_ended(self, *lanes: int) -> None:
        while not self.ended.keys() >= set(lanes):
            await self.step()

    async def run(self, *requests: EngineRequest) -> list[list[int]]:
        lanes = [self.submit(request) for request in requests]
        await self.until_ended(*lanes)
        return [self.outputs[lane] for lane in lanes]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Bench]:
    engine = LlamaCppEngine(MODEL, capacity=CAPACITY, context_length=CONTEXT, threads=1)
    info = await engine.start()
    yield Bench(engine, info)
    await engine.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def bench(shared: Bench) -> AsyncIterator[Bench]:
    yield shared
    assert replace(shared.engine.load(), steps=None) == EngineLoad(
        running=0,
        waiting=0,
        waiting_tokens=0,
        kv_used_tokens=0,
        kv_total_tokens=CAPACITY * CONTEXT,
    )


async def test_the_engine_tells_what_it_is(bench: Bench) -> None:
    digest = hashlib.sha256(MODEL.read_bytes()).hexdigest()

    assert bench.info == EngineInfo(
        engine="llamacpp",
        version="xllamacpp 2026.10.11549",
        context_length=CONTEXT,
        max_running=CAPACITY,
        vocabulary_size=2048,
        digest=f"sha256:{digest}",
        is_deterministic=True,
        abilities=EngineAbilities(
            constraints=frozenset(ConstraintKind),
            min_p=True,
            penalties=True,
            repetition_penalty=True,
            logit_bias=True,
            min_output_tokens=True,
            ignore_eos=True,
            max_top_logprobs=20,
            prompt_logprobs=True,
            adapters=True,
            embedding_dimensions=256,
            prompt_cache=True,
        ),
    )


@pytest.mark.parametrize(
    ("length", "sampling"),
    [(20, SAMPLINGS[0]), (20, SAMPLINGS[1]), (20, SAMPLINGS[2]), (540, SAMPLINGS[1])],
    ids=["greedy", "top_p", "top_k", "long"],
)
async def test_a_lane_alone_gets_the_tokens_it_gets_in_company(
    bench: Bench, length: int, sampling: Sampling
) -> None:
    """Long prompts too: from 512 tokens on, f16 keys are computed by the shape of the batch."""
    request = ask(prompt_of(length), 24, sampling)
    company = [ask(prompt_of(10 + 3 * i, seed=i + 1), 30, SAMPLINGS[i % 3]) for i in range(8)]

    (alone,) = await bench.run(request)
    together = await bench.run(*company[:3], request, *company[3:])

    assert len(alone) == 24
    assert together[3] == alone


async def test_another_seed_gives_other_tokens_and_the_same_seed_the_same(bench: Bench) -> None:
    other = Sampling(temperature=1, top_p=0.95, top_k=0, seed=12346)
    prompt = prompt_of(20)

    first, again, different = await bench.run(
        ask(prompt, 30, DRAWN), ask(prompt, 30, DRAWN), ask(prompt, 30, other)
    )

    assert first == again
    assert first != different


@pytest.mark.parametrize(
    ("length", "cuts", "sampling"),
    [(20, (1, 17, 49), SAMPLINGS[0]), (20, (1, 17, 49), SAMPLINGS[1]), (500, (30,), SAMPLINGS[1])],
    ids=["greedy", "top_p", "long"],
)
async def test_a_continued_lane_gets_the_tokens_of_the_uninterrupted_run(
    bench: Bench, length: int, cuts: tuple[int, ...], sampling: Sampling
) -> None:
    prompt = prompt_of(length, seed=3)
    (whole,) = await bench.run(ask(prompt, 50, sampling))

    rests = await bench.run(
        *(ask(prompt, 50, sampling, continues=tuple(whole[:cut])) for cut in cuts)
    )

    assert rests == [whole[cut:] for cut in cuts]


async def test_a_prompt_may_fill_the_context_to_the_last_token(bench: Bench) -> None:
    lengths = [CONTEXT - 1, CONTEXT]

    outputs = await bench.run(*(ask(prompt_of(length), 50) for length in lengths))

    assert [len(output) for output in outputs] == [1, 0]
    for lane in range(bench.lanes - 1, bench.lanes + 1):
        assert bench.ended[lane].reason is EndReason.CONTEXT_FULL


async def test_steps_that_nobody_fetched_come_as_one_batch(bench: Bench) -> None:
    lanes = [bench.submit(ask(prompt_of(5), 40, DRAWN)) for _ in range(3)]
    # Everything was taken and everything has ended, without one fetch.
    await eventually(lambda: _is_idle(bench.engine), within_s=PATIENCE_S)

    batch = await bench.step()

    assert len(batch.token_ids) == 3 * 40
    assert {ended.lane for ended in batch.ended} == set(lanes)


def _is_idle(engine: LlamaCppEngine) -> bool:
    load = engine.load()
    return (load.running, load.waiting) == (0, 0)


async def test_a_cancelled_fetch_loses_nothing(bench: Bench) -> None:
    (expected,) = await bench.run(ask(prompt_of(9), 60, DRAWN))

    lane = bench.submit(ask(prompt_of(9), 60, DRAWN))
    cancelled = 0
    while lane not in bench.ended:
        fetch = asyncio.ensure_future(bench.engine.next_step())
        await asyncio.sleep(0)
        # Those that had something at once are done; every other one is cancelled.
        if fetch.cancel():
            cancelled += 1
            await asyncio.gather(fetch, return_exceptions=True)
            await bench.step()
        else:
            batch = await fetch
            bench.outputs[lane] += batch.token_ids
            bench.ended.update({ended.lane: ended for ended in batch.ended})

    assert cancelled
    assert bench.outputs[lane] == expected


async def test_a_lane_that_waits_for_a_slot_is_aborted_at_once(bench: Bench) -> None:
    running = [bench.submit(ask(prompt_of(5), 500)) for _ in range(CAPACITY)]
    waiting = bench.submit(ask(prompt_of(5), 500))
    while len(bench.outputs) < CAPACITY or not bench.engine.load().running:
        await bench.step()

    bench.engine.abort(waiting)
    await bench.until_ended(waiting)

    assert bench.ended[waiting] == Ended(waiting, EndReason.ABORTED)
    assert waiting not in bench.outputs
    for lane in running:
        bench.engine.abort(lane)
    await bench.until_ended(*running)


@pytest.mark.parametrize("seed", range(3))
async def test_after_submits_and_aborts_at_random_every_lane_ended_once(
    bench: Bench, seed: int
) -> None:
    """The fixture then finds every slot free and the KV cache empty."""
    rng = random.Random(seed)  # noqa: S311 - no secret
    lanes: list[int] = []
    for _ in range(60):
        if len(lanes) < 40:
            length = rng.choice([1, 5, 30, 150])
            sampling = rng.choice(SAMPLINGS)
            lanes.append(bench.submit(ask(prompt_of(length), rng.randint(1, 12), sampling)))
        for lane in rng.sample(lanes, k=min(2, len(lanes))):
            if rng.random() < 0.3:
                bench.engine.abort(lane)
        if any(lane not in bench.ended for lane in lanes):
            await bench.step()

    await bench.until_ended(*lanes)

    reasons = {bench.ended[lane].reason for lane in lanes}
    assert reasons == {EndReason.MAX_TOKENS, EndReason.ABORTED}


async def test_a_lane_in_use_cannot_be_taken_again(bench: Bench) -> None:
    lane = bench.submit(ask(prompt_of(5), 500))

    with pytest.raises(ValueError, match="in use"):
        bench.engine.submit(lane, ask(prompt_of(5), 5))

    bench.engine.abort(lane)
    await bench.until_ended(lane)
