"""Puts every name where its version has it: tensorrt_llm.sampling_params and so on."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import cast

from .configs import make_arguments, make_configs, opaque_classes
from .llm import make_llm
from .records import (
    Checked,
    GuidedDecodingBase,
    LogitsProcessor,
    LogprobMode,
    LoRABase,
    SamplingBase,
    make_record,
)
from .results import (
    CompletionOutput,
    EngineDeadError,
    GenerationResult,
    Logprob,
    RequestError,
    RequestOutput,
)
from .settings import read
from .signatures import Surface
from .statistics import IterationResult

_PACKAGE = "tensorrt_llm"
_OPAQUE = (
    "ConversationParams",
    "KvCacheRetentionConfig",
    "LookaheadDecodingConfig",
    "PostprocParams",
    "PromptAdapterRequest",
)


class _Params(Checked):
    """Parameters that the stand-in takes and does nothing with."""

    __slots__ = ()


class _DisaggregatedParams(Checked):
    """Parameters of serving in two pieces."""

    __slots__ = ()


def install() -> Surface:
    """Makes the surface that the environment asks for, and its modules.

    Raises:
        ValueError: the environment asks for what is not known.
    """
    settings = read()
    surface = Surface(settings)
    names = cast("dict[str, object]", surface.section("features"))
    unknown = set(settings.features) - set(names)
    if unknown:
        raise ValueError(f"there are no features {sorted(unknown)}; there are {sorted(names)}")
    surface.settings = replace(settings, features={name: surface.has(name) for name in names})
    _make_names(surface)
    modules = cast("dict[str, list[str]]", surface.section("imports"))
    for module, members in modules.items():
        if _is_there(surface, module):
            _fill(surface, module, members)
    return surface


def _make_names(surface: Surface) -> None:
    surface.names |= {
        "LogprobMode": LogprobMode,
        "LogitsProcessor": LogitsProcessor,
        "Logprob": Logprob,
        "CompletionOutput": CompletionOutput,
        "GenerationResult": GenerationResult,
        "RequestOutput": RequestOutput,
        "IterationResult": IterationResult,
        "RequestError": RequestError,
    }
    if surface.has("EngineDeadError"):
        surface.names["EngineDeadError"] = EngineDeadError
    opaque_classes(surface, _OPAQUE)
    make_configs(surface)
    make_record(surface, "GuidedDecodingParams", GuidedDecodingBase)
    make_record(surface, "LoRARequest", LoRABase, keywords_only=False)
    make_record(surface, "SchedulingParams", _Params)
    make_record(surface, "DisaggregatedParams", _DisaggregatedParams, keywords_only=False)
    make_record(surface, "SamplingParams", SamplingBase)
    make_arguments(surface)
    surface.names["LLM"] = make_llm(surface)


def _is_there(surface: Surface, module: str) -> bool:
    """Whether a module has not moved away, or has come already."""
    moves = cast("dict[str, dict[str, object]]", surface.section("moves"))
    for move in moves.values():
        has_moved = surface.is_since(str(move["since"]))
        if module in cast("list[str]", move["from"]) and has_moved:
            return False
        if module in cast("list[str]", move["to"]) and not has_moved:
            return False
    return True


def _fill(surface: Surface, name: str, members: list[str]) -> None:
    module = _module(name)
    for member in members:
        if member == "ConversationParams" and not surface.is_since("1.3.0rc21"):
            continue
        if member in surface.names:
            setattr(module, member, surface.names[member])


def _module(name: str) -> ModuleType:
    """A module, with those that it is in."""
    found = sys.modules.get(name)
    if found is not None:
        return found
    found = ModuleType(name, "A part of the stand-in for tensorrt_llm.")
    found.__path__ = []
    sys.modules[name] = found
    outer, _, own = name.rpartition(".")
    setattr(_module(outer), own, found)
    return found
