"""From a configuration to an engine that has drawn a token, and the model's text beside it.

It may take minutes. The event loop is free all the while, so that the scheduler hears how far it
is, and a signal ends it.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from libs.clock import Clock
from libs.process import StartError
from services.worker import metrics
from services.worker.adapters import Adapters
from services.worker.config import WorkerSection
from services.worker.engine.base import (
    Engine,
    EngineInfo,
    EngineStartError,
    LoadProgress,
    LoadStage,
    Tell,
)
from services.worker.engines import make_equipment, probe
from services.worker.model import Model, TextSettings, make_model, read_template
from services.worker.watchdog import Patience, Watchdog

# Prompt tokens of the step that is measured: as many as llamacpp takes in one.
STEP_TOKENS = 128
# How many times as long as that step an engine may be silent: others want the cores, too.
STEPS_PATIENCE = 3

log = structlog.get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What serves.

    Attributes:
        engine: has drawn its first token; its watchdog has to run.
        info: of it.
        adapters: of the model.
        model: its text.
    """

    engine: Watchdog
    info: EngineInfo
    adapters: Adapters
    model: Model


async def load(
    worker: WorkerSection, clock: Clock, stack: AsyncExitStack, tell: Tell
) -> LoadedModel:
    """Loads what the configuration asks for.

    Args:
        worker: the configuration.
        clock: for engines that simulate time, and for templates.
        stack: ends the engine.
        tell: hears how far it is.

    Raises:
        StartError: with what to do about it.
    """
    show = _Shown(tell)
    show(LoadProgress(LoadStage.CHECKING))
    try:
        # Reads the vocabulary, up to seconds for a large one.
        threads = stack.enter_context(thread("loading"))
        loop = asyncio.get_running_loop()
        equipment = await loop.run_in_executor(threads, make_equipment, worker, clock)
        engine = equipment.engine
        stack.push_async_callback(engine.stop)
        info = await engine.start(show)
        _require_digest(worker.digest, info)
        show(LoadProgress(LoadStage.WARMING))
        await probe(engine, worker.probe_within)
        step_s = await _measure_step(engine, info, worker.probe_within, clock)
        watchdog = Watchdog(engine, info, patience_of(worker, step_s), clock)
        adapters = Adapters(
            watchdog,
            worker.adapters_dir,
            form=equipment.reads_adapters,
            check=equipment.check_adapter,
            threads=stack.enter_context(thread("adapters")),
            load_within_s=worker.adapter_within,
        )
        model = make_model(
            equipment.tokenizer,
            info,
            TextSettings(
                chat_template=read_template(worker.chat_template),
                tool_parser=worker.tool_parser,
                reasoning_parser=worker.reasoning_parser,
                disabled=worker.disabled,
            ),
            bos_id=equipment.bos_id,
            has_adapters=adapters.is_there,
            now=clock.now,
        )
    except EngineStartError as error:
        raise StartError(str(error)) from error
    metrics.show_load_stage(None)
    return LoadedModel(engine=watchdog, info=info, adapters=adapters, model=model)


def _require_digest(expected: str | None, info: EngineInfo) -> None:
    """Sees that the weights are those that are wanted, should an engine not have seen to it."""
    if expected is not None and info.digest != expected:
        raise EngineStartError(
            f"the engine has loaded weights with digest {info.digest or '(none)'}, and {expected}"
            " is expected: correct worker.model_path, worker.digest or worker.model_version"
        )


async def _measure_step(engine: Engine, info: EngineInfo, within_s: float, clock: Clock) -> float:
    """Measures about the longest step of an engine that cuts prompts: seconds."""
    start_s = clock.monotonic_s()
    await probe(engine, within_s, max(1, min(STEP_TOKENS, info.context_length - 1)))
    return clock.monotonic_s() - start_s


def patience_of(worker: WorkerSection, step_s: float) -> Patience:
    """Says how long an engine may be silent.

    Args:
        worker: what is configured.
        step_s: about the longest step, as measured. A large model on a few slow cores takes seconds
            for it, and is slow, not dead: it gets several times as long, whatever is configured.
    """
    needed_s = worker.canary_every + STEPS_PATIENCE * step_s
    if needed_s > worker.silent_within:
        log.warning(
            "slow engine: one that hangs is noticed later",
            step_s=round(step_s, 1),
            silent_within_s=round(needed_s, 1),
            configured_s=worker.silent_within,
        )
    return Patience(
        canary_after_s=worker.canary_every,
        silent_within_s=max(worker.silent_within, needed_s),
        abort_within_s=worker.abort_within,
        adapter_within_s=worker.adapter_within,
    )


@contextmanager
def thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """Gives a thread; what still waits for it at the end is dropped."""
    threads = ThreadPoolExecutor(1, name)
    try:
        yield threads
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


async def unless_stopped(
    work: Coroutine[Any, Any, T],
    on_stopped: Callable[[], None],
    on_stopped_later: Callable[[], None],
) -> T | None:
    """Does something that SIGTERM and SIGINT end; returns None when one did.

    Args:
        work: what is done; cancelled by the signals.
        on_stopped: called before that, since work may take its time to end.
        on_stopped_later: called for a signal that comes when the work is done, until somebody else
            waits for signals: none is lost in between.
    """
    stopped, is_done = asyncio.Event(), False

    def hear() -> None:
        # One handler for both: a signal that has come may not have been heard yet.
        if is_done:
            on_stopped_later()
        stopped.set()

    # First, so that the signals are waited for before anything is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, hear)
    stopping = asyncio.create_task(stopped.wait(), name="stop signal")
    doing = asyncio.create_task(work, name="loading")
    try:
        await asyncio.wait([doing, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not stopped.is_set():
            is_done = True
            return doing.result()
        log.info("stopped while loading")
        on_stopped()
        return None
    finally:
        doing.cancel()
        stopping.cancel()
        await asyncio.wait([doing, stopping])


class _Shown:
    """Shows progress to the operator and passes it on."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._stage: LoadStage | None = None

    def __call__(self, progress: LoadProgress) -> None:
        if progress.stage is not self._stage:
            self._stage = progress.stage
            metrics.show_load_stage(progress.stage)
            log.info("loading", stage=progress.stage.value)
        self._tell(progress)
