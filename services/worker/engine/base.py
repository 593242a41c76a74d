"""The engine protocol: what a worker asks of an inference engine, and nothing more.

An engine turns prompts of token ids into output token ids. It knows neither tenants nor text
rules: the worker renders chat templates, turns ids into text, holds back unfinished characters
and finds stop sequences, once, for every engine.

Life of one execution, told by lane:

    submit -> (tokens | nothing)* -> ended        exactly one Ended for each submit
    abort  -> the Ended still comes, with EndReason.ABORTED unless it ended before

Everything that happened in one step of the engine comes in one StepBatch, by column: row i of the
token columns is lanes[i] and token_ids[i]. A lane may have several rows in a batch (speculative
decoding, or a consumer that came late and got two steps merged); its rows are in order.

Neither the end-of-sequence token nor a matched stop token id is ever among the tokens.

What an engine cannot do its abilities say; the worker refuses it before it submits.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from services.worker.engine.kv_events import KvEvent

Lane = int
"""Names one execution inside one engine. Chosen by the worker, never reused while it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. All values are concrete; defaults were resolved before.

    The randomness of output position p is a function of (seed, p) alone, so a continuation on
    another worker goes on as the first would have. Engines that cannot promise it say so in
    EngineInfo.is_deterministic.

    Attributes:
        temperature: 0 takes the likeliest token, else 0 < temperature <= 2.
        top_p: share of probability kept, 0..1; 1 keeps all.
        top_k: number of likeliest tokens kept; 0 keeps all.
        seed: 64 bits.
        min_p: least share of the likeliest token's probability, 0..1; 0 keeps all.
        frequency_penalty: taken from a logit for each time its token stands in the output, -2..2.
        presence_penalty: taken from the logit of each token that stands in the output, -2..2.
        repetition_penalty: divides positive and multiplies negative logits of tokens that stand in
            prompt or output, 0.01..10; 1 changes nothing.
        logit_bias: (token id, what is added to its logit), ids ascending.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()


class ConstraintKind(enum.Enum):
    """What a constraint was written as."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICES = "choices"
    TOOLS = "tools"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """What the whole output has to be. Checked: it compiles, and something matches it.

    Attributes:
        kind: what it was written as.
        source: as it was written: JSON text, a regular expression, GBNF; a JSON list of texts for
            CHOICES; empty for JSON_OBJECT and TOOLS.
        grammar: the same for llguidance, for engines that enforce constraints with it.
    """

    kind: ConstraintKind
    source: str
    grammar: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter whose files have been found and have the digest that the catalog says.

    Attributes:
        name: "adapters/{adapter}".
        path: of the file, or of the directory for an engine that takes those; None for an engine
            that reads none.
        digest: "sha256:<hex>" of the file or directory. Adapters with equal digests are the same.
    """

    name: str
    path: Path | None
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One execution, validated: every id is in the vocabulary and the prompt fits.

    Attributes:
        prompt_ids: token ids of the whole prompt; at least one.
        continue_ids: output already released elsewhere; counts as output positions 0..n-1.
        max_output_tokens: most output tokens, continue_ids counted in.
        stop_token_ids: the output ends before any of these.
        stop_texts: texts at which the worker ends the output. An engine that sees the tokens of one
            may end by itself, with END_OF_SEQUENCE and after all of its tokens; it need not.
        ignore_eos: do not end at the model's own end of sequence.
        sampling: how tokens are drawn.
        min_output_tokens: the model's own end of sequence is not drawn before there are so many
            output tokens, continue_ids counted in.
        constraint: what the output has to be; None for anything. It ends by itself where nothing
            more may follow, with END_OF_SEQUENCE.
        top_logprobs: alternatives with each output token's log-probability; 0 for the chosen
            token's only, None for no log-probabilities.
        prompt_logprobs: log-probabilities of the prompt too, with as many alternatives; the whole
            prompt is then computed.
        adapter: LoRA adapter to apply; None for none. It has been loaded by `load_adapter`; an
            engine that has dropped it since loads it again.
        cache_salt: only executions with equal salts (and equal adapters) share the prefix cache.
        reads_cache: whether the prefix cache may be read.
        is_background: it starts when nothing else waits.
    """

    prompt_ids: tuple[int, ...]
    continue_ids: tuple[int, ...] = ()
    max_output_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    ignore_eos: bool = False
    sampling: Sampling
    min_output_tokens: int = 0
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    adapter: Adapter | None = None
    cache_salt: bytes = b""
    reads_cache: bool = True
    is_background: bool = False


class EndReason(enum.Enum):
    """Why an execution ended.

    CONSTRAINT_LIMIT: following its constraint takes more processor time than an output has. What
    it has said is a beginning of what the constraint allows; the engine is not to blame.
    """

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_TOKEN = "stop_token"  # noqa: S105 - not a secret
    MAX_TOKENS = "max_tokens"
    CONTEXT_FULL = "context_full"
    CONSTRAINT_LIMIT = "constraint_limit"
    ABORTED = "aborted"
    FAILED = "failed"


LOCAL_ENDS: Final = frozenset({EndReason.ABORTED, EndReason.FAILED})
"""Ends that an execution may come to before the engine has seen it: no signs of its life."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one execution. Its lane is free from here on.

    Attributes:
        lane: of the execution.
        reason: why it ended.
        stop_token_id: what matched, with STOP_TOKEN.
        message: for the log, with FAILED; never holds text of a prompt or an output.
    """

    lane: Lane
    reason: EndReason
    stop_token_id: int | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt of one execution is in the KV cache.

    Attributes:
        lane: of the execution.
        cached_tokens: prompt tokens that the prefix cache already had.
    """

    lane: Lane
    cached_tokens: int


