"""The engines of the contract, and what its tests need. A new engine is a new row of `ENGINES`."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from libs.clock import SystemClock
from services.worker.engine.base import (
    Adapter,
    Ended,
    Engine,
    EngineInfo,
    EngineRequest,
    Lane,
    PromptScores,
    Sampling,
    StepBatch,
    Tokenizer,
    TokenScores,
)
from services.worker.engine.sim import FLAT_OUT, SimEngine
from services.worker.engine.sim_tokenizer import SimTokenizer
from tests.integration.services.worker.engine.llamacpp_reference import Reference, write_adapter

MODEL = Path(__file__).parents[5] / "services" / "worker" / "models" / "maas-tiny-story.gguf"
CAPACITY = 3
CONTEXT_LENGTH = 128
PATIENCE_S = 20.0

GREEDY = Sampling(temperature=0, top_p=1, top_k=0, seed=0)
PROMPT = (72, 101, 108, 108, 111)


def make_sim() -> Engine:
    return SimEngine(
        SystemClock(),
        SimTokenizer(),
        capacity=CAPACITY,
        context_length=CONTEXT_LENGTH,
        kv_tokens=CAPACITY * CONTEXT_LENGTH,
        # Its model ends by itself; most tests ignore it.
        costs=replace(FLAT_OUT, mean_output_tokens=20),
    )


def adapter_for_sim(_folder: Path, number: int) -> Adapter:
    return Adapter(name=f"adapters/a{number}", path=None, digest=_digest(b"%d" % number))


def unusable_for_sim(_folder: Path) -> Adapter:
    return Adapter(name="adapters/bad", path=None, digest="")


def make_llamacpp() -> Engine:
    # Here, so that the other engines' tests run where its library does not.
    from services.worker.engine.llamacpp import LlamaCppEngine  # noqa: PLC0415

    return LlamaCppEngine(MODEL, capacity=CAPACITY, context_length=CONTEXT_LENGTH, threads=1)


def llamacpp_tokenizer() -> Tokenizer:
    from services.worker.engine.llamacpp_tokenizer import LlamaCppTokenizer  # noqa: PLC0415

    return LlamaCppTokenizer(MODEL)


def adapter_for_llamacpp(folder: Path, number: int) -> Adapter:
    path = folder / f"a{number}.gguf"
    write_adapter(path, Reference(MODEL), seed=number)
    return Adapter(name=f"adapters/a{number}", path=path, digest=_digest(path.read_bytes()))


def unusable_for_llamacpp(folder: Path) -> Adapter:
    path = folder / "bad.gguf"
    path.write_bytes(b"GGUF, or so it says")
    return Adapter(name="adapters/bad", path=path, digest=_digest(path.read_bytes()))


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine in the contract.

    Attributes:
        make: an engine that has not started.
        tokenizer: of its model.
        adapter: a usable adapter; other numbers are other adapters. Takes a folder for its file.
        unusable: an adapter that is none.
    """

    make: Callable[[], Engine]
    tokenizer: Callable[[], Tokenizer]
    adapter: Callable[[Path, int], Adapter]
    unusable: Callable[[Path], Adapter]


ENGINES = {
    "sim": Row(
        make=make_sim,
        tokenizer=SimTokenizer,
        adapter=adapter_for_sim,
        unusable=unusable_for_sim,
    ),
    "llamacpp": Row(
        make=make_llamacpp,
        tokenizer=llamacpp_tokenizer,
        adapter=adapter_for_llamacpp,
        unusable=unusable_for_llamacpp,
    ),
}


@dataclass
class Told:
    """What an engine told about one execution."""

    token_ids: list[int] = field(default_factory=list)
    ended: Ended | None = None
    prefilled: int = 0
    first_batch: int | None = None
    cached_tokens: int = 0
    logprobs: list[float] = field(default_factory=list)
    tops: list[dict[int, float]] = field(default_factory=list)
    prompt: list[PromptScores] = field(default_factory=list)


@dataclass
class Harness:
    """An engine, and all it told, checked batch by batch against the life of an execution."""

    engine: Engine
    info: EngineInfo
    row: Row
    told: dict[Lane, Told] = field(default_factory=dict)
    batches: int = 0

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        self.told[lane] = Told()
        self.engine.submit(lane, request)

    async def step(self) -> StepBatch:
        async with asyncio.timeout(PATIENCE_S):
            batch = await self.engine.next_step()
        self.take(batch)
        return batch

    def take(self, batch: StepBatch) -> None:
        self.batches += 1
        assert len(batch.lanes) == len(batch.token_ids)
        for prefilled in batch.prefilled:
            told = self.told[prefilled.lane]
            assert told.ended is None
            assert not told.token_ids
            told.prefilled += 1
            told.cached_tokens = prefilled.cached_tokens
            told.first_batch = self.batches
        for part in batch.prompt_scores:
            assert not self.told[part.lane].token_ids
            self.told[part.lane].prompt.append(part)
        for row, (lane, token_id) in enumerate(zip(batch.lanes, batch.token_ids, strict=True)):
            told = self.told[lane]
            if batch.scores is not None:
                told.logprobs.append(batch.scores.logprobs[row])
                told.tops.append(top_of(batch.scores, row))
            assert told.prefilled == 1
            assert told.ended is None
            assert 0 <= token_id < self.info.vocabulary_size
            told.token_ids.append(token_id)
        for ended in batch.ended:
            told = self.told[ended.lane]
            assert told.ended is None
            told.ended = ended

    async def until_ended(self, *lanes: Lane) -> None:
        while any(self.told[lane].ended is None for lane in lanes):
            await self.step()

    async def run(self, lane: Lane, request: EngineRequest) -> tuple[list[int], Ended]:
        self.submit(lane, request)
        await self.until_ended(lane)
        ended = self.told[lane].ended
        assert ended is not None
        return self.told[lane].token_ids, ended


def top_of(scores: TokenScores, row: int) -> dict[int, float]:
    """The alternatives of one row, best first."""
    columns = slice(row * scores.top_count, (row + 1) * scores.top_count)
    pairs = zip(scores.top_token_ids[columns], scores.top_logprobs[columns], strict=True)
    return {token_id: logprob for token_id, logprob in pairs if token_id >= 0}


def ask(
    tokens: int,
    *,
    prompt: tuple[int, ...] = PROMPT,
    continues: tuple[int, ...] = (),
    stops: frozenset[int] = frozenset(),
    sampling: Sampling = GREEDY,
    ignore_eos: bool = True,
    adapter: Adapter | None = None,
) -> EngineRequest:
    return EngineRequest(
        prompt_ids=prompt,
        continue_ids=continues,
        max_output_tokens=tokens,
        stop_token_ids=stops,
        ignore_eos=ignore_eos,
        sampling=sampling,
        adapter=adapter,
    )


def seeded(seed: int) -> Sampling:
    return Sampling(temperature=1.0, top_p=1, top_k=0, seed=seed)


async def eventually(condition: Callable[[], bool]) -> None:
    """Load may be measured elsewhere and arrive a moment later."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - nothing tells when a measurement arrives
            await asyncio.sleep(0.001)
