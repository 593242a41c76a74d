"""Starts TensorRT-LLM: checks the model, loads it, draws a first token.

The constructor of LLM blocks for minutes, so it has a thread of its own. tensorrt_llm itself is
imported on the main thread, since it starts MPI and looks after signals.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Final, TypeVar

from services.worker.engine.base import (
    EngineInfo,
    EngineStartError,
    LoadProgress,
    LoadStage,
)
from services.worker.engine.hf_adapter import AdapterLimits
from services.worker.engine.hf_digest import digest_of
from services.worker.engine.hf_model import HfModel, read_model
from services.worker.engine.trtllm_abilities import abilities_of, backend_of
from services.worker.engine.trtllm_api import Llm
from services.worker.engine.trtllm_arguments import check_launch, llm_arguments
from services.worker.engine.trtllm_monitor import BEAT_S, Monitor, engine_processes
from services.worker.engine.trtllm_requests import Guides, Requests, Shelf, ends_of, find_torch
from services.worker.engine.trtllm_settings import TrtllmSettings, read_settings
from services.worker.engine.trtllm_surface import Surface, detect
from services.worker.engine.wire import VERSION
from services.worker.engine.wire_facts import Setting

T = TypeVar("T")
Tell = Callable[[LoadProgress], None]

_TELL_EVERY_S: Final = 1.0
_TELL_STEP: Final = 0.02
_ERROR_SHOWN: Final = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An engine that has drawn its first token.

    Attributes:
        info: of it.
        settings: of the worker.
        surface: of the installed version.
        llm: the engine.
        model: that it runs.
        requests: starts executions.
        guides: compiles constraints.
        shelf: has the adapters.
        monitor: watches it.
    """

    info: EngineInfo
    settings: TrtllmSettings
    surface: Surface
    llm: Llm
    model: HfModel
    requests: Requests
    guides: Guides
    shelf: Shelf
    monitor: Monitor


async def load(told: dict[str, Setting], tell: Tell) -> Loaded:
    """Starts an engine; see above.

    Args:
        told: by the worker.
        tell: hears how far it is, on the event loop.

    Raises:
        EngineStartError: with what to do about it.
    """
    if told.get("wire") != VERSION:
        raise EngineStartError("the engine's files changed since this worker started: restart it")
    settings = read_settings(told)
    check_launch(settings, os.environ)  # noqa: TID251 - what the launcher has set
    tell(LoadProgress(LoadStage.CHECKING))
    model = await asyncio.to_thread(read_model, settings.model_path)
    digesting = asyncio.ensure_future(_digest(settings, tell))
    if settings.expected_digest is not None:
        # Before anything else reads it.
        _compare(await digesting, settings.expected_digest)
    surface = detect()
    # Where the worker's own output goes; what differs between versions is asked for first.
    sys.stdout.write(f"{surface.describe()}\n")
    sys.stdout.flush()
    tell(LoadProgress(LoadStage.LOADING))
    llm = await _telling(
        asyncio.to_thread(_construct, told, surface), tell, LoadProgress(LoadStage.LOADING)
    )
    monitor = Monitor(llm)
    monitor.start(engine_processes(os.getpid()))
    loaded = _equip(llm, surface, settings, model, monitor, await digesting)
    warming = LoadProgress(LoadStage.WARMING)
    tell(warming)
    await _telling(_warm(loaded), tell, warming)
    _keep_beating(monitor)
    return loaded


async def _digest(settings: TrtllmSettings, tell: Tell) -> str:
    """The digest of the model; where nobody waits for it, it is taken while the model loads."""
    loop = asyncio.get_running_loop()
    is_awaited = settings.expected_digest is not None
    said = 0.0

    def hear(fraction: float) -> None:
        nonlocal said
        if is_awaited and fraction - said >= _TELL_STEP:
            said = fraction
            progress = LoadProgress(LoadStage.CHECKING, fraction)
            loop.call_soon_threadsafe(tell, progress)

    return await asyncio.to_thread(digest_of, settings.model_path, hear)


def _compare(found: str, expected: str) -> None:
    if found != expected:
        raise EngineStartError(
            f"the model has the digest {found}, but {expected} is expected: it is another model, "
            "or its files are damaged"
        )


async def _telling(work: Coroutine[None, None, T], tell: Tell, progress: LoadProgress) -> T:
    """Waits for work and says about every second that it goes on."""
    task = asyncio.ensure_future(work)
    while True:
        done, _ = await asyncio.wait([task], timeout=_TELL_EVERY_S)
        if done:
            return task.result()
        tell(progress)


def _construct(told: dict[str, Setting], surface: Surface) -> Llm:
    arguments = llm_arguments(told, surface)
    try:
        return surface.llm(**arguments)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"[:_ERROR_SHOWN]
        raise EngineStartError(
            f"TensorRT-LLM cannot load the model ({why}): its output above says more"
        ) from error


def _keep_beating(monitor: Monitor) -> None:
    """Lets the monitor see that the event loop turns: what blocks it from here on is a fault."""
    loop = asyncio.get_running_loop()

    def beat() -> None:
        monitor.beat()
        loop.call_later(BEAT_S, beat)

    beat()


def _equip(
    llm: Llm,
    surface: Surface,
    settings: TrtllmSettings,
    model: HfModel,
    monitor: Monitor,
    digest: str,
) -> Loaded:
    torch = find_torch()
    abilities = abilities_of(
        settings, surface, has_tensors=torch is not None, end_count=len(model.eos_ids)
    )
    guides = Guides(surface, backend_of(settings))
    lora = settings.values("lora")
    adapted = AdapterLimits(
        max_rank=lora.integer("max_rank"), target_modules=frozenset(lora.texts("target_modules"))
    )
    shelf = Shelf(
        surface,
        model,
        adapted if lora.flag("enabled") else None,
        most=lora.integer("max_cpu_loras"),
    )
    requests = Requests(
        llm,
        surface,
        ends=ends_of(model.eos_ids, model.eos_id),
        vocabulary_size=model.vocabulary_size,
        guides=guides,
        shelf=shelf,
        torch=torch if abilities.logit_bias else None,
    )
    info = EngineInfo(
        engine="trtllm",
        version=f"tensorrt_llm {surface.version}",
        context_length=model.context_within(settings.context_length),
        max_running=settings.capacity,
        vocabulary_size=model.vocabulary_size,
        digest=digest,
        # Its kernels add up in another order in other company, and versions differ in their seeds.
        is_deterministic=False,
        abilities=abilities,
    )
    return Loaded(
        info=info,
        settings=settings,
        surface=surface,
        llm=llm,
        model=model,
        requests=requests,
        guides=guides,
        shelf=shelf,
        monitor=monitor,
    )


async def _warm(loaded: Loaded) -> None:
    """Draws a token.

    With a salt: a bare request of one token looks like those that ranks send each other to keep in
    step, and has brought them out of it.
    """
    model = loaded.model
    token_id = next(number for number in itertools.count(1) if number not in model.eos_ids)
    keywords: dict[str, object] = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 1}
    sampling = loaded.surface.sampling.make(**keywords, seed=0, detokenize=False)
    try:
        result = loaded.llm.generate_async(
            inputs=[token_id],
            sampling_params=sampling,
            streaming=True,
            cache_salt=secrets.token_hex(16),
        )
        async for _ in result:
            pass
    except Exception as error:
        why = f"{type(error).__name__}: {error}"[:_ERROR_SHOWN]
        raise EngineStartError(f"TensorRT-LLM cannot draw a first token ({why})") from error
