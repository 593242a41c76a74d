"""What is computed in one step: who starts, whose prompts, whose tokens, who ends."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

from collections import Counter, deque
from typing import Protocol

import numpy as np

from .cache import KvCache
from .lanes import Lane, prompt_scores, scored
from .language import TAIL, Floats, LanguageModel, log_softmax, tails_of
from .results import Response
from .sampling import DeadEnd, Noise, pick_plain
from .settings import Settings
from .statistics import Counts, Stats

Told = list[tuple[int, Response]]

_NO_EVICT = "GUARANTEED_NO_EVICT"


class BatchConfig(Protocol):
    """What a batch has to know."""

    @property
    def batch_max(self) -> int: ...
    @property
    def tokens_max(self) -> int: ...
    @property
    def chunked(self) -> bool: ...
    @property
    def policy(self) -> str: ...
    @property
    def draft_tokens(self) -> int: ...


class Batch:
    """All requests of one engine. Belongs to its thread.

    Attributes:
        was_idle: the last step had nothing to do.
    """

    def __init__(
        self, config: BatchConfig, settings: Settings, model: LanguageModel, cache: KvCache
    ) -> None:
        self.was_idle = False
        self._config, self._settings = config, settings
        self._model, self._cache = model, cache
        self._waiting: deque[Lane] = deque()
        self._active: list[Lane] = []
        self._noise = Noise(model.vocabulary)
        self._slots = list(range(config.batch_max))
        self._tails = np.full((config.batch_max, TAIL), -1, dtype=np.int64)
        self._told: Told = []
        self._number = 0
        self._step: Counter[str] = Counter()
        # By number of the request, for faults.
        self._most_tokens: dict[int, int] = {}

    def add(self, lanes: list[Lane]) -> None:
        """Puts a request behind those that wait with the same or a higher priority."""
        self._most_tokens[lanes[0].request.number] = 0
        for lane in lanes:
            at = len(self._waiting)
            while at and self._waiting[at - 1].request.priority < lane.request.priority:
                at -= 1
            self._waiting.insert(at, lane)

    def cancel(self, request_id: int) -> None:
        """Ends a request with its next response."""
        for lane in [*self._active, *self._waiting]:
            request = lane.request
            if request.request_id != request_id or lane.is_stuck:
                continue
            if self._settings.fault_of("abort_ignored", request.number) is None:
                self._end(lane, "cancelled")

    def has_work(self) -> bool:
        """Whether a step would do anything, as far as it can be known."""
        runs = any(not lane.is_stuck for lane in self._active)
        return runs or bool(self._told) or bool(self._waiting)

    def most_tokens(self, number: int | None) -> int:
        """Output tokens of the n-th request, or of the one that has the most; -1 for not seen."""
        if number is not None:
            return self._most_tokens.get(number, -1)
        return max(self._most_tokens.values(), default=-1)

    def step(self) -> Told:
        """Computes one iteration.

        Raises:
            ValueError: a grammar and the engine disagree, which nobody catches.
        """
        self._number += 1
        self._step.clear()
        self._admit()
        ready = self._prefill([lane for lane in self._active if not lane.is_decoding])
        decoding = [lane for lane in self._active if lane.is_decoding and not lane.is_stuck]
        self._step["generating"] = len(decoding) - len(ready)
        lanes = self._grow(decoding)
        self.was_idle = not lanes and not self._step["contexts"] and not self._told
        self._draw(lanes)
        for extra in range(self._config.draft_tokens):
            self._draw([lane for lane in lanes if not lane.reason and _is_guessed(lane, extra)])
        for lane in lanes:
            self._tell(lane)
        told, self._told = self._told, []
        return told

    def _admit(self) -> None:
        while self._waiting and self._slots:
            lane = self._waiting[0]
            context = lane.context()
            most = len(lane.request.prompt) + lane.max_tokens
            needed = most if self._config.policy == _NO_EVICT else len(context) + 1
            blocks = self._cache.blocks_for(needed)
            held = self._cache.begin(lane.request.root, context, blocks)
            if held is None and self._active:
                return
            if held is None:
                # It alone is more than the cache holds: it takes what there is.
                held = self._cache.begin(lane.request.root, context, self._cache.blocks_max)
                if held is None:
                    return
            self._waiting.popleft()
            lane.held, lane.computed = held, held.cached
            lane.cached = held.cached if not lane.output else lane.cached
            lane.slot = self._slots.pop()
            self._tails[lane.slot] = tails_of(context)[-1]
            self._active.append(lane)
            self._step["new"] += 1

    def _prefill(self, lanes: list[Lane]) -> list[Lane]:
        """Computes prompts, as far as a step goes; returns those that are through."""
        budget = self._config.tokens_max - (len(self._active) - len(lanes))
        ready: list[Lane] = []
        for lane in lanes:
            left = lane.length - lane.computed
            if left > budget and not self._config.chunked:
                break
            taken = min(left, budget)
            lane.computed += taken
            budget -= taken
            self._step["contexts"] += 1
            self._step["context_tokens"] += taken
            if lane.computed == lane.length:
                self._store(lane, partial=False)
                ready.append(lane)
                self._score_prompt(lane)
        return ready

    def _score_prompt(self, lane: Lane) -> None:
        count = lane.request.params.prompt_logprobs
        if count and not lane.output:
            prompt = lane.request.prompt
            tails = tails_of(prompt)[lane.cached :]
            lane.prompt_scores = prompt_scores(self._model, tails, lane.adapter, count)

    def _grow(self, lanes: list[Lane]) -> list[Lane]:
        """Makes room for a token of each; who came last is thrown out where there is none."""
        if self._config.policy == _NO_EVICT:
            return lanes
        kept: list[Lane] = []
        for lane in lanes:
            blocks = self._cache.blocks_for(lane.length + 1)
            while lane.held is not None and not self._cache.grow(lane.held, blocks):
                youngest = self._active[-1]
                self._pause(youngest)
            if lane.held is not None:
                kept.append(lane)
        return [lane for lane in kept if lane.held is not None]

    def _pause(self, lane: Lane) -> None:
        self._release(lane)
        lane.computed = 0
        self._waiting.appendleft(lane)
        self._step["paused"] += 1

    def _draw(self, lanes: list[Lane]) -> None:
        if not lanes:
            return
        slots = [lane.slot for lane in lanes]
        adapters = [lane.adapter for lane in lanes]
        has_adapters = any(adapter is not None for adapter in adapters)
        logits = self._model.logits(self._tails[slots], adapters if has_adapters else ())
        plain = [at for at, lane in enumerate(lanes) if lane.choice.is_plain]
        picked: dict[int, int] = {}
        if plain:
            choices = [lanes[at].choice for at in plain]
            rows = logits if len(plain) == len(lanes) else logits[plain]
            noise = None
            if not all(choice.is_greedy for choice in choices):
                noise = self._noise_of([lanes[at] for at in plain])
            picked = dict(zip(plain, pick_plain(rows, choices, noise), strict=True))
        for at, lane in enumerate(lanes):
            token_id = picked[at] if at in picked else self._pick(lane, logits[at])
            if self._wants_scores(lane):
                self._score(lane, logits[at], token_id)
            lane.take(token_id)
        self._tails[slots] = np.roll(self._tails[slots], -1, axis=1)
        self._tails[slots, -1] = [lane.output[-1] for lane in lanes]
        self._step["decoded"] += len(lanes)

    def _pick(self, lane: Lane, logits: Floats) -> int:
        try:
            row = lane.choice.change(logits, lane.output, lane.guide)
        except DeadEnd as error:
            raise ValueError("the grammar and the rest leave no token") from error
        return lane.choice.pick(row, self._noise_of([lane])[0])

    def _noise_of(self, lanes: list[Lane]) -> Floats:
        by_place = self._settings.draws == "position"
        draws = [lane.length if by_place else len(lane.output) for lane in lanes]
        return self._noise.rows([lane.choice for lane in lanes], draws)

    def _wants_scores(self, lane: Lane) -> bool:
        count = lane.request.params.logprobs
        if lane.choice.sampler.in_graph:
            return False
        return count is not None and (count > 0 or self._settings.features["logprobs_zero"])

    def _score(self, lane: Lane, logits: Floats, token_id: int) -> None:
        count = lane.request.params.logprobs or 0
        lane.scores.append(scored(log_softmax(logits), token_id, count))

    def _tell(self, lane: Lane) -> None:
        lane.iterations += 1
        # What is drawn last is not computed before it is needed.
        lane.computed = lane.length - 1
        number = lane.request.number
        tokens = len(lane.output)
        self._most_tokens[number] = max(self._most_tokens[number], tokens)
        if self._is_struck(lane, tokens):
            return
        if lane.reason:
            self._end(lane, lane.reason)
        elif lane.request.streaming:
            interval = lane.request.params._stream_interval
            if lane.iterations == 1 or lane.iterations % interval == 0:
                self._told.append((lane.request.request_id, lane.response(self._settings)))

    def _is_struck(self, lane: Lane, tokens: int) -> bool:
        """Whether a fault of its own ends what a request gets."""
        number, request_id = lane.request.number, lane.request.request_id
        fault = self._settings.fault_of("request_error", number)
        if fault is not None and tokens >= fault.tokens:
            self._release(lane)
            message = fault.text("message", "the request has failed")
            self._told.append((request_id, Response(error=message)))
            return True
        fault = self._settings.fault_of("hang", number)
        if fault is not None and tokens >= fault.tokens:
            lane.is_stuck = True
        return lane.is_stuck

    def _end(self, lane: Lane, reason: str) -> None:
        lane.reason = reason
        lane.request.sequences_left -= 1
        self._told.append((lane.request.request_id, lane.response(self._settings)))
        self._step["completed"] += 1
        if lane.held is None:
            self._waiting.remove(lane)
            return
        self._store(lane, partial=True)
        self._release(lane)

    def _store(self, lane: Lane, *, partial: bool) -> None:
        if lane.held is not None:
            tokens = lane.context()[: lane.computed]
            self._cache.store(lane.request.root, lane.held, tokens, partial=partial)

    def _release(self, lane: Lane) -> None:
        if lane.held is not None:
            self._cache.end(lane.held)
            lane.held = None
            self._slots.append(lane.slot)
            self._active.remove(lane)

    def counts(self, latency_s: float) -> Counts:
        """What the last step was. Who ended in it was still active."""
        step = self._step
        return Counts(
            number=self._number,
            latency_s=latency_s,
            new=step["new"],
            active=len(self._active) + step["completed"],
            queued=len(self._waiting),
            completed=step["completed"],
            contexts=step["contexts"],
            context_tokens=step["context_tokens"],
            generating=step["generating"],
            generating_tokens=sum(lane.length for lane in self._active),
            paused=step["paused"],
            queued_tokens=sum(len(lane.request.prompt) for lane in self._waiting),
            decoded=1.0 + self._config.draft_tokens / 2,
        )

    def request_stats(self) -> list[Stats]:
        """The requests in the batch."""
        return [
            {
                "id": lane.request.request_id,
                "stage": "GENERATION_IN_PROGRESS" if lane.output else "CONTEXT_IN_PROGRESS",
                "contextPrefillPosition": min(lane.computed, len(lane.request.prompt)),
                "numGeneratedTokens": len(lane.output),
                "avgNumDecodedTokensPerIter": 1.0,
                "scheduled": True,
                "paused": False,
                "disServingStats": None,
                "allocTotalBlocksPerRequest": lane.held.reserved if lane.held else 0,
                "reusedBlocksPerRequest": lane.cached // self._cache.tokens_per_block,
            }
            for lane in self._active
        ]


def _is_guessed(lane: Lane, extra: int) -> bool:
    """Whether the next guess was right: two of three, by chance."""
    return (lane.output[-1] * 7 + lane.length * 13 + extra) % 3 > 0
