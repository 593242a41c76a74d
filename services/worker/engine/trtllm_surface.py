"""What the installed TensorRT-LLM offers: found by looking, not by its version.

Between releases and their candidates, arguments and fields come, go and move; so the adapter asks
the classes themselves, and refuses to start where something is missing that it cannot do without.
Importing tensorrt_llm takes seconds, prints, and starts MPI: it happens in `detect`, in the child
process of the engine, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, cast

from services.worker.engine.base import EngineStartError
from services.worker.engine.trtllm_api import Llm, Make

PACKAGE: Final = "tensorrt_llm"
OLDEST: Final = (1, 2)

QUIET: Final[Mapping[str, str]] = {
    # Newer versions tell NVIDIA what they run, and on what, unless they are asked not to.
    "TRTLLM_NO_USAGE_STATS": "1",
    # What is missing in a model directory is an error here, and nothing to be downloaded.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Variables that keep tensorrt_llm, and what it imports, from calling out."""

REQUIRED: Final = "required"
"""Default of a field that has none."""

_VERSION: Final = re.compile(r"(\d+)\.(\d+)")
_ERROR_SHOWN: Final = 300

# Where a class may stand, in the order in which it is looked for.
_PLACES: Final[Mapping[str, tuple[str, ...]]] = {
    "LLM": ("tensorrt_llm", "tensorrt_llm.llmapi"),
    "TorchLlmArgs": ("tensorrt_llm.llmapi.llm_args", "tensorrt_llm.llmapi"),
    "SamplingParams": ("tensorrt_llm", "tensorrt_llm.sampling_params"),
    "GuidedDecodingParams": ("tensorrt_llm.sampling_params", "tensorrt_llm.llmapi"),
    "LoRARequest": ("tensorrt_llm.executor.request", "tensorrt_llm.executor"),
    "RequestError": ("tensorrt_llm.executor.utils", "tensorrt_llm.executor"),
    "EngineDeadError": ("tensorrt_llm.executor", "tensorrt_llm.executor.utils"),
    "LoraConfig": (
        "tensorrt_llm.lora_helper",
        "tensorrt_llm._torch.peft.lora.config",
        "tensorrt_llm.lora_manager",
    ),
}
_CONFIG_PLACES: Final = ("tensorrt_llm.llmapi", "tensorrt_llm.llmapi.llm_args")
_CONFIGS: Final = (
    "KvCacheConfig",
    "SchedulerConfig",
    "CudaGraphConfig",
    "LoraConfig",
    "Eagle3DecodingConfig",
    "EagleDecodingConfig",
    "MTPDecodingConfig",
    "NGramDecodingConfig",
    "DraftTargetDecodingConfig",
)
_CONFIGS_NEEDED: Final = frozenset({"KvCacheConfig", "SchedulerConfig", "CudaGraphConfig"})
# What the adapter cannot do without, and what would be wrong without it.
_NEEDED: Final[Mapping[str, Mapping[str, str]]] = {
    "LLM()": {
        "model": "",
        "trust_remote_code": "code in a model directory could run",
        "tensor_parallel_size": "",
        "max_batch_size": "",
        "max_num_tokens": "",
        "max_seq_len": "",
        "kv_cache_config": "",
        "scheduler_config": "",
    },
    "LLM.generate_async()": {
        "inputs": "",
        "sampling_params": "",
        "streaming": "",
        "cache_salt": "tenants would share one prefix cache",
    },
    "SamplingParams": {
        "max_tokens": "",
        "temperature": "",
        "top_p": "",
        "top_k": "",
        "seed": "",
        "end_id": "",
        "stop_token_ids": "",
        "include_stop_str_in_output": "",
        "detokenize": "",
        "ignore_eos": "",
    },
}


