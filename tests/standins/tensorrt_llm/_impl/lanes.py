"""What the engine keeps of a request: one lane for each sequence of it."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np

from .cache import Held, Root
from .guidance import Guide, Guides
from .language import Floats, Ids, LanguageModel, log_softmax
from .records import LoRABase, SamplingBase
from .results import Logprob, Response, Scores
from .sampling import Choice, Sampler
from .settings import Settings

_SEED_DEFAULT = 0
_LOGPROBS_MOST = 1_000


class TensorLike(Protocol):
    """What is asked of a tensor."""

    def tolist(self) -> list[float]:
        """Its numbers."""
        ...


@dataclass(slots=True, kw_only=True)
class Request:
    """A request as the engine gets it.

    Attributes:
        request_id: names it in responses.
        number: of the call of generate_async, counted from 1.
        prompt: token ids.
        params: as the call has filled them in.
        streaming: whether every step is told.
        salt: that splits the cache.
        lora: adapter; None for none.
        priority: higher ones start first.
        sequences_left: that have not ended.
    """

    request_id: int
    number: int
    prompt: list[int]
    params: SamplingBase
    streaming: bool
    salt: str | None = None
    lora: LoRABase | None = None
    priority: float = 0.5
    sequences_left: int = 1

    @property
    def root(self) -> Root:
        """What splits the cache."""
        return self.salt, None if self.lora is None else self.lora.lora_int_id


@dataclass(slots=True, kw_only=True)
class Lane:
    """One sequence.

    Attributes:
        request: that it belongs to.
        index: of the sequence.
        max_tokens: of output.
        end_id: that it ends with; -1 for none.
        stop_words: ids that it ends with.
        choice: how tokens are drawn.
        guide: its grammar.
        adapter: its LoRA table.
        output: ids so far.
        told: how many of them have been told.
        scores: of what has not been told.
        prompt_scores: until they have been told.
        held: its part of the KV cache, while it is in the batch.
        computed: tokens whose keys and values are there.
        iterations: steps since the prompt was computed.
        cached: tokens of the prompt that were there.
        slot: where its last tokens are kept.
        reason: why it has ended; "" while it has not.
        is_stuck: it gets nothing more.
    """

    request: Request
    index: int
    max_tokens: int
    end_id: int
    stop_words: list[list[int]]
    choice: Choice
    guide: Guide | None
    adapter: Floats | None
    output: list[int] = field(default_factory=list)
    told: int = 0
    scores: Scores = field(default_factory=list)
    prompt_scores: Scores | None = None
    held: Held | None = None
    computed: int = 0
    iterations: int = 0
    cached: int = 0
    slot: int = -1
    reason: str = ""
    is_stuck: bool = False

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return len(self.request.prompt) + len(self.output)

    def context(self) -> list[int]:
        """Prompt and output."""
        return self.request.prompt + self.output

    @property
    def is_decoding(self) -> bool:
        """Whether everything but the newest token is computed."""
        return self.computed >= self.length - bool(self.output)

    def take(self, token_id: int) -> None:
        """Takes a token and finds out whether it was the last.

        Raises:
            ValueError: the grammar does not accept it.
        """
        self.output.append(token_id)
        self.choice.take(token_id)
        if self.guide is not None:
            self.guide.accept(token_id)
        if token_id == self.end_id:
            self.reason = "end_id"
        elif len(self.output) >= self.max_tokens:
            # Before stop words are looked for: the last token may be one, and stays.
            self.reason = "length"
        elif any(self._ends_with(word) for word in self.stop_words):
            self.reason = "stop_words"

    def _ends_with(self, word: list[int]) -> bool:
        """Whether prompt and output end so. What began in the prompt is not cut off later."""
        if len(word) <= len(self.output):
            return self.output[-len(word) :] == word
        return self.context()[-len(word) :] == word

    def response(self, settings: Settings) -> Response:
        """What has not been told yet."""
        number = self.request.number
        token_ids = self.output[self.told :]
        reason = self.reason
        if reason == "end_id" and settings.fault_of("eos_missing", number):
            token_ids = token_ids[:-1]
        fault = settings.fault_of("finish_reason", number)
        is_final = bool(reason) and not self.request.sequences_left
        found = Response(
            sequence=self.index,
            token_ids=token_ids,
            scores=self._faulty_scores(settings)[: len(token_ids)],
            prompt_scores=self.prompt_scores,
            reason=fault.text("reason", "") if fault is not None and reason else reason,
            is_final=is_final,
            cached_tokens=self.cached,
            iteration=self.iterations,
            stray=not reason and settings.fault_of("logprobs_longer", number) is not None,
            is_unknown=fault is not None and is_final and not fault.text("reason", ""),
        )
        self.told, self.scores, self.prompt_scores = len(self.output), [], None
        return found

    def _faulty_scores(self, settings: Settings) -> Scores | list[float]:
        number = self.request.number
        if settings.fault_of("logprobs_missing", number):
            return []
        if self.scores and settings.fault_of("logprobs_flat", number):
            tokens = self.output[self.told :]
            pairs = zip(self.scores, tokens, strict=True)
            return [scores[token_id].logprob for scores, token_id in pairs]
        return self.scores


def make_lanes(request: Request, engine: Making) -> list[Lane]:
    """Makes the lanes of a request.

    Raises:
        ValueError: there is no room for its output, or its grammar does not compile.
    """
    params = request.params
    room = engine.length_max - len(request.prompt)
    if room <= 0:
        raise ValueError("the prompt is as long as max_seq_len or longer")
    wanted = room if params.max_tokens is None else params.max_tokens
    if wanted <= 0:
        raise ValueError(f"max_tokens must be more than 0, not {wanted}")
    words = [word for _, word in params.stop_reasons_and_words() if word]
    words += [[end_id] for end_id in engine.more_end_ids]
    count = params.best_of or params.n
    request.sequences_left = count
    return [
        Lane(
            request=request,
            index=index,
            max_tokens=min(wanted, room),
            end_id=_end_id(params),
            stop_words=[] if params.ignore_eos else words,
            choice=_choice(request, index, engine),
            guide=_guide(params, engine.guides),
            adapter=engine.table_of(request.lora),
        )
        for index in range(count)
    ]


class Making(Protocol):
    """What of an engine lanes are made with."""

    length_max: int
    vocabulary: int
    more_end_ids: list[int]
    guides: Guides | None
    sampler: Sampler

    def table_of(self, lora: LoRABase | None) -> Floats | None:
        """Loads an adapter."""
        ...


class RefusedGrammar(ValueError):
    """A grammar does not compile."""


def _end_id(params: SamplingBase) -> int:
    return -1 if params.ignore_eos or params.end_id is None else params.end_id


def _guide(params: SamplingBase, guides: Guides | None) -> Guide | None:
    if params.guided_decoding is None or guides is None:
        return None
    try:
        return guides.make(params.guided_decoding)
    except (ValueError, KeyError) as error:
        raise RefusedGrammar(str(error)) from error


def _choice(request: Request, index: int, engine: Making) -> Choice:
    params = request.params
    bias = None
    if params.embedding_bias is not None:
        numbers = cast("TensorLike", params.embedding_bias).tolist()
        bias = np.array(numbers, dtype=np.float32)
    seed = _SEED_DEFAULT if params.seed is None else params.seed
    return Choice(
        params=params,
        sampler=engine.sampler,
        prompt=request.prompt,
        end_id=_end_id(params),
        seed=seed + index,
        bias=bias,
        banned=[[token_id] for token_id in params.bad_token_ids or []],
        vocabulary=engine.vocabulary,
        is_guided=params.guided_decoding is not None,
    )


def scored(logprobs: Floats, token_id: int | None, count: int) -> dict[int, Logprob]:
    """The likeliest tokens, and the one that was drawn."""
    count = min(count, len(logprobs), _LOGPROBS_MOST)
    order: list[int] = []
    if count:
        best = np.argpartition(-logprobs, count - 1)[:count]
        order = best[np.argsort(-logprobs[best], kind="stable")].tolist()
    found = {at: Logprob(float(logprobs[at]), rank) for rank, at in enumerate(order, start=1)}
    if token_id is not None and token_id not in found:
        rank = int((logprobs > logprobs[token_id]).sum()) + 1
        found[token_id] = Logprob(float(logprobs[token_id]), rank)
    return found


def prompt_scores(model: LanguageModel, tails: Ids, adapter: Floats | None, count: int) -> Scores:
    """For each computed token of a prompt, the likeliest ones behind it.

    The token that did follow is among them only where it is one of the likeliest, and tokens that
    were in the KV cache are missing altogether.
    """
    logits = log_softmax(model.logits(tails, [adapter] * len(tails)))
    return [scored(row, None, count) for row in logits]