@dataclass(slots=True)
class TokenScores:
    """Log-probabilities beside token columns, row by row.

    They are the model's own: before temperature, filters, penalties, bias and constraint.

    Attributes:
        logprobs: natural logarithm of each row's token; NaN where the lane did not ask.
        top_count: alternatives K kept for each row, the most that any row asked for; a row that
            asked for fewer has them first. 0 for none.
        top_token_ids: rows * K ids, best first; -1 pads.
        top_logprobs: rows * K natural logarithms; -inf pads.
    """

    logprobs: list[float]
    top_count: int = 0
    top_token_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of consecutive tokens of one prompt. Parts come in order.

    Attributes:
        lane: of the execution.
        offset: place in the prompt of the first of them.
        scores: one row for each. The first token of a prompt has NaN, and no alternatives.
    """

    lane: Lane
    offset: int
    scores: TokenScores


@dataclass(slots=True)
class StepBatch:
    """All that happened since the batch before, in order: prefilled, prompt_scores, tokens, ended.

    Attributes:
        lanes: lane of each row.
        token_ids: token of each row; same length as lanes.
        ended: executions that ended in this batch, after their rows.
        prefilled: executions whose first row comes in this batch or later.
        scores: same rows as lanes; None when no lane asked.
        prompt_scores: of executions whose first row comes in this batch or later.
        kv_events: changes of the prefix cache, in order; they may come later than the rows.
    """

    lanes: list[Lane] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    prefilled: list[Prefilled] = field(default_factory=list)
    scores: TokenScores | None = None
    prompt_scores: list[PromptScores] = field(default_factory=list)
    kv_events: list[KvEvent] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAbilities:
    """What an engine can do with its model; the worker never submits what it cannot.

    Attributes:
        constraints: kinds that it enforces.
        min_p: likewise.
        penalties: frequency_penalty and presence_penalty.
        repetition_penalty: likewise.
        logit_bias: likewise.
        min_output_tokens: likewise.
        ignore_eos: likewise.
        max_top_logprobs: most alternatives; None when it gives no log-probabilities at all.
        prompt_logprobs: likewise.
        adapters: LoRA.
        embedding_dimensions: numbers of an embedding; 0 when it makes none.
        prompt_cache: it has a prefix cache, split by salt.
        kv_block_tokens: tokens in a block of the cache whose changes it tells; 0 when it tells
            none.
    """

    constraints: frozenset[ConstraintKind] = frozenset()
    min_p: bool = False
    penalties: bool = False
    repetition_penalty: bool = False
    logit_bias: bool = False
    min_output_tokens: bool = False
    ignore_eos: bool = False
    max_top_logprobs: int | None = None
    prompt_logprobs: bool = False
    adapters: bool = False
    embedding_dimensions: int = 0
    prompt_cache: bool = False
    kv_block_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine is; fixed once it has started.

    Attributes:
        engine: "sim", "llamacpp", ...
        version: of the engine's software.
        context_length: prompt and output together, tokens.
        max_running: executions in the batch at the same time.
        vocabulary_size: token ids are 0 <= id < vocabulary_size.
        digest: "sha256:<hex>" of the weights, a file or a directory; empty when there are none.
        is_deterministic: same seed, prompt and position give the same token on any worker.
        abilities: what it can do.
    """

    engine: str
    version: str
    context_length: int
    max_running: int
    vocabulary_size: int
    digest: str
    is_deterministic: bool
    abilities: EngineAbilities = EngineAbilities()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """Load at one moment. None means not measured, never idle.

    Attributes:
        running: executions in the batch.
        waiting: submitted executions outside the batch.
        waiting_tokens: prompt tokens whose prefill has not happened.
        kv_used_tokens: tokens in the KV cache.
        kv_total_tokens: tokens that fit.
        resident_adapters: names of loaded adapters.
        steps: that the engine has done since it started. It grows while the engine works on
            anything at all, tokens or not: a sign of life. LOCAL_ENDS are no work. None when it is
            not counted.
    """

    running: int | None
    waiting: int | None
    waiting_tokens: int | None
    kv_used_tokens: int | None
    kv_total_tokens: int | None
    resident_adapters: tuple[str, ...] = ()
    steps: int | None = None


