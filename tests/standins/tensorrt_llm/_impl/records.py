"""The dataclasses that callers fill in: made from signatures.json, checked strictly.

They check types when they are made and once more when they are used, because a field may have been
set in between.
"""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

import dataclasses
import enum
import json
import os
from pathlib import Path
from typing import ClassVar, Protocol, cast

import pydantic
from typing_extensions import override

from .signatures import Surface, Table

_GREEDY_VARIABLE = "TLLM_ALLOW_N_GREEDY_DECODING"


class LogprobMode(enum.Enum):
    """Of what log-probabilities are computed."""

    RAW = "raw"
    PROCESSED = "processed"


class LogitsProcessor:
    """What changes logits inside the engine. The stand-in has none of its own."""


class Tokenizer(Protocol):
    """What SamplingParams ask of a tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Turns a text into ids."""
        ...


class Checked:
    """A dataclass whose fields have the types of signatures.json."""

    __slots__ = ()
    _surface: ClassVar[Surface]
    _table: ClassVar[Table]

    def __post_init__(self) -> None:
        self._check_types()
        self._validate()

    def _check_types(self) -> None:
        """Raises TypeError where a field has another type."""
        name = type(self).__name__
        for field, entry in self._table.items():
            self._surface.check(f"{name}.{field}", entry.type, getattr(self, field))

    def _validate(self) -> None:
        """Raises ValueError where a field has a value that is refused."""


class GuidedDecodingBase(Checked):
    """What the whole output has to be."""

    __slots__ = ()
    json: str | pydantic.BaseModel | dict[str, object] | None
    regex: str | None
    grammar: str | None
    json_object: bool
    structural_tag: str | None

    @override
    def _validate(self) -> None:
        given = [
            name
            for name in ("json", "regex", "grammar", "structural_tag", "json_object")
            if getattr(self, name) is not None and getattr(self, name) is not False
        ]
        if len(given) > 1:
            raise ValueError(f"only one guide can be used for a request, not {given}")

    def json_text(self) -> str:
        """The schema as text."""
        if isinstance(self.json, pydantic.BaseModel):
            return json.dumps(self.json.model_json_schema())
        return self.json if isinstance(self.json, str) else json.dumps(self.json)


class LoRABase(Checked):
    """Which adapter a request wants."""

    __slots__ = ()
    lora_name: str
    lora_int_id: int
    lora_path: str
    lora_ckpt_source: str

    @override
    def _validate(self) -> None:
        if not self.lora_path or not Path(self.lora_path).exists():
            raise ValueError(f"lora_path ({self.lora_path}) does not exist.")


