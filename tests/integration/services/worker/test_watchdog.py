"""The watchdog over an engine that a test speaks for, in a time that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from libs.testing import FakeClock
from services.worker import metrics
from services.worker.engine.base import (
    Adapter,
    Ended,
    EndReason,
    EngineDied,
    EngineRequest,
    Lane,
    Prefilled,
    Sampling,
    StepBatch,
)
from services.worker.watchdog import CANARIES_FAILED_MAX, CANARY, TICK_S, Patience, Watchdog
from tests.integration.services.worker.scripted import CAPACITY, ScriptedEngine

PATIENCE = Patience(
    canary_after_s=4.0, silent_within_s=9.0, abort_within_s=20.0, adapter_within_s=30.0
)
NOTICED_WITHIN_S = 10.0
REQUEST = EngineRequest(
    prompt_ids=(1, 2, 3),
    max_output_tokens=5,
    sampling=Sampling(temperature=0, top_p=1, top_k=0, seed=0),
)
ADAPTER = Adapter(name="adapters/fox", path=None, digest="sha256:00")


@dataclass
class Rig:
    """An engine under watch, and who consumes its batches."""

    clock: FakeClock
    engine: ScriptedEngine
    watchdog: Watchdog
    hung: list[str] = field(default_factory=list)
    batches: list[StepBatch] = field(default_factory=list)
    canaries: int = 0
    answers: bool = True

    async def elapse(self, seconds: float) -> None:
        """Lets time pass; canaries that come are answered, unless the engine is to hang."""
        for _ in range(round(seconds / TICK_S)):
            self.clock.advance(TICK_S)
            await self.settle()
            if CANARY in self.engine.running and self.answers:
                self.canaries += 1
                self.engine.say(StepBatch(lanes=[CANARY], token_ids=[5]))
                self.engine.end(CANARY, EndReason.MAX_TOKENS)
                await self.settle()

    async def noticed_s(self, most_s: float = 60.0) -> float:
        """Seconds until the engine counts as hung."""
        start_s = self.clock.monotonic_s()
        while not self.hung and self.clock.monotonic_s() - start_s < most_s:
            await self.elapse(TICK_S)
        return self.clock.monotonic_s() - start_s

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    def token(self, lane: Lane) -> None:
        self.engine.say(StepBatch(lanes=[lane], token_ids=[7]))


@asynccontextmanager
async def watching() -> AsyncIterator[Rig]:
    clock = FakeClock()
    engine = ScriptedEngine(100)
    rig = Rig(clock, engine, Watchdog(engine, await engine.start(), PATIENCE, clock))

    async def watch() -> None:
        with suppress(EngineDied):
            await rig.watchdog.run(lambda: rig.hung.append("hung"))

    async def consume() -> None:
        with suppress(EngineDied):
            while True:
                rig.batches.append(await rig.watchdog.next_step())

    tasks = [asyncio.create_task(watch()), asyncio.create_task(consume())]
    await rig.settle()
    try:
        yield rig
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        metrics.STUCK_OUTPUTS.set(0)


async def test_an_idle_engine_is_asked_for_a_token_again_and_again() -> None:
    async with watching() as rig:
        await rig.elapse(60.0)

        assert rig.canaries == pytest.approx(60.0 / PATIENCE.canary_after_s, abs=2)
        assert rig.hung == []
        canary = rig.engine.requests[CANARY]
        assert canary.cache_salt
        assert (canary.max_output_tokens, canary.is_background) == (1, False)
        assert rig.batches == [], "nobody hears of it"


async def test_an_idle_engine_that_hangs_is_noticed() -> None:
    async with watching() as rig:
        await rig.elapse(30.0)
        rig.answers = False

        assert await rig.noticed_s() <= NOTICED_WITHIN_S


async def test_an_engine_that_hangs_at_work_is_noticed() -> None:
    async with watching() as rig:
        rig.watchdog.submit(1, REQUEST)
        for _ in range(30):
            rig.token(1)
            await rig.elapse(1.0)
        rig.answers = False

        assert await rig.noticed_s() <= NOTICED_WITHIN_S
        assert rig.canaries == 0, "tokens are signs of life"


async def test_more_work_does_not_put_off_what_hangs() -> None:
    async with watching() as rig:
        rig.answers = False
        for lane in range(1, 9):
            rig.watchdog.submit(lane, REQUEST)
            await rig.elapse(1.0)

        assert await rig.noticed_s() <= NOTICED_WITHIN_S - 8.0


async def test_calls_that_nobody_waits_for_long_do_not_put_off_what_hangs() -> None:
    async with watching() as rig:
        rig.answers = False
        rig.engine.may_embed.clear()
        for _ in range(4):
            call = asyncio.create_task(rig.watchdog.embed([[1]]))
            await rig.elapse(3.0)
            call.cancel()

        assert rig.hung


@pytest.mark.parametrize("reason", [EndReason.FAILED, EndReason.ABORTED])
async def test_what_ends_without_the_engine_does_not_put_off_what_hangs(reason: EndReason) -> None:
    """A child ends by itself what it has not handed on to an engine that hangs."""
    async with watching() as rig:
        rig.answers = False
        for lane in range(1, 11):
            rig.watchdog.submit(lane, REQUEST)
            rig.engine.end(lane, reason)
            await rig.elapse(1.0)

        assert rig.hung


async def test_adapters_that_are_there_already_do_not_put_off_what_hangs() -> None:
    async with watching() as rig:
        await rig.watchdog.load_adapter(ADAPTER)
        rig.answers = False
        for _ in range(10):
            await rig.watchdog.load_adapter(ADAPTER)
            await rig.elapse(1.0)

        assert rig.hung


async def test_a_silent_engine_that_answers_canaries_lives() -> None:
    async with watching() as rig:
        rig.watchdog.submit(1, REQUEST)

        await rig.elapse(120.0)

        assert rig.hung == []


async def test_steps_are_signs_of_life_and_a_canary_may_wait_behind_others() -> None:
    async with watching() as rig:
        rig.answers = False
        rig.watchdog.submit(1, REQUEST)
        await rig.elapse(PATIENCE.canary_after_s)
        assert CANARY in rig.engine.running
        for step in range(60):
            rig.engine.steps = step
            await rig.elapse(1.0)
        assert rig.hung == []

        assert await rig.noticed_s() <= NOTICED_WITHIN_S


async def test_work_that_comes_after_a_silence_gets_its_time() -> None:
    async with watching() as rig:
        await rig.elapse(3.75)
        rig.watchdog.submit(1, REQUEST)
        rig.answers = False
        await rig.elapse(8.5)
        assert rig.hung == []
        rig.token(1)
        await rig.elapse(8.5)

        assert rig.hung == []


async def test_a_process_that_stood_still_blames_nobody() -> None:
    async with watching() as rig:
        rig.watchdog.submit(1, REQUEST)
        rig.answers = False
        await rig.elapse(8.0)
        for _ in range(5):
            rig.clock.advance(60.0)
            await rig.settle()
        assert rig.hung == []
        await rig.elapse(8.5)
        assert rig.hung == []

        assert await rig.noticed_s() <= NOTICED_WITHIN_S - 8.5


async def test_loading_an_adapter_may_take_its_time_but_only_once() -> None:
    async with watching() as rig:
        rig.engine.may_load.clear()
        rig.answers = False
        loads = [asyncio.create_task(rig.watchdog.load_adapter(ADAPTER))]
        for number in range(3):
            await rig.elapse(10.0)
            other = Adapter(name=f"adapters/{number}", path=None, digest="sha256:00")
            loads.append(asyncio.create_task(rig.watchdog.load_adapter(other)))
        assert rig.hung == []

        assert await rig.noticed_s() <= NOTICED_WITHIN_S
        for load in loads:
            load.cancel()


async def test_an_adapter_that_is_loaded_needs_no_time() -> None:
    async with watching() as rig:
        await rig.watchdog.load_adapter(ADAPTER)
        await rig.settle()
        rig.answers = False
        rig.engine.may_load.clear()
        load = asyncio.create_task(rig.watchdog.load_adapter(ADAPTER))

        assert await rig.noticed_s() <= NOTICED_WITHIN_S
        load.cancel()


async def test_an_engine_that_hangs_in_an_embedding_is_noticed() -> None:
    async with watching() as rig:
        rig.engine.may_embed.clear()
        embedding = asyncio.create_task(rig.watchdog.embed([[1, 2]]))
        await rig.elapse(60.0)
        assert rig.hung == [], "it answers"
        rig.answers = False

        assert await rig.noticed_s() <= NOTICED_WITHIN_S
        embedding.cancel()


async def test_the_canary_is_no_load() -> None:
    async with watching() as rig:
        rig.answers = False
        await rig.elapse(PATIENCE.canary_after_s)
        assert rig.engine.load().running == 1
        assert rig.watchdog.load().running == 0

        rig.engine.waiting = 3
        load = rig.watchdog.load()
        assert (load.running, load.waiting, load.waiting_tokens) == (1, 2, 28)


async def test_of_a_batch_with_a_canary_the_rest_is_told() -> None:
    async with watching() as rig:
        rig.watchdog.submit(1, REQUEST)
        rig.answers = False
        await rig.elapse(PATIENCE.canary_after_s)
        rig.engine.say(StepBatch(prefilled=[Prefilled(CANARY, 0)]))
        rig.engine.say(
            StepBatch(
                lanes=[1, CANARY],
                token_ids=[7, 5],
                prefilled=[Prefilled(1, 2)],
                ended=[Ended(CANARY, EndReason.MAX_TOKENS), Ended(1, EndReason.MAX_TOKENS)],
            )
        )
        await rig.settle()

        (batch,) = rig.batches
        assert [ended.lane for ended in batch.ended] == [1]
        assert [prefilled.lane for prefilled in batch.prefilled] == [1]
        assert batch.lanes[0] == 1


async def test_an_abort_that_does_not_end_is_no_proof_while_canaries_do() -> None:
    async with watching() as rig:
        rig.engine.hears_aborts = False
        rig.watchdog.submit(1, REQUEST)
        rig.watchdog.abort(1)
        await rig.elapse(PATIENCE.abort_within_s - 1.0)
        assert metrics.STUCK_OUTPUTS._value.get() == 0
        await rig.elapse(5 * PATIENCE.abort_within_s)
        assert metrics.STUCK_OUTPUTS._value.get() == 1
        assert rig.hung == []

        rig.engine.end(1, EndReason.ABORTED)
        await rig.settle()

        assert metrics.STUCK_OUTPUTS._value.get() == 0
        assert [ended.lane for batch in rig.batches for ended in batch.ended] == [1]


async def test_an_abort_that_does_not_end_is_looked_into_while_others_make_steps() -> None:
    """Their signs of life do not hide that the engine has lost one of them."""
    async with watching() as rig:
        rig.engine.hears_aborts = False
        rig.watchdog.submit(1, REQUEST)
        rig.watchdog.abort(1)
        for step in range(round(PATIENCE.abort_within_s) + 2):
            rig.engine.steps = step
            await rig.elapse(1.0)

        assert metrics.STUCK_OUTPUTS._value.get() == 1
        assert rig.canaries == 1


async def test_half_of_the_capacity_stuck_is_a_hung_engine() -> None:
    async with watching() as rig:
        rig.engine.hears_aborts = False
        for lane in range(1, CAPACITY // 2):
            rig.watchdog.submit(lane, REQUEST)
            rig.watchdog.abort(lane)
        await rig.elapse(3 * PATIENCE.abort_within_s)
        assert rig.hung == []
        rig.watchdog.submit(CAPACITY, REQUEST)
        rig.watchdog.abort(CAPACITY)

        assert await rig.noticed_s() <= PATIENCE.abort_within_s + 2.0


async def test_an_engine_that_fails_on_every_canary_is_broken() -> None:
    async with watching() as rig:
        rig.answers = False
        for failed in range(CANARIES_FAILED_MAX):
            assert not rig.hung, failed
            await rig.elapse(PATIENCE.canary_after_s + TICK_S)
            rig.engine.say(StepBatch(ended=[Ended(CANARY, EndReason.FAILED, message="why")]))
            await rig.settle()
            await rig.elapse(TICK_S)

        assert rig.hung == ["hung"]


async def test_of_a_dead_engine_its_consumer_hears() -> None:
    async with watching() as rig:
        rig.engine.die()
        await rig.elapse(60.0)

        assert rig.hung == []
        with pytest.raises(EngineDied):
            rig.watchdog.submit(1, REQUEST)
