"""What generate_async() returns: one mutable object, filled in as it is read.

Nothing is taken from the engine but by whoever iterates, one step at a time. An error does not end
it: who iterates again waits for ever.
"""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .records import SamplingBase

Item = TypeVar("Item")
_NO_LOOP = (
    "The asyncio event loop was not present during initialization, so async operations are not"
    " available."
)


class RequestError(RuntimeError):
    """One request has failed; the engine goes on."""


class EngineDeadError(RuntimeError):
    """The engine has died."""


@dataclass(slots=True)
class Logprob:
    """One token's log-probability."""

    logprob: float
    rank: int | None = None


Scores = list[dict[int, Logprob]]


@dataclass(slots=True)
class CompletionOutput:
    """One sequence: all of it so far."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: Scores | list[float] = field(default_factory=list)
    prompt_logprobs: Scores = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    generation_logits: object = None
    additional_context_outputs: dict[str, object] | None = None
    additional_generation_outputs: dict[str, object] | None = None
    disaggregated_params: object = None
    request_perf_metrics: object = None
    _postprocess_result: object = None
    _last_text_len: int = field(default=0, init=False, repr=False)
    _last_token_ids_len: int = field(default=0, init=False, repr=False)
    _last_logprobs_len: int = field(default=0, init=False, repr=False)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        """Text since the step before."""
        return self.text[self._last_text_len :]

    @property
    def token_ids_diff(self) -> list[int]:
        """Tokens since the step before, of this sequence."""
        return self.token_ids[self._last_token_ids_len :]

    @property
    def logprobs_diff(self) -> Scores | list[float]:
        """Log-probabilities since the step before, of this sequence."""
        return self.logprobs[self._last_logprobs_len :]


@dataclass(slots=True, kw_only=True)
class Response:
    """What the engine says about one sequence after a step.

    Attributes:
        sequence: its number.
        token_ids: new ones.
        scores: of the new ones.
        prompt_scores: with the first response only.
        reason: why the sequence has ended; "" while it has not.
        is_final: the whole request has ended.
        cached_tokens: of the prompt, from the KV cache.
        iteration: how many steps the request has seen.
        stray: a score too many, which the next response takes back.
        is_unknown: the end comes without a reason.
        error: the request has failed: a text, or what the whole engine died of.
    """

    sequence: int = 0
    token_ids: list[int] = field(default_factory=list)
    scores: Scores | list[float] = field(default_factory=list)
    prompt_scores: Scores | None = None
    reason: str = ""
    is_final: bool = False
    cached_tokens: int = 0
    iteration: int = 0
    stray: bool = False
    is_unknown: bool = False
    error: str | Exception | None = None


class Mailbox(Generic[Item]):
    """A queue from the engine's thread to one reader: in an event loop, or in any thread."""

    def __init__(self, maxlen: int | None = None) -> None:
        self.items: deque[Item] = deque(maxlen=maxlen)
        try:
            self.loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self.loop = None
        self._arrived = asyncio.Event()
        self._sync: queue.SimpleQueue[None] = queue.SimpleQueue()

    def put(self, item: Item) -> None:
        """Adds an item; `wake` has to follow in the loop."""
        self.items.append(item)
        if self.loop is None:
            self._sync.put(None)

    def wake(self) -> None:
        """Tells the reader; in its loop."""
        self._arrived.set()

    async def get(self, timeout_s: float | None = None) -> Item:
        """Waits for an item.

        Raises:
            AssertionError: there was no running loop when it was made.
            TimeoutError: none has come.
        """
        assert self.loop is not None, _NO_LOOP
        async with asyncio.timeout(timeout_s):
            while not self.items:
                self._arrived.clear()
                await self._arrived.wait()
        return self.items.popleft()

    def get_sync(self, timeout_s: float | None = None) -> Item:
        """Waits for an item, blocking the thread.

        Raises:
            queue.Empty: none has come.
        """
        if self.loop is not None and not self.items:
            raise queue.Empty
        if self.loop is None:
            self._sync.get(timeout=timeout_s)
        return self.items.popleft()


class Handler:
    """What a result asks of the executor that it came from."""

    def handle_background_error(self, error: str | Exception | None = None) -> None:
        """Raises an error that has come, whosever it is."""

    def abort_request(self, request_id: int) -> None:
        """Asks the engine to stop a request."""

    def decode(self, token_ids: list[int], *, skip_special: bool) -> str:
        """Turns ids into text."""
        raise NotImplementedError