@dataclass(frozen=True, slots=True)
class Config:
    """A class for a part of the configuration, or for the parameters of a request.

    Attributes:
        name: of the class.
        make: the class.
        defaults: by field; REQUIRED for those that have none.
    """

    name: str
    make: Make[object]
    defaults: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """What there is.

    Attributes:
        version: as TensorRT-LLM calls itself.
        llm: makes an engine; blocks for minutes.
        llm_arguments: that it takes.
        generate_parameters: of generate_async.
        sampling: SamplingParams.
        guided: GuidedDecodingParams; None when there are none.
        lora_request: makes what says which adapter a request wants; None when there is none.
        request_error: what fails one request. Anything else that generate_async's result raises is
            the end of the engine.
        engine_dead_error: what all requests get when the engine has died; None where there is no
            such thing.
        configs: those of _CONFIGS that are there, by name.
        methods: public and known private methods of LLM.
    """

    version: str
    llm: Make[Llm]
    llm_arguments: frozenset[str]
    generate_parameters: frozenset[str]
    sampling: Config
    guided: Config | None
    lora_request: Make[object] | None
    request_error: type[Exception]
    engine_dead_error: type[Exception] | None
    configs: Mapping[str, Config]
    methods: frozenset[str]

    @property
    def has_stats(self) -> bool:
        """It tells statistics of iterations."""
        return "get_stats_async" in self.methods

    @property
    def has_kv_events(self) -> bool:
        """It tells events of the KV cache."""
        return "get_kv_cache_events_async" in self.methods

    @property
    def has_health_check(self) -> bool:
        """It says by itself whether it is alive; a private method of newer versions."""
        return "_check_health" in self.methods

    def describe(self) -> str:
        """One line for the log: what differs between versions."""
        features = {
            "trace_headers": "trace_headers" in self.generate_parameters,
            "priority": "priority" in self.generate_parameters,
            "scheduling_params": "scheduling_params" in self.generate_parameters,
            "lora": self.lora_request is not None and "LoraConfig" in self.configs,
            "guided": self.guided is not None,
            "stats": self.has_stats,
            "kv_events": self.has_kv_events,
            "health_check": self.has_health_check,
            "engine_dead_error": self.engine_dead_error is not None,
            "logprobs_mode": "logprobs_mode" in self.sampling.defaults,
            "logprobs_simple_format": "logprobs_simple_format" in self.sampling.defaults,
        }
        there = " ".join(name for name, is_there in features.items() if is_there)
        absent = " ".join(name for name, is_there in features.items() if not is_there)
        return (
            f"TensorRT-LLM {self.version}: {len(self.llm_arguments)} arguments of LLM(), "
            f"{len(self.sampling.defaults)} of SamplingParams; with {there or 'nothing'}; "
            f"without {absent or 'nothing'}; speculation by {self._speculations() or 'nothing'}"
        )

    def _speculations(self) -> str:
        return " ".join(name for name in self.configs if name.endswith("DecodingConfig"))


def detect() -> Surface:
    """Imports TensorRT-LLM and looks at it. Takes seconds; once for each process.

    Sets QUIET in the environment of this process before.

    Raises:
        EngineStartError: it is not there, too old, or lacks what the adapter needs.
    """
    os.environ.update(QUIET)  # noqa: TID251 - it is the only way to say this to what is imported
    version = _check_version(_import_package())
    llm = _require("LLM")
    sampling = _config("SamplingParams", _require("SamplingParams"))
    generate = _parameters(getattr(llm, "generate_async", None))
    arguments = _llm_arguments(llm)
    found = {
        "LLM()": arguments,
        "LLM.generate_async()": generate,
        "SamplingParams": frozenset(sampling.defaults),
    }
    for owner, names in found.items():
        _check_needed(owner, names, version)
    request_error = _exception("RequestError")
    if request_error is None:
        raise EngineStartError(
            f"TensorRT-LLM {version} has no RequestError, without which a failed request cannot be "
            "told from a dead engine: install another version"
        )
    guided, lora_request = _find("GuidedDecodingParams"), _find("LoRARequest")
    return Surface(
        version=version,
        llm=cast("Make[Llm]", llm),
        llm_arguments=arguments,
        generate_parameters=generate,
        sampling=sampling,
        guided=None if guided is None else _config("GuidedDecodingParams", guided),
        lora_request=cast("Make[object] | None", lora_request),
        request_error=request_error,
        engine_dead_error=_exception("EngineDeadError"),
        configs=_find_configs(version),
        methods=frozenset(name for name in dir(llm) if callable(getattr(llm, name, None))),
    )


