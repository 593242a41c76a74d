"""A worker process whose engine falls silent as soon as it serves, and hangs when it is stopped.

It also leaves threads behind that never end: Python would wait for them at its exit. With a
configured capacity of 1 it does not even start, and cannot be kept from trying.

python -m tests.integration.services.worker.hanging_worker --config worker.toml
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from unittest.mock import patch

from typing_extensions import override

from libs import process
from libs.clock import Clock
from services.worker.__main__ import main
from services.worker.adapters import AdapterForm
from services.worker.config import Config, WorkerSection
from services.worker.engine.base import (
    EndReason,
    EngineInfo,
    EngineRequest,
    Lane,
    LoadProgress,
    LoadStage,
    Tell,
)
from services.worker.engine.sim_tokenizer import SimTokenizer
from services.worker.engines import Equipment
from tests.integration.services.worker.scripted import ScriptedEngine


def hang() -> None:
    """Waits for ever."""
    threading.Event().wait()


class HangingEngine(ScriptedEngine):
    """Answers as long as the worker loads, or not at all."""

    def __init__(self, vocabulary_size: int, *, starts: bool) -> None:
        super().__init__(vocabulary_size)
        self._starts = starts
        # To what a worker asks before it serves.
        self._answers = 2

    @override
    async def start(self, tell: Tell | None = None) -> EngineInfo:
        if tell is not None:
            tell(LoadProgress(LoadStage.LOADING))
        while not self._starts:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        threading.Thread(target=hang).start()
        self.hanging = asyncio.get_running_loop().run_in_executor(None, hang)
        return await super().start(tell)

    @override
    def submit(self, lane: Lane, request: EngineRequest) -> None:
        self._answers -= 1
        super().submit(lane, request)
        if self._answers >= 0:
            self.end(lane, EndReason.MAX_TOKENS)

    @override
    async def stop(self) -> None:
        await asyncio.Event().wait()


def make_equipment(config: WorkerSection, _: Clock) -> Equipment:
    """Makes it instead of the engine that the configuration names."""
    tokenizer = SimTokenizer()
    engine = HangingEngine(tokenizer.vocabulary_size, starts=config.capacity != 1)
    return Equipment(
        engine=engine, tokenizer=tokenizer, bos_id=None, reads_adapters=AdapterForm.NONE
    )


if __name__ == "__main__":
    # No configuration asks for an engine that hangs.
    with patch("services.worker.loading.make_equipment", make_equipment):
        process.run(Config, main)
