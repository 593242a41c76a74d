"""An engine under check: what it is asked, and all that it tells, looked at batch by batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.worker.engine.base import (
    Adapter,
    Ended,
    Engine,
    EngineInfo,
    EngineRequest,
    Lane,
    Prefilled,
    PromptScores,
    Sampling,
    StepBatch,
    Tokenizer,
    TokenScores,
)
from tools.conformance.engine.rows import Row
from tools.conformance.verdict import CannotShow, Mismatch, expect

PATIENCE_S = 20.0
"""Longest time until an engine says anything, and until a measurement arrives."""

GREEDY = Sampling(temperature=0, top_p=1, top_k=0, seed=0)
PROMPT = (72, 101, 108, 108, 111)
LONG_PROMPT = tuple(40 + at % 37 for at in range(70))
_POLL_S = 0.001


@dataclass
class Told:
    """What an engine told about one execution.

    Attributes:
        token_ids: output, in order.
        ended: its end; None while it runs.
        prefilled: how often its prompt was said to be in the cache.
        first_batch: number of the batch that said so.
        cached_tokens: of the prompt, that the prefix cache had.
        logprobs: of each output token; empty where nobody asked.
        tops: alternatives of each, best first.
        prompt: log-probabilities of the prompt, in parts.
    """

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
    """A started engine, checked batch by batch against the life of an execution.

    Attributes:
        engine: it.
        info: what it said when it had started.
        row: where it comes from.
        tokenizer: of its model.
        folder: for files that a check writes.
        salt: of cache salts; no other check has the same.
        told: what it told, by lane.
        batches: that it told.
    """

    engine: Engine
    info: EngineInfo
    row: Row
    tokenizer: Tokenizer
    folder: Path
    salt: bytes
    told: dict[Lane, Told] = field(default_factory=dict)
    batches: int = 0

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        """Submits an execution."""
        self.told[lane] = Told()
        self.engine.submit(lane, request)

    async def step(self) -> StepBatch:
        """Waits for the next batch, within PATIENCE_S, and looks at it.

        Raises:
            Mismatch: it contradicts the life of an execution, or none came.
        """
        try:
            async with asyncio.timeout(PATIENCE_S):
                batch = await self.engine.next_step()
        except TimeoutError:
            raise Mismatch(f"expected a batch, got none in {PATIENCE_S:g} s") from None
        self.take(batch)
        return batch

    def take(self, batch: StepBatch) -> None:
        """Looks at a batch.

        Raises:
            Mismatch: it contradicts the life of an execution.
        """
        self.batches += 1
        for prefilled in batch.prefilled:
            self._take_prefilled(prefilled)
        for part in batch.prompt_scores:
            told = self._of(part.lane)
            expect(not told.token_ids, "scores of a prompt came behind output")
            told.prompt.append(part)
        self._take_rows(batch)
        for ended in batch.ended:
            told = self._of(ended.lane)
            expect(told.ended is None, "an execution ended twice")
            told.ended = ended

    async def until_ended(self, *lanes: Lane) -> None:
        """Reads until executions have ended."""
        while any(self.told[lane].ended is None for lane in lanes):
            await self.step()

    async def run(self, lane: Lane, request: EngineRequest) -> tuple[list[int], Ended]:
        """Submits an execution and reads until it has ended; returns its output and its end."""
        self.submit(lane, request)
        await self.until_ended(lane)
        return self.told[lane].token_ids, self.end_of(lane)

    async def load_adapter(self, adapter: Adapter) -> None:
        """Loads an adapter as a worker does.

        Raises:
            AdapterUnusable: it is none, or not one of this model.
        """
        if self.row.check_adapter is not None and adapter.path is not None:
            await asyncio.to_thread(self.row.check_adapter, adapter.path)
        await self.engine.load_adapter(adapter)

    def end_of(self, lane: Lane) -> Ended:
        """The end of an execution.

        Raises:
            Mismatch: it has not ended.
        """
        ended = self.told[lane].ended
        if ended is None:
            raise Mismatch("expected an end, got none")
        return ended

    def expect_same(self, got: Sequence[int], wanted: Sequence[int], what: str) -> None:
        """States that two outputs are the same; shows neither.

        Raises:
            Mismatch: they are not, on an engine whose model draws the same again.
            CannotShow: they are not, on an engine that does not promise it.
        """
        if list(got) == list(wanted):
            return
        pairs = enumerate(zip(got, wanted, strict=False))
        shared = next(
            (at for at, (left, right) in pairs if left != right), min(len(got), len(wanted))
        )
        text = (
            f"{what}: expected {len(wanted)} tokens, got {len(got)}, the same up to {shared} only"
        )
        if self.info.is_deterministic or self.row.is_repeatable:
            raise Mismatch(text)
        raise CannotShow(f"{text}, and this engine does not promise that they are the same")

    def require_deterministic(self) -> None:
        """States that the output is a function of (prompt, seed, position).

        Raises:
            CannotShow: the engine does not promise it.
        """
        if not self.info.is_deterministic:
            raise CannotShow("the engine does not promise that a seed and a place make a token")

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of whole characters."""
        return b"".join(map(self.tokenizer.token_bytes, token_ids)).decode("utf-8", "replace")

    def _of(self, lane: Lane) -> Told:
        told = self.told.get(lane)
        if told is None:
            raise Mismatch("the engine told of an execution that nobody submitted")
        expect(told.ended is None, "something came behind the end of an execution")
        return told

    def _take_prefilled(self, prefilled: Prefilled) -> None:
        told = self._of(prefilled.lane)
        expect(told.prefilled == 0, "a prompt was prefilled twice")
        expect(not told.token_ids, "a prompt was prefilled behind its output")
        told.prefilled += 1
        told.cached_tokens = prefilled.cached_tokens
        told.first_batch = self.batches

    def _take_rows(self, batch: StepBatch) -> None:
        expect(len(batch.lanes) == len(batch.token_ids), "columns are not equally long")
        scores = batch.scores
        if scores is not None:
            expect(len(scores.logprobs) == len(batch.lanes), "a row has no log-probability")
            expect(
                len(scores.top_token_ids)
                == len(scores.top_logprobs)
                == scores.top_count * len(batch.lanes),
                "alternatives are not as many as their rows",
            )
        for row, (lane, token_id) in enumerate(zip(batch.lanes, batch.token_ids, strict=True)):
            told = self._of(lane)
            expect(told.prefilled == 1, "output came before its prompt was prefilled")
            expect(0 <= token_id < self.info.vocabulary_size, "a token is not in the vocabulary")
            if scores is not None:
                told.logprobs.append(scores.logprobs[row])
                told.tops.append(top_of(scores, row))
            told.token_ids.append(token_id)


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
    """Makes a request; the likeliest tokens, past the end of sequence, unless it says otherwise."""
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
    """Sampling that is left to chance."""
    return Sampling(temperature=1.0, top_p=1, top_k=0, seed=seed)


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Waits, within PATIENCE_S: load may be measured elsewhere and arrive a moment later.

    Raises:
        Mismatch: it did not become so.
    """
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - nothing tells when a measurement arrives
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise Mismatch(f"{what}: not so within {PATIENCE_S:g} s") from None
