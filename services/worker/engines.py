"""Which engine a configuration asks for, made; and the proof that a started one works."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from libs.clock import Clock
from services.worker.adapters import AdapterForm, Check
from services.worker.config import WorkerSection
from services.worker.engine.base import (
    EndReason,
    Engine,
    EngineDied,
    EngineRequest,
    EngineStartError,
    Sampling,
    Tokenizer,
)
from services.worker.engine.file_digest import require_digest
from services.worker.engine.sim import SimCosts, SimEngine
from services.worker.engine.sim_tokenizer import SimTokenizer

SIM_CONTEXT_LENGTH = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Equipment:
    """An engine that has not started, and its vocabulary.

    Attributes:
        engine: to start.
        tokenizer: of its model.
        bos_id: token that every prompt begins with; None for none.
        reads_adapters: what the engine needs of adapters.
        check_adapter: sees that an adapter fits the model, before the engine sees it; None for an
            engine that sees to it itself.
    """

    engine: Engine
    tokenizer: Tokenizer
    bos_id: int | None
    reads_adapters: AdapterForm
    check_adapter: Check | None = None


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
        case "trtllm":
            return _trtllm(config)


def _sim(config: WorkerSection, clock: Clock) -> Equipment:
    tokenizer = SimTokenizer()
    capacity = config.places
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
    return Equipment(
        engine=engine, tokenizer=tokenizer, bos_id=None, reads_adapters=AdapterForm.NONE
    )


def _llamacpp(config: WorkerSection) -> Equipment:
    # Here, because the sim engine has to run where llama.cpp's library does not.
    from services.worker.engine.llamacpp import LlamaCppEngine  # noqa: PLC0415
    from services.worker.engine.llamacpp_tokenizer import LlamaCppTokenizer  # noqa: PLC0415

    assert config.model_path is not None
    if config.digest is not None:
        # The engine sees to it again in its process; here, since the tokenizer is llama.cpp's, too.
        require_digest(config.model_path, config.digest)
    tokenizer = LlamaCppTokenizer(config.model_path)
    engine = LlamaCppEngine(
        config.model_path,
        capacity=config.places,
        context_length=config.context_length,
        threads=config.threads or _default_threads(),
        expected_digest=config.digest,
    )
    bos_id = tokenizer.bos_id if tokenizer.adds_bos else None
    return Equipment(
        engine=engine, tokenizer=tokenizer, bos_id=bos_id, reads_adapters=AdapterForm.FILE
    )


def _trtllm(config: WorkerSection) -> Equipment:
    # Here, because the other engines have to run where the tokenizers library is not installed.
    from services.worker.engine.hf_adapter import AdapterLimits, check_adapter  # noqa: PLC0415
    from services.worker.engine.hf_model import read_model  # noqa: PLC0415
    from services.worker.engine.hf_tokenizer import HfTokenizer  # noqa: PLC0415
    from services.worker.engine.trtllm import TrtllmEngine  # noqa: PLC0415

    assert config.model_path is not None
    section, wanted = config.trtllm, config.context_length
    model = read_model(config.model_path)
    tokenizer = HfTokenizer(config.model_path)
    engine = TrtllmEngine(
        {
            "model_path": str(config.model_path),
            "capacity": config.places,
            "context_length": None if wanted is None else model.context_within(wanted),
            "expected_digest": config.digest,
            "trtllm": section.model_dump(mode="json"),
        },
        interpreter=section.python,
        start_timeout_s=section.load_within,
    )
    limits = AdapterLimits(
        max_rank=section.lora.max_rank, target_modules=frozenset(section.lora.target_modules)
    )
    return Equipment(
        engine=engine,
        tokenizer=tokenizer,
        bos_id=tokenizer.bos_id if tokenizer.adds_bos else None,
        reads_adapters=AdapterForm.DIRECTORY,
        check_adapter=lambda directory: check_adapter(directory, model, limits),
    )


def _default_threads() -> int:
    """One for each core but one, which is left to everybody else.

    llama.cpp's threads wait for each other by spinning: with as many as there are cores, any other
    process makes all of them several times slower.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores - 1)


async def probe(engine: Engine, within_s: float, prompt_tokens: int = 1) -> None:
    """Lets a started engine draw one token: a port that answers proves nothing.

    Args:
        engine: that nothing else asks.
        within_s: longest time that it may take.
        prompt_tokens: before the one that is drawn.

    Raises:
        EngineStartError: it did not, or not in time.
    """
    request = EngineRequest(
        prompt_ids=(0,) * prompt_tokens,
        max_output_tokens=1,
        ignore_eos=True,
        sampling=Sampling(temperature=0, top_p=1, top_k=0, seed=0),
        # TensorRT-LLM's ranks send each other bare requests of one token to keep in step.
        cache_salt=b"probe",
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