class GenerationResult:
    """A request under way."""

    def __init__(self, request_id: int, prompt_token_ids: list[int], params: SamplingBase) -> None:
        self.request_id = request_id
        self.prompt: str | None = None
        self.prompt_token_ids = prompt_token_ids
        self.sampling_params = params
        self.context_logits: object = None
        self.mm_embedding_handle: dict[str, object] | None = None
        self.disaggregated_params: object = None
        self.decoding_iter = 0
        self.cached_tokens = 0
        self.avg_decoded_tokens_per_iter: float | None = None
        self.metrics_dict: dict[str, float] = {}
        self.queue: Mailbox[Response] = Mailbox()
        self._outputs = [CompletionOutput(index) for index in range(params.best_of or 1)]
        self._done = self._aborted = False
        self._handler: Callable[[], Handler | None] = lambda: None

    def _connect(self, handler: Callable[[], Handler | None]) -> None:
        self._handler = handler

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The sequences that were asked for."""
        wanted = self.sampling_params.n
        if wanted == len(self._outputs):
            return self._outputs
        return sorted(self._outputs, key=lambda one: -(one.cumulative_logprob or 0.0))[:wanted]

    @property
    def finished(self) -> bool:
        """Whether the last item has been read. An error never makes it so."""
        return self._done

    def abort(self) -> None:
        """Asks the engine to stop; the last item comes later.

        Raises:
            AttributeError: the engine has been shut down.
        """
        handler = self._handler()
        handler.abort_request(self.request_id)  # type: ignore[union-attr] # as it fails there
        self._aborted = True

    def aborted(self) -> bool:
        """Whether abort() was called."""
        return self._aborted

    def clear_logprob_params(self) -> None:
        """Nothing that can be seen from outside."""

    def __aiter__(self) -> GenerationResult:
        return self

    async def __anext__(self) -> GenerationResult:
        if self._done:
            raise StopAsyncIteration
        self._handle(await self.queue.get())
        return self

    def __await__(self) -> Generator[object, None, GenerationResult]:
        return self.aresult().__await__()

    async def aresult(self) -> GenerationResult:
        """Waits for the end."""
        while not self._done:
            self._handle(await self.queue.get())
        return self

    def __iter__(self) -> GenerationResult:
        return self

    def __next__(self) -> GenerationResult:
        if self._done:
            raise StopIteration
        self._handle(self.queue.get_sync())
        return self

    def result(self, timeout: float | None = None) -> GenerationResult:  # noqa: ARG002 - ignored there too
        """Waits for the end, blocking the thread for as long as it takes."""
        while not self._done:
            self._handle(self.queue.get_sync())
        return self

    def _handle(self, response: Response) -> None:
        handler = self._handler()
        if response.error is not None:
            assert handler is not None
            handler.handle_background_error(response.error)
        self._done = response.is_final
        self.decoding_iter = response.iteration
        self.cached_tokens = response.cached_tokens
        output = self._outputs[response.sequence]
        self._extend(output, response)
        if response.reason == "cancelled":
            output.finish_reason = "cancelled"
        if self._done:
            self._finish(output, response)
        if self.sampling_params.detokenize and handler is not None:
            self._detokenize(output, handler)
        if handler is not None:
            # Whoever comes along finds out what has become of the engine.
            handler.handle_background_error()

    def _extend(self, output: CompletionOutput, response: Response) -> None:
        output._last_token_ids_len = len(output.token_ids)
        output.token_ids.extend(response.token_ids)
        self.avg_decoded_tokens_per_iter = len(output.token_ids) / max(1, response.iteration)
        if response.prompt_scores is not None:
            output.prompt_logprobs = response.prompt_scores
        # A score too many of the step before is taken back.
        kept = len(output.token_ids) - len(response.token_ids)
        output.logprobs = output.logprobs[:kept]
        output._last_logprobs_len = len(output.logprobs)
        output.logprobs = [*output.logprobs, *response.scores]
        if response.stray and response.scores:
            output.logprobs.append(response.scores[-1])  # type: ignore[arg-type] # one kind each

    def _finish(self, output: CompletionOutput, response: Response) -> None:
        reason = response.reason
        if response.is_unknown:
            return
        if reason == "stop_words":
            self._cut(output)
            reason = "stop"
        output.finish_reason = "stop" if reason == "end_id" else reason

    def _cut(self, output: CompletionOutput) -> None:
        for reason, word in self.sampling_params.stop_reasons_and_words():
            if word and output.token_ids[-len(word) :] == word:
                output.stop_reason = reason
                if not self.sampling_params.include_stop_str_in_output:
                    output.token_ids = output.token_ids[: -len(word)]
                return

    def _detokenize(self, output: CompletionOutput, handler: Handler) -> None:
        params = self.sampling_params
        output._last_text_len = len(output.text)
        text = handler.decode(output.token_ids, skip_special=params.skip_special_tokens)
        output.text = text
        if output.finish_reason == "cancelled" or params.ignore_eos:
            return
        stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
        for stop in stops:
            at = text.find(stop)
            if at >= 0:
                kept = at + len(stop) if params.include_stop_str_in_output else at
                output.text = text[:kept]
                output.stop_reason, output.finish_reason = stop, "stop"
                if not self._done:
                    self._done = True
                    self.abort()
                return


class RequestOutput(GenerationResult):
    """What callers see: `GenerationResult` with the prompt."""
