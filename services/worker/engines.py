"""Which engine a configuration asks for, made, started and proved to work."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from libs.clock import Clock
from services.worker.config import WorkerSection
from services.worker.engine.base import (
    EndReason,
    Engine,
    EngineDied,
    EngineInfo,
    EngineRequest,
    EngineStartError,
    Sampling,
    Tokenizer,
)
from services.worker.engine.sim import SimCosts, SimEngine
from services.worker.engine.sim_tokenizer import SimTokenizer

SIM_CAPACITY = 256
SIM_CONTEXT_LENGTH = 8192
LLAMACPP_CAPACITY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Equipment:
    """An engine that has not started, and its vocabulary.

    Attributes:
        engine: to start.
        tokenizer: of its model.
        bos_id: token that every prompt begins with; None for none.
        reads_adapters: the engine needs the files of adapters.
    """

    engine: Engine
    tokenizer: Tokenizer
    bos_id: int | None
    reads_adapters: bool

    async def start(self, probe_within_s: float) -> EngineInfo:
        """Starts the engine and lets it draw a token.

        Raises:
            EngineStartError: with what to do about it.
        """
        info = await self.engine.start()
        await probe(self.engine, probe_within_s)
        return info


def make_equipment(config: WorkerSection, clock: Clock) -> Equipment:
    """Makes what the configuration asks for. Reads the model's vocabulary: blocks.

    Raises:
        EngineStartError: the model cannot be read.
    """
    match config.engine:
        case "sim":
            return _sim(config, clock)
        case "llamacpp":
            return _llamacpp(config)


def _sim(config: WorkerSection, clock: Clock) -> Equipment:
    tokenizer = SimTokenizer()
    capacity = config.capacity or SIM_CAPACITY
    context_length = config.context_length or SIM_CONTEXT_LENGTH
    costs = SimCosts(
        prefill_tokens_per_s=config.sim.prefill_tokens_per_s,
        prefill_chunk_tokens=config.sim.prefill_chunk_tokens,
        decode_base_s=config.sim.decode_base,
        decode_per_lane_s=config.sim.decode_per_lane,
        mean_output_tokens=config.sim.mean_output_tokens,
        adapter_load_s=config.sim.adapter_load,
        adapters=config.sim.adapters,
    )
    engine = SimEngine(
        clock,
        tokenizer,
        capacity=capacity,
        context_length=context_length,
        kv_tokens=config.sim.kv_tokens or capacity * context_length,
        costs=costs,
    )
    return Equipment(engine=engine, tokenizer=tokenizer, bos_id=None, reads_adapters=False)


def _llamacpp(config: WorkerSection) -> Equipment:
    # Here, because the sim engine has to run where llama.cpp's library does not.
    from services.worker.engine.llamacpp import LlamaCppEngine  # noqa: PLC0415
    from services.worker.engine.llamacpp_tokenizer import LlamaCppTokenizer  # noqa: PLC0415

    assert config.model_path is not None
    tokenizer = LlamaCppTokenizer(config.model_path)
    engine = LlamaCppEngine(
        config.model_path,
        capacity=config.capacity or LLAMACPP_CAPACITY,
        context_length=config.context_length,
        threads=config.threads or _default_threads(),
    )
    bos_id = tokenizer.bos_id if tokenizer.adds_bos else None
    return Equipment(engine=engine, tokenizer=tokenizer, bos_id=bos_id, reads_adapters=True)


def _default_threads() -> int:
    """One for each core but one, which is left to everybody else.

    llama.cpp's threads wait for each other by spinning: with as many as there are cores, any other
    process makes all of them several times slower.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores - 1)


async def probe(engine: Engine, within_s: float) -> None:
    """Lets a started engine draw one token: a port that answers proves nothing.

    Raises:
        EngineStartError: it did not, or not in time.
    """
    request = EngineRequest(
        prompt_ids=(0,),
        max_output_tokens=1,
        ignore_eos=True,
        sampling=Sampling(temperature=0, top_p=1, top_k=0, seed=0),
    )
    try:
        engine.submit(0, request)
        async with asyncio.timeout(within_s):
            while not (batch := await engine.next_step()).ended:
                pass
    except TimeoutError:
        raise EngineStartError(f"the engine drew no token within {within_s:g} s") from None
    except EngineDied as error:
        raise EngineStartError(f"the engine died at its first token: {error}") from error
    if batch.ended[0].reason is not EndReason.MAX_TOKENS:
        raise EngineStartError(f"the engine's first token failed: {batch.ended[0].message}")
