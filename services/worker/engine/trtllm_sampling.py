"""From a request to the keywords of TensorRT-LLM's SamplingParams.

All that decides what is drawn is written out, since most defaults are not what they seem: 32 tokens
at most, the likeliest token always, the same seed for everybody.

end_id is never set: the engine finds it, and only then it reads stop texts. What else ends an
output of the model goes along with the stop tokens, as versions differ in what they know of it.

Pure: no tensorrt_llm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from services.worker.engine.base import EngineRequest, Sampling

NEVER: Final = -1e4
"""Bias of a token that is not to be drawn. Finite: under a constraint it may be the only one."""

# Below, only tokens that are as good as equal could come beside the likeliest, and logits that are
# divided by it become infinite.
_COLDEST: Final = 1e-5
# Some versions keep seeds in 63 bits; the top bit turns the others over, so that it still counts.
_SEED_BITS: Final = 63
_SEED_MASK: Final = (1 << _SEED_BITS) - 1
_SEED_TURN: Final = 0x1E3779B97F4A7C15


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What ends an output of the model.

    Attributes:
        all_ids: all of it.
        known_id: what the engine knows as such by itself.
    """

    all_ids: frozenset[int]
    known_id: int


def sampling_keywords(
    request: EngineRequest,
    *,
    room: int,
    ends: Ends,
    vocabulary_size: int,
    stop_texts: Sequence[str],
) -> dict[str, object]:
    """Returns keywords; without guided_decoding and embedding_bias, which are objects.

    Args:
        request: of an execution.
        room: most tokens that the engine may draw; at least 1.
        ends: of the model.
        vocabulary_size: of the model.
        stop_texts: that the engine may look for.
    """
    keywords: dict[str, object] = {
        "max_tokens": room,
        "seed": _folded(request.sampling.seed),
        # Ids are all that is wanted, and all of them: the worker knows text better.
        "detokenize": False,
        "include_stop_str_in_output": True,
        **_filters(request.sampling, vocabulary_size),
        **_penalties(request),
    }
    if request.ignore_eos and request.constraint is None:
        # The engine then stops at nothing at all; the rest is taken off here.
        keywords["ignore_eos"] = True
    else:
        keywords["stop_token_ids"] = sorted(ends.all_ids | request.stop_token_ids)
        if stop_texts:
            keywords["stop"] = list(stop_texts)
        least = _least(request)
        if least and request.constraint is None:
            keywords["min_tokens"] = least
    if request.top_logprobs is not None:
        # In some versions 0 means none at all, not even of the token itself.
        keywords["logprobs"] = max(1, request.top_logprobs)
    return keywords


def _folded(seed: int) -> int:
    return (seed & _SEED_MASK) ^ (_SEED_TURN if seed >> _SEED_BITS & 1 else 0)


def _filters(sampling: Sampling, vocabulary_size: int) -> dict[str, object]:
    if sampling.temperature < _COLDEST:
        # One of several ways to say it, and the one that every sampler understands.
        return {"temperature": 1.0, "top_p": 1.0, "top_k": 1}
    keywords: dict[str, object] = {
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        # More than there are is more than some versions survive.
        "top_k": sampling.top_k if sampling.top_k < vocabulary_size else 0,
    }
    if sampling.min_p:
        keywords["min_p"] = float(sampling.min_p)
    return keywords


def _penalties(request: EngineRequest) -> dict[str, object]:
    """Penalties. The engine counts the prompt for all of them, unless it is told how long it is."""
    sampling = request.sampling
    keywords: dict[str, object] = {}
    for name, value in (
        ("frequency_penalty", sampling.frequency_penalty),
        ("presence_penalty", sampling.presence_penalty),
    ):
        if value:
            keywords[name] = float(value)
            keywords["prompt_ignore_length"] = len(request.prompt_ids)
    if sampling.repetition_penalty != 1:
        keywords["repetition_penalty"] = float(sampling.repetition_penalty)
    return keywords


def _least(request: EngineRequest) -> int:
    return max(0, request.min_output_tokens - len(request.continue_ids))


def biases_of(request: EngineRequest, ends: Ends) -> dict[int, float]:
    """Returns what is added to logits, by token.

    Where the end has to wait, those ends that the engine does not know do not come at all: it lets
    go of the one that it knows in time. Under a constraint the engine must neither ignore the end
    nor forbid it, as there may be nothing else to draw, which has ended whole engines: there an end
    that is not wanted comes only where nothing else may.
    """
    biases = dict(request.sampling.logit_bias)
    unwanted: frozenset[int] = frozenset()
    if request.constraint is not None:
        unwanted = ends.all_ids if request.ignore_eos or _least(request) else unwanted
    elif _least(request) and not request.ignore_eos:
        unwanted = ends.all_ids - {ends.known_id}
    return biases | dict.fromkeys(unwanted, NEVER)
