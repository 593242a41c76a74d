"""The nested configurations of LLM(): pydantic models made from signatures.json."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, Optional, cast

import pydantic

from .records import Checked, make_record
from .signatures import Entry, Surface

CONFIGS = (
    "KvCacheConfig",
    "DynamicBatchConfig",
    "SchedulerConfig",
    "CudaGraphConfig",
    "PeftCacheConfig",
    "CacheTransceiverConfig",
)
_LORA_BECAME_STRICT = "1.3.0rc26"


class CapacitySchedulerPolicy(str, enum.Enum):  # noqa: UP042 - as it is there
    """Who may run when the KV cache is full."""

    MAX_UTILIZATION = "MAX_UTILIZATION"
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    STATIC_BATCH = "STATIC_BATCH"


class ContextChunkingPolicy(str, enum.Enum):  # noqa: UP042 - as it is there
    """Who gets the tokens of a step when prompts are cut into chunks."""

    FIRST_COME_FIRST_SERVED = "FIRST_COME_FIRST_SERVED"
    EQUAL_PROGRESS = "EQUAL_PROGRESS"


class StrictBaseModel(pydantic.BaseModel):
    """Refuses unknown fields and other types."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


class DecodingBaseConfig(StrictBaseModel):
    """How tokens are guessed ahead."""


class KvCacheFields(pydantic.BaseModel):
    """What the stand-in reads of a KvCacheConfig."""

    enable_block_reuse: bool = True
    max_tokens: int | None = None
    host_cache_size: int | None = None
    event_buffer_max_size: int = 0
    enable_partial_reuse: bool = True
    tokens_per_block: int = 32


class LoraFields(pydantic.BaseModel):
    """What the stand-in reads of a LoraConfig."""

    lora_dir: list[str] = []
    max_lora_rank: int = 64
    max_loras: int | None = None
    max_cpu_loras: int | None = None


def make_configs(surface: Surface) -> None:
    """Makes all of them, and names them for types to come."""
    surface.names |= {
        "BaseModel": pydantic.BaseModel,
        "CapacitySchedulerPolicy": CapacitySchedulerPolicy,
        "ContextChunkingPolicy": ContextChunkingPolicy,
        "DecodingBaseConfig": DecodingBaseConfig,
        "KvCacheConnectorConfig": _opaque("KvCacheConnectorConfig"),
    }
    for name in CONFIGS:
        surface.names[name] = _model(surface, name, StrictBaseModel)
    types = cast("dict[str, str]", surface.section("decoding_types"))
    for name in types.values():
        surface.names[name] = _model(surface, name, DecodingBaseConfig)
    if surface.is_since(_LORA_BECAME_STRICT):
        surface.names["LoraConfig"] = _model(surface, "LoraConfig", StrictBaseModel)
    else:
        make_record(surface, "LoraConfig", _LoraConfig, keywords_only=False)


def make_arguments(surface: Surface) -> None:
    """Makes the class whose fields say what LLM() takes besides its own parameters."""
    tables = ("LLM.__init__", "LLM.__init__.kwargs")
    fields: dict[str, object] = {
        name: (object, _field(surface, entry))
        for table in tables
        for name, entry in surface.table(table).items()
    }
    surface.names["TorchLlmArgs"] = pydantic.create_model(  # type: ignore[call-overload]
        "TorchLlmArgs", __base__=StrictBaseModel, __module__="tensorrt_llm", **fields
    )


class _LoraConfig(Checked):
    """The older kind of LoraConfig: no pydantic model."""

    __slots__ = ()


def _opaque(name: str) -> type:
    """A class that the stand-in knows by name only."""
    return type(name, (), {"__module__": "tensorrt_llm"})


def opaque_classes(surface: Surface, names: tuple[str, ...]) -> None:
    """Names classes that the stand-in cannot do anything with."""
    surface.names |= {name: _opaque(name) for name in names}


def _model(surface: Surface, name: str, base: type[StrictBaseModel]) -> type[pydantic.BaseModel]:
    fields: dict[str, object] = {
        field: (_field_type(surface, entry), _field(surface, entry))
        for field, entry in surface.table(name).items()
    }
    made: type[pydantic.BaseModel] = pydantic.create_model(  # type: ignore[call-overload]
        name, __base__=base, __module__="tensorrt_llm", **fields
    )
    return made


def _field_type(surface: Surface, entry: Entry) -> object:
    found = surface.names.get(entry.type.partition("|")[0])
    if not (isinstance(found, type) and issubclass(found, enum.Enum)):
        return surface.type_of(entry.type)
    # An enumeration may be given by its value.
    by_value = Annotated[found, pydantic.Field(strict=False)]  # type: ignore[valid-type]
    return Optional[by_value] if "None" in entry.type else by_value  # noqa: UP045 - at run time


def _field(surface: Surface, entry: Entry) -> object:
    if entry.required:
        return pydantic.Field()
    make = surface.make_default(entry)
    plain = make()
    if isinstance(plain, list | dict):
        return pydantic.Field(default_factory=make)
    return pydantic.Field(default=plain)


def build(surface: Surface, text: str, value: object) -> object:
    """Makes the configuration that a dict stands for; anything else stays as it is.

    Raises:
        pydantic.ValidationError: it has unknown fields or other types.
        ValueError: it is one of speculation, of a type that is not known.
    """
    if not isinstance(value, Mapping):
        return value
    fields = dict(value)
    name = text.partition("|")[0]
    if name == "DecodingBaseConfig":
        types = cast("dict[str, str]", surface.section("decoding_types"))
        kind = fields.pop("decoding_type", None)
        if kind not in types:
            raise ValueError(f"Invalid decoding type: {kind}")
        name = types[str(kind)]
    found = surface.names[name]
    if isinstance(found, type) and issubclass(found, pydantic.BaseModel):
        return found.model_validate(fields)
    return value


def as_dict(value: object) -> dict[str, object]:
    """The fields of a configuration of either kind."""
    if isinstance(value, pydantic.BaseModel):
        return {name: getattr(value, name) for name in type(value).model_fields}
    if value is None:
        return {}
    return {name: getattr(value, name) for name in getattr(value, "__dataclass_fields__", {})}
