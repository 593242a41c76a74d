"""An engine alone: the floor that the whole path is measured against.

    python -m tests.bench.bare ENGINE MODEL_PATH CAPACITY STREAMS TOKENS

Runs the load twice, the first to warm up, and prints the second as JSON.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

import uvloop

from libs.clock import SystemClock
from services.worker.engine.base import Engine, EngineRequest, Sampling
from services.worker.engine.llamacpp import LlamaCppEngine
from services.worker.engine.sim import FLAT_OUT, SimEngine
from services.worker.engine.sim_tokenizer import SimTokenizer
from tests.bench.measure import Measurement

PROMPT_IDS = tuple(range(300, 332))
THREADS = max(1, (os.cpu_count() or 1) - 1)


def make(engine: str, model: Path, capacity: int) -> Engine:
    """Makes the engine with the same settings as the suite's worker."""
    if engine == "sim":
        return SimEngine(
            SystemClock(),
            SimTokenizer(),
            capacity=capacity,
            context_length=32_768,
            kv_tokens=32_768 * capacity,
            costs=FLAT_OUT,
        )
    return LlamaCppEngine(model, capacity=capacity, context_length=None, threads=THREADS)


def request(seed: int, tokens: int) -> EngineRequest:
    """Makes one request of the load."""
    return EngineRequest(
        prompt_ids=PROMPT_IDS,
        max_output_tokens=tokens,
        ignore_eos=True,
        sampling=Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=seed),
    )


async def load(engine: Engine, streams: int, tokens: int, first_lane: int) -> Measurement:
    """Runs the streams at once."""
    started = time.perf_counter()
    for index in range(streams):
        engine.submit(first_lane + index, request(index, tokens))
    first: dict[int, float] = {}
    count = ended = 0
    while ended < streams:
        batch = await engine.next_step()
        now = time.perf_counter()
        if len(first) < streams:
            for lane in batch.lanes:
                first.setdefault(lane, now - started)
        count += len(batch.token_ids)
        ended += len(batch.ended)
    return Measurement(count, time.perf_counter() - started, statistics.median(first.values()))


async def main(arguments: list[str]) -> None:
    """Warms up, measures, prints."""
    name, model, capacity, streams, tokens = arguments
    engine = make(name, Path(model), int(capacity))
    await engine.start()
    try:
        await load(engine, int(streams), min(int(tokens), 64), 1)
        result = await load(engine, int(streams), int(tokens), 1_000_000)
    finally:
        await engine.stop()
    sys.stdout.write(result.to_json() + "\n")


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
