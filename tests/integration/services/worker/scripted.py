"""An engine that says what a test tells it to say. Fulfils services.worker.engine.base.Engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import (
    Adapter,
    AdapterUnusable,
    ConstraintKind,
    EmbeddingFailed,
    Ended,
    EndReason,
    EngineAbilities,
    EngineDied,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    Lane,
    StepBatch,
    Tell,
)

DIMENSIONS = 4
CAPACITY = 8
ALL_ABILITIES = EngineAbilities(
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
    embedding_dimensions=DIMENSIONS,
    prompt_cache=True,
)


class ScriptedEngine:
    """What it draws is said by `say`; an abort is answered at once.

    Attributes:
        requests: by lane, all that were submitted.
        running: lanes that have not ended.
        loaded: adapters, in the order of their loading.
        embedding: inputs of calls of `embed` that have not come back.
        may_embed: set while embeddings come back.
        refusal: why adapters cannot be loaded; empty when they can.
        may_load: set while adapters are loaded.
        hears_aborts: aborts are answered.
        steps: that it has done; None for one that does not count them.
        waiting: executions that it says wait.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        abilities: EngineAbilities = ALL_ABILITIES,
        context_length: int = 512,
    ) -> None:
        self.requests: dict[Lane, EngineRequest] = {}
        self.running: set[Lane] = set()
        self.loaded: list[Adapter] = []
        self.embedding: list[list[list[int]]] = []
        self.may_embed = asyncio.Event()
        self.may_embed.set()
        self.refusal = ""
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.hears_aborts = True
        self.steps: int | None = None
        self.waiting = 0
        self.is_dead = False
        self._info = EngineInfo(
            engine="scripted",
            version="1",
            context_length=context_length,
            max_running=CAPACITY,
            vocabulary_size=vocabulary_size,
            digest="",
            is_deterministic=True,
            abilities=abilities,
        )
        self._batches: asyncio.Queue[StepBatch | None] = asyncio.Queue()

    async def start(self, tell: Tell | None = None) -> EngineInfo:  # noqa: ARG002
        return self._info

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        if self.is_dead:
            raise EngineDied("it was told to")
        self.requests[lane] = request
        self.running.add(lane)

    def abort(self, lane: Lane) -> None:
        if self.hears_aborts:
            self.end(lane, EndReason.ABORTED)

    async def next_step(self) -> StepBatch:
        batch = await self._batches.get()
        if batch is None:
            raise EngineDied("it was told to")
        return batch

    def load(self) -> EngineLoad:
        return EngineLoad(
            running=len(self.running),
            waiting=self.waiting,
            waiting_tokens=10 * self.waiting,
            kv_used_tokens=0,
            kv_total_tokens=1,
            resident_adapters=tuple(adapter.name for adapter in self.loaded),
            steps=self.steps,
        )

    async def load_adapter(self, adapter: Adapter) -> None:
        await self.may_load.wait()
        if self.refusal:
            raise AdapterUnusable(self.refusal)
        if adapter not in self.loaded:
            self.loaded.append(adapter)

    async def embed(self, inputs: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        given = [list(ids) for ids in inputs]
        self.embedding.append(given)
        try:
            await self.may_embed.wait()
        finally:
            self.embedding.remove(given)
        if self.refusal:
            raise EmbeddingFailed(self.refusal)
        vectors = np.zeros((len(given), DIMENSIONS), dtype=np.float32)
        for row, ids in enumerate(given):
            vectors[row, sum(ids) % DIMENSIONS] = 1
        return vectors

    async def stop(self) -> None:
        return

    # What tests say.

    def say(self, batch: StepBatch) -> None:
        """A step gave this."""
        self._batches.put_nowait(batch)

    def end(self, lane: Lane, reason: EndReason = EndReason.END_OF_SEQUENCE) -> None:
        """An execution is over, unless it was."""
        if lane in self.running:
            self.running.remove(lane)
            self.say(StepBatch(ended=[Ended(lane, reason)]))

    def die(self) -> None:
        """It is gone."""
        self.is_dead = True
        self._batches.put_nowait(None)
