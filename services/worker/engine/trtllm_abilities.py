"""What an installed TensorRT-LLM can do with a model, and does as it is meant. Pure.

Most of it is seen by looking. Not so what older versions take and leave out in silence: there only
the number of the version says it. Numbers are chosen so that nothing is promised too early.

Never promised: log-probabilities of prompts (TensorRT-LLM tells the likeliest tokens of each place,
which need not be the prompt's, and nothing for what came from the cache), and embeddings.
"""

from __future__ import annotations

import re
from typing import Final

from services.worker.engine.base import EngineAbilities
from services.worker.engine.trtllm_arguments import draws_in_graph
from services.worker.engine.trtllm_guided import kinds_of
from services.worker.engine.trtllm_settings import TrtllmSettings
from services.worker.engine.trtllm_surface import Surface

TOP_LOGPROBS_MAX: Final = 20
"""Most alternatives with a log-probability."""

NO_BACKEND: Final = "none"

Version = tuple[int, int, int, int]

# Before, a prompt that was longer than min_tokens made it do nothing.
_COUNTS_MIN_TOKENS: Final[Version] = (1, 3, 0, 14)
# Before, penalties and min_p were taken and had no effect.
_PENALIZES: Final[Version] = (1, 3, 0, 26)
_VERSION: Final = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(?:rc(\d+))?")
_FINAL: Final = 1 << 16


def version_of(text: str) -> Version:
    """Reads a version; a candidate for a release comes before it. Zeros where it is none."""
    found = _VERSION.match(text)
    if found is None:
        return (0, 0, 0, 0)
    major, minor, patch, candidate = found.groups()
    return (int(major), int(minor), int(patch or 0), int(candidate or _FINAL))


def backend_of(settings: TrtllmSettings) -> str | None:
    """Returns who enforces constraints; None for nobody."""
    name = settings.values("guided_decoding").text("backend")
    return None if name == NO_BACKEND else name


def abilities_of(
    settings: TrtllmSettings, surface: Surface, *, has_tensors: bool, end_count: int
) -> EngineAbilities:
    """Works out what can be promised.

    Args:
        settings: of the worker.
        surface: of the installed version.
        has_tensors: biases can be made.
        end_count: tokens that end an output of the model. TensorRT-LLM knows one of them as such.
    """
    version, fields = version_of(surface.version), frozenset(surface.sampling.defaults)
    is_usual = not draws_in_graph(settings, surface)
    penalizes = is_usual and version >= _PENALIZES and "prompt_ignore_length" in fields
    biases = is_usual and has_tensors and "embedding_bias" in fields
    counts = is_usual and version >= _COUNTS_MIN_TOKENS and "min_tokens" in fields
    guided = frozenset() if surface.guided is None else frozenset(surface.guided.defaults)
    events = settings.values("statistics").flag("kv_events")
    cache = settings.values("kv_cache")
    return EngineAbilities(
        constraints=kinds_of(backend_of(settings), guided),
        min_p=is_usual and version >= _PENALIZES and "min_p" in fields,
        penalties=penalizes and {"frequency_penalty", "presence_penalty"} <= fields,
        repetition_penalty=penalizes and "repetition_penalty" in fields,
        logit_bias=biases,
        # What it does not know as an end is kept away by a bias.
        min_output_tokens=counts and (biases or end_count == 1),
        ignore_eos=True,
        max_top_logprobs=TOP_LOGPROBS_MAX if is_usual and "logprobs" in fields else None,
        adapters=settings.values("lora").flag("enabled"),
        prompt_cache=cache.flag("reuse"),
        kv_block_tokens=cache.integer("tokens_per_block") if events else 0,
    )
