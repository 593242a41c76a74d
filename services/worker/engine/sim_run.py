"""One execution in the simulator."""

from __future__ import annotations

from services.worker.engine.base import EndReason, EngineRequest, Lane
from services.worker.engine.kv_events import KvEvent
from services.worker.engine.sim_cache import PrefixCache, blocks_of, root_of
from services.worker.engine.sim_speaker import Speaker


class Run:
    """One execution in the engine.

    Attributes:
        prompt_left: tokens whose prefill has not happened.
        position: output position of its first token here.
        end: output position at which it ends; it draws no token there.
        reason: why it ends there.
        base: of what it says.
        model_base: the same without its seed, where it asked for log-probabilities.
        request: of the execution.
        speaker: says its output where that is not plain text; None where it is.
        cached_tokens: of the prompt, that the prefix cache had.
        blocks: of the prompt, for the prefix cache.
        first_step: step in which it draws its first token.
        kv_tokens: most tokens that it can ever have in the cache.
        is_over: it has ended; whatever still refers to it drops it.
    """

    __slots__ = (
        "base",
        "blocks",
        "cached_tokens",
        "end",
        "first_step",
        "is_over",
        "kv_tokens",
        "lane",
        "model_base",
        "position",
        "prompt_left",
        "prompt_tokens",
        "reason",
        "request",
        "speaker",
        "stop_token_id",
    )

    def __init__(self, lane: Lane, request: EngineRequest) -> None:
        self.lane = lane
        self.request = request
        self.speaker: Speaker | None = None
        self.cached_tokens = 0
        self.blocks: list[bytes] = []
        self.position = len(request.continue_ids)
        self.prompt_tokens = len(request.prompt_ids)
        self.prompt_left = self.prompt_tokens + self.position
        self.end = max(self.position, request.max_output_tokens)
        self.reason = EndReason.MAX_TOKENS
        self.stop_token_id: int | None = None
        self.base = 0
        self.model_base = 0
        self.first_step = 0
        self.kv_tokens = 0
        self.is_over = False

    def use_cache(self, cache: PrefixCache) -> int:
        """Skips what the prefix cache has, and returns how many tokens that is."""
        self.blocks = blocks_of(self.request.prompt_ids)
        if self.request.reads_cache and not self.request.prompt_logprobs:
            root = root_of(self.request)
            self.cached_tokens = cache.find(root, self.blocks, self.prompt_tokens)
            self.prompt_left -= self.cached_tokens
        return self.cached_tokens

    def fill_cache(self, cache: PrefixCache) -> list[KvEvent]:
        """Lets others skip its prompt; returns what changed in the cache."""
        return cache.keep(root_of(self.request), self.blocks) if self.blocks else []

    def end_at(self, position: int, reason: EndReason) -> None:
        """Ends at a position unless it ends before."""
        if position < self.end:
            self.end = max(position, self.position)
            self.reason = reason

    @property
    def is_silent(self) -> bool:
        """It takes a step to end, in which it says nothing: the model draws what ends it."""
        return self.end == self.position or self.reason in _DRAWN

    @property
    def last_step(self) -> int:
        """Step in which it ends, once it decodes."""
        return self.first_step + self.end - self.position - (not self.is_silent)

    def kv_used(self, step: int) -> int:
        """Returns its tokens in the cache after a step."""
        whole = self.prompt_tokens + self.position
        return whole - self.prompt_left if self.prompt_left else whole + step - self.first_step


_DRAWN = frozenset({EndReason.END_OF_SEQUENCE, EndReason.STOP_TOKEN})
