"""What the trtllm engine uses of TensorRT-LLM, as types; imports nothing of it.

TensorRT-LLM is installed only where there is a GPU, and its types are not for type checkers. These
are the shapes that are there in all supported versions; what comes and goes is found by
trtllm_surface.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol, TypeVar

MadeT_co = TypeVar("MadeT_co", covariant=True)


class Make(Protocol[MadeT_co]):
    """A class of TensorRT-LLM. Called with keywords only: their order changes between versions."""

    def __call__(self, **keywords: object) -> MadeT_co:
        """Makes one."""
        ...


class CompletionOutput(Protocol):
    """One output of a request. What it holds is of the whole output so far.

    Attributes:
        token_ids: of the output.
        logprobs: one for each token: {token id: entry with `logprob`}, or a plain number; or
            nothing. May be longer than token_ids for a moment.
        prompt_logprobs: likewise, of the prompt.
        finish_reason: "stop", "length", "cancelled", "timeout"; None until then, and sometimes
            even then.
        stop_reason: stop text or stop token that matched; None for the end of a sequence.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[object] | None
    prompt_logprobs: Sequence[object] | None
    finish_reason: str | None
    stop_reason: int | str | None


class RequestOutput(Protocol):
    """A running request. Every iteration yields this same object, changed in place.

    Attributes:
        outputs: of the request.
        finished: nothing more comes.
        cached_tokens: prompt tokens that the prefix cache had; known with the first token.
    """

    outputs: Sequence[CompletionOutput]
    finished: bool
    cached_tokens: int

    def abort(self) -> None:
        """Asks for the end; does not wait for it."""
        ...

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        """Steps of the request. Not to be iterated any more once it has raised."""
        ...


class Records(Protocol):
    """Statistics or events that have not been read yet; of one consumer."""

    def __aiter__(self) -> AsyncIterator[Mapping[str, object] | str]:
        """Them, in order; ends when there are no more within the time that was asked for."""
        ...


class Executor(Protocol):
    """What stands between LLM and the processes that compute."""

    def is_shutdown(self) -> bool:
        """Whether it has been shut down, by a fault or on purpose."""
        ...


class Llm(Protocol):
    """An engine. All calls belong to one thread and one event loop."""

    def generate_async(self, **keywords: object) -> RequestOutput:
        """Queues a request; does not wait."""
        ...

    def get_stats_async(self, timeout: float) -> Records:
        """Statistics of iterations; see Surface.has_stats."""
        ...

    def get_kv_cache_events_async(self, timeout: float) -> Records:
        """Events of the KV cache; see Surface.has_kv_events."""
        ...

    def shutdown(self) -> None:
        """Ends the engine. May block for ever when it is broken."""
        ...
