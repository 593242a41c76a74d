"""An engine alone, in a process of its own: the floor of everything around it.

    python -m tests.bench.bare SPEC

SPEC is the JSON of `Spec`. Runs the load once to warm up and once for its figures, and prints them
as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from libs.clock import SystemClock
from services.worker.config import SimSection
from services.worker.engine.base import Engine, EngineRequest, Sampling
from services.worker.engine.llamacpp import LlamaCppEngine
from services.worker.engine.sim import SimCosts, SimEngine
from services.worker.engine.sim_tokenizer import SimTokenizer
from tests.bench.load import PROMPT_TOKENS, Load, Result
from tests.bench.measure import arrivals
from tests.bench.targets import ROOT, BenchError

THREADS = max(1, (os.cpu_count() or 1) - 1)
"""Those of the suite's worker, whose default this is."""
TIMEOUT_S = 300.0
WARM_TOKENS = 32
_PROMPT_IDS = tuple(range(300, 300 + PROMPT_TOKENS))
_ENDLESS_TOKENS = 8000
_CONTEXT_LENGTH = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Which engine, and what it does.

    Attributes:
        model: GGUF file of the CPU engine; None for the simulated one.
        capacity: executions at the same time.
        step_s: fixed time of a simulated step; None for the simulated GPU's usual costs.
        load: "streams" or "arrivals".
    """

    model: str | None
    capacity: int
    step_s: float | None
    load: Load


def measure(spec: Spec) -> Result:
    """Runs an engine in a process of its own.

    Raises:
        BenchError: it failed; what it said is on the error output.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.bare", json.dumps(asdict(spec))],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode != 0:
        raise BenchError(f"the bare engine ended with {done.returncode}")
    return Result.from_json(done.stdout)


def make(spec: Spec) -> Engine:
    """Makes the engine with the same settings as the suite's worker."""
    if spec.model is not None:
        return LlamaCppEngine(
            Path(spec.model), capacity=spec.capacity, context_length=None, threads=THREADS
        )
    usual = SimSection()
    costs = SimCosts(
        prefill_tokens_per_s=usual.prefill_tokens_per_s,
        prefill_chunk_tokens=usual.prefill_chunk_tokens,
        decode_base_s=usual.decode_base,
        decode_per_lane_s=usual.decode_per_lane,
    )
    if spec.step_s is not None:
        costs = SimCosts(
            prefill_tokens_per_s=0,
            prefill_chunk_tokens=1 << 20,
            decode_base_s=spec.step_s,
            decode_per_lane_s=0,
        )
    return SimEngine(
        SystemClock(),
        SimTokenizer(),
        capacity=spec.capacity,
        context_length=_CONTEXT_LENGTH,
        kv_tokens=_CONTEXT_LENGTH * spec.capacity,
        costs=costs,
    )


class Driver:
    """Submits executions and notes what comes, in the place of everything around an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lanes = 0
        self._submitted_s: dict[int, float] = {}
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self.first_token_s: dict[int, float] = {}
        self.tokens = 0
        self.steps = 0

    def submit(self, seed: int, tokens: int) -> int:
        """Queues an execution; returns its lane."""
        self._lanes += 1
        lane = self._lanes
        self._waiting[lane] = asyncio.get_running_loop().create_future()
        self._submitted_s[lane] = time.perf_counter()
        sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=seed)
        request = EngineRequest(
            prompt_ids=_PROMPT_IDS, max_output_tokens=tokens, ignore_eos=True, sampling=sampling
        )
        self._engine.submit(lane, request)
        return lane

    async def ended(self, lane: int) -> None:
        """Waits for the end of an execution."""
        await self._waiting[lane]

    async def pump(self) -> None:
        """Takes every step of the engine."""
        while True:
            batch = await self._engine.next_step()
            if self._submitted_s and batch.lanes:
                self._note_first(batch.lanes)
            self.tokens += len(batch.token_ids)
            self.steps += 1
            for ended in batch.ended:
                self._waiting[ended.lane].set_result(None)

    def _note_first(self, lanes: list[int]) -> None:
        now_s = time.perf_counter()
        for lane in lanes:
            submitted_s = self._submitted_s.pop(lane, None)
            if submitted_s is not None:
                self.first_token_s[lane] = now_s - submitted_s


async def run(driver: Driver, load: Load) -> Result:
    """Runs a load."""
    kinds = {"streams": _streams, "arrivals": _arrivals}
    before = driver.tokens, driver.steps
    started_s = time.perf_counter()
    lanes = await kinds[load.kind](driver, load)
    return Result(
        tokens=driver.tokens - before[0],
        frames=driver.steps - before[1],
        seconds=time.perf_counter() - started_s,
        first_token_s=[driver.first_token_s[lane] for lane in lanes],
    )


async def _streams(driver: Driver, load: Load) -> list[int]:
    lanes = [driver.submit(index, load.tokens) for index in range(load.count)]
    for lane in lanes:
        await driver.ended(lane)
    return lanes


async def _arrivals(driver: Driver, load: Load) -> list[int]:
    for index in range(load.count):
        driver.submit(index, _ENDLESS_TOKENS)
    if load.count:
        await asyncio.sleep(1.0)
    started_s = time.perf_counter()
    lanes = []
    for index, moment_s in enumerate(arrivals(load.requests, load.per_s, load.seed)):
        await asyncio.sleep(started_s + moment_s - time.perf_counter())
        lanes.append(driver.submit(index, load.tokens))
    for lane in lanes:
        await driver.ended(lane)
    return lanes


async def main(spec: Spec) -> None:
    """Warms up, measures, prints."""
    engine = make(spec)
    await engine.start()
    driver = Driver(engine)
    try:
        async with asyncio.TaskGroup() as group:
            pump = group.create_task(driver.pump())
            count = max(1, min(spec.load.count, spec.capacity))
            tokens = min(spec.load.tokens, WARM_TOKENS)
            await run(driver, Load(kind="streams", count=count, tokens=tokens))
            result = await run(driver, spec.load)
            pump.cancel()
    finally:
        await engine.stop()
    sys.stdout.write(f"{result.to_json()}\n")


if __name__ == "__main__":
    found = json.loads(sys.argv[1])
    uvloop.run(main(Spec(**(found | {"load": Load(**found["load"])}))))