class SamplingBase(Checked):
    """How a request is sampled. generate_async() fills in what is missing, in place."""

    __slots__ = ("_is_used", "_stop_words", "_stream_interval")
    _is_used: bool
    _stop_words: list[list[int]] | None
    _stream_interval: int
    end_id: int | None
    pad_id: int | None
    max_tokens: int | None
    bad: str | list[str] | None
    bad_token_ids: list[int] | None
    stop: str | list[str] | None
    stop_token_ids: list[int] | None
    include_stop_str_in_output: bool
    embedding_bias: object
    logits_processor: object
    n: int
    best_of: int | None
    use_beam_search: bool
    top_k: int | None
    top_p: float | None
    seed: int | None
    temperature: float | None
    min_tokens: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    min_p: float | None
    logprobs: int | None
    prompt_logprobs: int | None
    return_perf_metrics: bool
    lookahead_config: object
    guided_decoding: GuidedDecodingBase | None
    ignore_eos: bool
    detokenize: bool
    add_special_tokens: bool
    truncate_prompt_tokens: int | None
    skip_special_tokens: bool

    @override
    def __post_init__(self) -> None:
        self._is_used = False
        self._stop_words = None
        self._stream_interval = 1
        if self.best_of is None:
            self.best_of = self.n  # type: ignore[misc] # a slot of what is made of it
        super().__post_init__()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        chosen = (self.temperature, self.top_p, self.top_k)
        is_unset = all(value is None for value in chosen)
        return is_unset or self.top_k == 1 or self.top_p == 0 or self.temperature == 0

    @override
    def _validate(self) -> None:
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"require 0 <= top_p <= 1, got top_p={self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"require top_k >= 0, got top_k={self.top_k}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"require temperature >= 0, got temperature={self.temperature}")
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens < 1:
            raise ValueError("require truncate_prompt_tokens >= 1")
        self._validate_count()
        if self.guided_decoding is not None:
            self.guided_decoding._validate()

    def _validate_count(self) -> None:
        best_of = self.best_of or self.n
        if best_of < self.n:
            raise ValueError(f"require best_of >= n, got best_of={best_of} and n={self.n}")
        allowed = os.environ.get(_GREEDY_VARIABLE) == "1"  # noqa: TID251 - its interface
        if best_of > 1 and self.is_greedy and not self.use_beam_search and not allowed:
            raise ValueError(f"greedy decoding in the LLM API does not allow best_of={best_of}")

    def begin(self, tokenizer: Tokenizer | None, stream_interval: int) -> None:
        """Fills in what the engine needs: once.

        Raises:
            AssertionError: it has been used before. The real one would mix two requests.
            RuntimeError: stop texts with an end_id, which they are not tokenised with.
            ValueError: there is neither a tokenizer nor an end_id.
        """
        assert not self._is_used, "SamplingParams are changed in use: make new ones per request"
        self._is_used = True
        self._check_types()
        self._validate()
        self._stream_interval = stream_interval
        if self.end_id is None:
            self._set_up(tokenizer)
        elif self._texts(self.stop) or self._texts(self.bad):
            raise RuntimeError(
                "SamplingParams.stop is not processed by tokenizer, please call the setup method"
            )
        else:
            self._stop_words = []

    def _set_up(self, tokenizer: Tokenizer | None) -> None:
        if tokenizer is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        self.end_id = tokenizer.eos_token_id  # type: ignore[misc] # a slot of what is made of it
        if self.pad_id is None:
            self.pad_id = self.end_id  # type: ignore[misc] # a slot of what is made of it
        self._stop_words = [
            tokenizer.encode(text, add_special_tokens=False) for text in self._texts(self.stop)
        ]

    @staticmethod
    def _texts(value: str | list[str] | None) -> list[str]:
        if value is None:
            return []
        return [value] if isinstance(value, str) else value

    def stop_reasons_and_words(self) -> list[tuple[int | str, list[int]]]:
        """What ends an output, and the ids that it has then."""
        ids: list[tuple[int | str, list[int]]] = [
            (token_id, [token_id]) for token_id in self.stop_token_ids or []
        ]
        return ids + list(zip(self._texts(self.stop), self._stop_words or [], strict=False))


def make_record(surface: Surface, name: str, base: type, *, keywords_only: bool = True) -> type:
    """Makes a dataclass from its table and names it for types to come."""
    table = surface.table(name)
    fields: list[tuple[str, str, object]] = []
    for field, entry in table.items():
        make = surface.make_default(entry)
        plain = make()
        if entry.required:
            fields.append((field, entry.type, dataclasses.field()))
        elif isinstance(plain, list | dict):
            fields.append((field, entry.type, dataclasses.field(default_factory=make)))
        else:
            fields.append((field, entry.type, dataclasses.field(default=plain)))
    made = dataclasses.make_dataclass(
        name,
        cast("list[tuple[str, object, dataclasses.Field[object]]]", fields),
        bases=(base,),
        kw_only=keywords_only,
        slots=True,
    )
    base._surface, base._table = surface, table  # type: ignore[attr-defined]
    made.__module__ = "tensorrt_llm"
    surface.names[name] = made
    return made