class LoadStage(enum.Enum):
    """What a starting engine is at, in this order; stages may be left out."""

    CHECKING = "checking"
    LOADING = "loading"
    WARMING = "warming"


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a starting engine is.

    Attributes:
        stage: CHECKING reads the files of the model, LOADING has the engine load them, WARMING
            draws a first token.
        fraction: of this stage that is done, 0..1; None when that is not known.
    """

    stage: LoadStage
    fraction: float | None = None


Tell = Callable[[LoadProgress], None]
"""Is told how far a starting engine is, on the event loop."""


class EngineDied(Exception):
    """The engine is gone and cannot serve again; the worker has to exit."""


class EngineStartError(Exception):
    """The engine cannot start. The message tells an operator what to do."""


class AdapterUnusable(Exception):
    """The engine cannot load an adapter. The message is for operators and tenants."""


class EmbeddingFailed(Exception):
    """The engine could not embed these inputs; others are not concerned."""


class Engine(Protocol):
    """An inference engine under one asyncio loop. All methods belong to that loop."""

    async def start(self, tell: Tell | None = None) -> EngineInfo:
        """Loads the model, off the event loop.

        Args:
            tell: hears how far it is.

        Raises:
            EngineStartError: with what to do about it.
        """
        ...

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        """Queues an execution. Never blocks; the caller bounds how many are inside.

        Raises:
            EngineDied: it is gone.
        """
        ...

    def abort(self, lane: Lane) -> None:
        """Stops an execution soon. Idempotent; unknown lanes are ignored."""
        ...

    async def next_step(self) -> StepBatch:
        """Waits for the next batch. One consumer. May be cancelled without losing a batch.

        Raises:
            EngineDied: it is gone; every running execution is lost.
        """
        ...

    def load(self) -> EngineLoad:
        """Measures the load without waiting."""
        ...

    async def load_adapter(self, adapter: Adapter) -> None:
        """Loads an adapter, unless it is loaded. The engine drops the one unused for longest.

        Raises:
            AdapterUnusable: its file is no adapter, or not one of this model.
            EngineDied: it is gone.
        """
        ...

    async def embed(self, inputs: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Embeds prompts: the mean of the last layer's states, scaled to length 1.

        Shares the engine with what it generates; the caller bounds how much. May be cancelled.

        Args:
            inputs: token ids; each at least one, and at most the context length.

        Returns:
            float32, shape (inputs, embedding_dimensions).

        Raises:
            EmbeddingFailed: these inputs cannot be embedded.
            EngineDied: it is gone.
        """
        ...

    async def stop(self) -> None:
        """Ends the engine and its child process, within bounded time. May be repeated."""
        ...


class Tokenizer(Protocol):
    """Text to token ids and back, for one model. Pure; may be used from any thread."""

    @property
    def vocabulary_size(self) -> int:
        """Token ids are 0 <= id < vocabulary_size."""
        ...

    @property
    def chat_template(self) -> str:
        """Jinja2 source of the model's chat template; empty when it has none."""
        ...

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts that templates refer to: "bos_token" and "eos_token"; empty text for none."""
        ...

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Turns text into ids. Adds nothing at either end.

        Args:
            text: any text.
            parse_special: whether the text of a control token becomes that token. True for what
                a chat template rendered; False for what a user typed.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token, possibly part of a character; empty for control tokens."""
        ...
