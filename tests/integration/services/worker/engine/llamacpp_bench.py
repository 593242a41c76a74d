"""A llamacpp engine on the small model, and what it told, for tests of single requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from services.worker.engine.base import (
    Ended,
    EngineRequest,
    PromptScores,
    Sampling,
    StepBatch,
)
from services.worker.engine.llamacpp import LlamaCppEngine
from services.worker.engine.llamacpp_tokenizer import LlamaCppTokenizer
from services.worker.engine.wire import Kind

MODEL = Path(__file__).parents[5] / "services" / "worker" / "models" / "maas-tiny-story.gguf"
CAPACITY = 4
CONTEXT = 400
PATIENCE_S = 30.0
# llama.cpp rounds activations to eight bits, numpy does not.
TOLERANCE = 0.3

TOKENIZER = LlamaCppTokenizer(MODEL)
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, seed=0)
DRAWN = Sampling(temperature=1, top_p=0.95, top_k=0, seed=12345)
STORY = tuple(
    TOKENIZER.encode(
        "Once upon a time there was a little fox who lived in the snow. One day",
        parse_special=False,
    )
)


def text_of(ids: list[int]) -> str:
    return b"".join(TOKENIZER.token_bytes(token_id) for token_id in ids).decode()


def ask(tokens: int = 12, sampling: Sampling = GREEDY, **fields: object) -> EngineRequest:
    request = EngineRequest(
        prompt_ids=STORY, max_output_tokens=tokens, ignore_eos=True, sampling=sampling
    )
    return replace(request, **fields)  # type: ignore[arg-type]


@dataclass
class Told:
    """What an engine told about one lane."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[dict[int, float]] = field(default_factory=list)
    prompt: list[PromptScores] = field(default_factory=list)
    cached: int | None = None
    ended: Ended | None = None


@dataclass
class Bench:
    """An engine, and what it told."""

    engine: LlamaCppEngine
    told: dict[int, Told] = field(default_factory=lambda: defaultdict(Told))
    order: list[int] = field(default_factory=list)
    lanes: int = 0

    def submit(self, request: EngineRequest) -> int:
        self.lanes += 1
        self.engine.submit(self.lanes, request)
        return self.lanes

    async def step(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            self.take(await self.engine.next_step())

    def take(self, batch: StepBatch) -> None:
        for prefilled in batch.prefilled:
            self.told[prefilled.lane].cached = prefilled.cached_tokens
            self.order.append(prefilled.lane)
        for part in batch.prompt_scores:
            self.told[part.lane].prompt.append(part)
        for row, (lane, token_id) in enumerate(zip(batch.lanes, batch.token_ids, strict=True)):
            self.told[lane].ids.append(token_id)
            if batch.scores is not None:
                self.told[lane].logprobs.append(batch.scores.logprobs[row])
                count = batch.scores.top_count
                places = slice(row * count, (row + 1) * count)
                ids = batch.scores.top_token_ids[places]
                tops = batch.scores.top_logprobs[places]
                self.told[lane].tops.append(
                    {top: value for top, value in zip(ids, tops, strict=True) if top >= 0}
                )
        for ended in batch.ended:
            self.told[ended.lane].ended = ended

    async def run(self, *requests: EngineRequest) -> list[Told]:
        lanes = [self.submit(request) for request in requests]
        while any(self.told[lane].ended is None for lane in lanes):
            await self.step()
        return [self.told[lane] for lane in lanes]


class RecordingEngine(LlamaCppEngine):
    """Remembers in which order the child answers, however late this process gets to read it."""

    kinds: ClassVar[list[Kind]] = []

    @override
    def on_frame(self, kind: Kind, body: bytes) -> None:
        self.kinds.append(kind)
        super().on_frame(kind, body)


@contextlib.asynccontextmanager
async def running_bench() -> AsyncIterator[Bench]:
    """An engine that runs until the block is left."""
    engine = RecordingEngine(MODEL, capacity=CAPACITY, context_length=CONTEXT, threads=1)
    await engine.start()
    yield Bench(engine)
    await engine.stop()
