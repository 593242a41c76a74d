"""What LLM() is given, and what it reads before an engine can start."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tokenizers import Tokenizer

from .cache import KvCache
from .configs import KvCacheFields, LoraFields, build
from .engine import EngineConfig
from .language import read_json
from .settings import Settings
from .signatures import Surface


class HuggingFaceTokenizer:
    """The tokenizer of a model directory.

    Attributes:
        eos_token_id: the one that tokenizer_config.json names; no other.
    """

    def __init__(self, folder: Path) -> None:
        """Reads it.

        Raises:
            ValueError: there is none.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"no tokenizer.json in {folder}")
        self.path = path
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        config = folder / "tokenizer_config.json"
        eos = read_json(config).get("eos_token") if config.is_file() else None
        text = eos.get("content") if isinstance(eos, dict) else eos
        found = self.tokenizer.token_to_id(text) if isinstance(text, str) else None
        self.eos_token_id: int | None = found

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turns a text into ids."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return found

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Turns ids into text."""
        found: str = self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return found


@dataclass
class Arguments:
    """The arguments of LLM(), with their defaults, checked."""

    values: dict[str, object]

    def whole(self, name: str, default: int) -> int:
        """One that is a whole number."""
        value = self.values.get(name)
        return value if isinstance(value, int) else default

    def flag(self, name: str) -> bool:
        """One that is yes or no."""
        return bool(self.values.get(name))


def read_arguments(
    surface: Surface,
    signature: inspect.Signature,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> Arguments:
    """Checks what LLM() was given.

    Raises:
        ValueError: an argument is not known.
        TypeError: one has another type.
    """
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    values = dict(bound.arguments)
    extra = cast("dict[str, object]", values.pop("kwargs", {}))
    head, tail = surface.table("LLM.__init__"), surface.table("LLM.__init__.kwargs")
    for name in extra:
        if name not in tail:
            raise ValueError(f"LLM got invalid argument: {name}")
    for name, entry in tail.items():
        values[name] = extra[name] if name in extra else surface.make_default(entry)()
    for name, entry in {**head, **tail}.items():
        if name in values:
            surface.check(f"LLM: {name}", entry.type, values[name])
            values[name] = build(surface, entry.type, values[name])
    return Arguments(values)


def check_devices(given: Arguments, settings: Settings) -> None:
    wanted = given.whole("tensor_parallel_size", 1) * given.whole("pipeline_parallel_size", 1)
    if wanted > settings.gpus:
        raise RuntimeError(f"{wanted} GPUs are needed, but only {settings.gpus} are visible")


def tokenizer_folder(folder: Path, lora: LoraFields) -> Path:
    """Where exactly one adapter is configured, its directory may bring the tokenizer."""
    only = Path(lora.lora_dir[0]) if len(lora.lora_dir) == 1 else folder
    return only if (only / "tokenizer.json").is_file() else folder


def make_cache(
    kv: KvCacheFields, settings: Settings, config: EngineConfig, *, with_salts: bool
) -> KvCache:
    blocks = settings.kv_blocks
    if kv.max_tokens is not None:
        blocks = max(1, kv.max_tokens // kv.tokens_per_block)
    found = [fault.number("window", 64) for fault in settings.named("events_windows")]
    windows = [int(window) for window in found if window]
    return KvCache(
        blocks=blocks,
        tokens_per_block=kv.tokens_per_block,
        reuse=kv.enable_block_reuse,
        partial_reuse=kv.enable_partial_reuse,
        host_bytes=kv.host_cache_size or 0,
        windows=[config.length_max, *windows],
        rank=0 if config.attention_dp else None,
        events_max=kv.event_buffer_max_size,
        with_salts=with_salts,
    )