def _import_package() -> object:
    try:
        return importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        if error.name != PACKAGE:
            raise _unusable(error) from error
        raise EngineStartError(
            "TensorRT-LLM is not installed: run the worker in NVIDIA's release container, or "
            "install its extra `trtllm` on a machine with an NVIDIA GPU"
        ) from None
    # Its own libraries raise what they like: no driver, no MPI, another CUDA.
    except Exception as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> EngineStartError:
    why = f"{type(error).__name__}: {error}"[:_ERROR_SHOWN]
    return EngineStartError(
        f"TensorRT-LLM cannot be imported ({why}): check the GPU's driver and that container and "
        "package belong together"
    )


def _check_version(package: object) -> str:
    version = str(getattr(package, "__version__", "") or _installed_version())
    found = _VERSION.match(version)
    if found is None:
        raise EngineStartError(f"TensorRT-LLM calls itself {version[:_ERROR_SHOWN]!r}: install 1.2")
    if (int(found[1]), int(found[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineStartError(f"TensorRT-LLM {version} is too old: install {oldest} or later")
    return version


def _installed_version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _find(name: str, places: Iterable[str] | None = None) -> object | None:
    """Returns a class from the first place that has it."""
    for place in _PLACES[name] if places is None else places:
        try:
            module = importlib.import_module(place)
        # A module that has moved away leaves ImportErrors of its own in those that have not.
        except ImportError:
            continue
        found: object = getattr(module, name, None)
        if found is not None:
            return found
    return None


def _require(name: str) -> object:
    found = _find(name)
    if found is None:
        raise EngineStartError(
            f"TensorRT-LLM has no {name}: this worker does not know this version"
        )
    return found


def _exception(name: str) -> type[Exception] | None:
    found = _find(name)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _find_configs(version: str) -> Mapping[str, Config]:
    configs: dict[str, Config] = {}
    for name in _CONFIGS:
        found = _find(name, None if name in _PLACES else _CONFIG_PLACES)
        if found is not None:
            configs[name] = _config(name, found)
        elif name in _CONFIGS_NEEDED:
            raise EngineStartError(
                f"TensorRT-LLM {version} has no {name}: this worker does not know this version"
            )
    return MappingProxyType(configs)


def _config(name: str, found: object) -> Config:
    return Config(name, cast("Make[object]", found), MappingProxyType(_defaults(found)))


def _defaults(found: object) -> dict[str, object]:
    """Fields of a class of any of the kinds that TensorRT-LLM has used."""
    model_fields: object = getattr(found, "model_fields", None)
    if isinstance(model_fields, Mapping):
        return {str(name): _pydantic_default(field) for name, field in model_fields.items()}
    if isinstance(found, type) and dataclasses.is_dataclass(found):
        return {
            field.name: REQUIRED if _has_no_default(field) else field.default
            for field in dataclasses.fields(found)
            if field.init
        }
    return {
        name: REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in _signature(found).items()
    }


def _pydantic_default(field: object) -> object:
    is_required = getattr(field, "is_required", None)
    if callable(is_required) and is_required():
        return REQUIRED
    default: object = getattr(field, "default", None)
    return default


def _has_no_default(field: dataclasses.Field[object]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _llm_arguments(llm: object) -> frozenset[str]:
    """Names that LLM() takes: its own parameters, and the fields that stand behind **kwargs."""
    own = _signature(llm)
    names = {name for name, parameter in own.items() if _is_named(parameter)}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values()):
        arguments = _find("TorchLlmArgs")
        if arguments is not None:
            names |= _defaults(arguments).keys()
    return frozenset(names)


def _parameters(function: object) -> frozenset[str]:
    return frozenset(
        name for name, parameter in _signature(function).items() if _is_named(parameter)
    )


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.name != "self" and parameter.kind in {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }


def _signature(found: object) -> Mapping[str, inspect.Parameter]:
    if not callable(found):
        return {}
    try:
        return inspect.signature(found).parameters
    except (TypeError, ValueError):
        return {}


def _check_needed(owner: str, names: frozenset[str], version: str) -> None:
    for name, why in _NEEDED[owner].items():
        if name not in names:
            reason = f", without which {why}" if why else ""
            raise EngineStartError(
                f"{owner} of TensorRT-LLM {version} has no {name}{reason}: install another version"
            )
