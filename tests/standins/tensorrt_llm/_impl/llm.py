"""LLM: the constructor that loads, generate_async, statistics, shutdown."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

import atexit
import contextlib
import inspect
import os
import signal
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, NoReturn, Self, cast

from typing_extensions import override

from .adapters import Adapters
from .configs import KvCacheFields, LoraFields, as_dict
from .engine import Engine, EngineConfig
from .guidance import Guides
from .lanes import Request
from .language import LanguageModel
from .loading import (
    HuggingFaceTokenizer,
    check_devices,
    make_cache,
    read_arguments,
    tokenizer_folder,
)
from .proxy import Executor
from .records import LoRABase, SamplingBase
from .results import RequestError, RequestOutput
from .sampling import Sampler
from .settings import Settings, read
from .signatures import Surface
from .statistics import FetchedResult, IterationResult, Stats

_NOT_SIMULATED = (
    "use_beam_search",
    "logits_processor",
    "lookahead_config",
    "no_repeat_ngram_size",
    "bad",
    "return_context_logits",
    "return_generation_logits",
    "additional_model_outputs",
    "truncate_prompt_tokens",
)
_ERRORS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "RuntimeError": RuntimeError,
    "NotImplementedError": NotImplementedError,
    "RequestError": RequestError,
}
_STATS_DEFAULT = 1000
_ONE_MODEL = ("eagle3_one_model", "mtp_eagle_one_model")


class BaseLLM:
    """What the classes of each version are made from."""

    _surface: ClassVar[Surface]
    _init_signature: ClassVar[inspect.Signature]
    _call_signature: ClassVar[inspect.Signature]

    def __init__(self, *args: object, **kwargs: object) -> None:
        surface = self._surface
        self._executor: Executor | None = None
        self._number = 0
        self._lora_paths: dict[int, str] = {}
        self._arguments = read_arguments(surface, self._init_signature, args, kwargs)
        self._settings = _settings_now(surface)
        _fail_to_load(self._settings)
        time.sleep(self._settings.load_s)
        self._load(self._settings)
        atexit.register(_shut_down, weakref.ref(self))

    def _load(self, settings: Settings) -> None:
        given = self._arguments
        folder = Path(str(given.values["model"]))
        if not folder.is_dir():
            raise ValueError(f"there is no model directory {folder}")
        check_devices(given, settings)
        kv = KvCacheFields.model_validate(as_dict(given.values["kv_cache_config"]))
        lora = self._lora_config()
        tokens = folder if lora is None else tokenizer_folder(folder, lora)
        self.tokenizer = None if given.flag("skip_tokenizer_init") else HuggingFaceTokenizer(tokens)
        model = LanguageModel(folder)
        config = self._engine_config(model)
        self._max_num_tokens = config.tokens_max
        self._is_chunked = config.chunked
        surface = self._surface
        executor = Executor(
            settings,
            self._decode,
            stats_max=given.whole("max_stats_len", _STATS_DEFAULT),
            tells_stats=config.tells_stats,
            tells_events=bool(kv.event_buffer_max_size and kv.enable_block_reuse),
            by_rpc=surface.has("rpc_stats"),
            dead_errors=config.dead_errors,
        )
        cache = make_cache(kv, settings, config, with_salts=surface.has("event_salts"))
        adapters = None
        if lora is not None:
            adapters = Adapters(model, rank_max=lora.max_lora_rank, loras_max=lora.max_loras)
        guides = self._make_guides(model)
        executor.engine = Engine(config, settings, model, cache, adapters, guides, executor)
        executor.engine.start()
        self._executor = executor
        self._cache = cache
        self._stream_interval = given.whole("stream_interval", 1)

    def _lora_config(self) -> LoraFields | None:
        """What adapters may be; None where there are none."""
        given = self._arguments
        found = given.values["lora_config"]
        if found is None and not given.flag("enable_lora"):
            return None
        fields = {name: value for name, value in as_dict(found).items() if value is not None}
        return LoraFields.model_validate(
            {name: fields[name] for name in LoraFields.model_fields if name in fields}
        )

    def _engine_config(self, model: LanguageModel) -> EngineConfig:
        given, surface = self._arguments, self._surface
        scheduler = as_dict(given.values["scheduler_config"])
        policy = scheduler["capacity_scheduler_policy"]
        speculation = as_dict(given.values["speculative_config"])
        drafts = speculation.get("max_draft_len") or speculation.get("num_nextn_predict_layers")
        more_ends = model.end_ids if surface.has("generation_config_eos") else []
        return EngineConfig(
            length_max=min(given.whole("max_seq_len", model.context), model.context),
            batch_max=given.whole("max_batch_size", 2048),
            tokens_max=given.whole("max_num_tokens", 8192),
            chunked=given.flag("enable_chunked_prefill"),
            policy=str(getattr(policy, "value", policy)),
            draft_tokens=drafts if isinstance(drafts, int) else 0,
            tells_stats=given.flag("enable_iter_perf_stats"),
            tells_requests=given.flag("enable_iter_req_stats"),
            attention_dp=given.flag("enable_attention_dp"),
            guided_errors=surface.has("guided_errors"),
            lora_errors=surface.has("lora_errors"),
            context_stats=surface.has("kv_context_stats"),
            dead_errors=surface.has("EngineDeadError"),
            sampler=self._sampler(speculation),
            more_end_ids=tuple(more_ends),
        )

    def _sampler(self, speculation: dict[str, object]) -> Sampler:
        """One-model speculation draws inside of the model's graph, if it draws at all."""
        surface = self._surface
        in_graph = any(speculation.get(name) for name in _ONE_MODEL)
        draws = surface.has("drawing_in_graph") or speculation.get("allow_advanced_sampling")
        return Sampler(
            penalizes=surface.has("penalties"),
            counts_prompt=not surface.has("min_tokens_of_output"),
            in_graph=in_graph,
            is_greedy=in_graph and not draws,
        )

    def _make_guides(self, model: LanguageModel) -> Guides | None:
        backend = self._arguments.values["guided_decoding_backend"]
        if backend is None:
            return None
        if self.tokenizer is None:
            raise ValueError("guided decoding needs a tokenizer")
        eos_id = self.tokenizer.eos_token_id
        assert eos_id is not None
        return Guides(
            self.tokenizer.path, vocabulary=model.vocabulary, eos_id=eos_id, backend=str(backend)
        )

    def generate_async(self, *args: object, **kwargs: object) -> RequestOutput:
        """Starts a request and returns at once. See `_call_signature` for its parameters."""
        self._number += 1
        given = self._bind(args, kwargs)
        executor = self._executor
        if executor is None or executor.doing_shutdown:
            raise RuntimeError("LLM is shutting down")
        self._fail_to_call()
        prompt = self._prompt(given["inputs"], given["sampling_params"])
        params = cast("SamplingBase", given["sampling_params"])
        self._check_request(prompt, params, given)
        lora = cast("LoRABase | None", given["lora_request"])
        priority = given.get("priority", 0.5)
        request = Request(
            request_id=executor.next_request_id(),
            number=self._number,
            prompt=prompt,
            params=params,
            streaming=bool(given["streaming"]),
            salt=cast("str | None", given["cache_salt"]),
            lora=lora,
            priority=priority if isinstance(priority, float) else 0.5,
        )
        result = RequestOutput(request.request_id, prompt, params)
        home = weakref.ref(executor)
        result._connect(lambda: None if self._executor is None else home())
        executor.submit(request, result)
        return result

    def _bind(self, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, object]:
        """Checks the arguments of a call.

        Raises:
            TypeError: one is not known, has another type, or is given by its place. Places differ
                between versions.
        """
        if len(args) > 1:
            raise TypeError("generate_async: everything but inputs must be given by name")
        bound = self._call_signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        table = self._surface.table("LLM.generate_async")
        for name, entry in table.items():
            if name != "inputs":
                self._surface.check(f"generate_async: {name}", entry.type, given[name])
        if given["sampling_params"] is None:
            make = cast("type[SamplingBase]", self._surface.names["SamplingParams"])
            given["sampling_params"] = make()
        return given

    def _fail_to_call(self) -> None:
        settings = self._settings
        slow = settings.fault_of("call_slow", self._number)
        if slow is not None:
            time.sleep(slow.number("s", 1.0) or 0.0)
        fault = settings.fault_of("call_error", self._number)
        if fault is not None:
            raise _ERRORS[fault.text("type", "ValueError")]("this request is refused")

    def _prompt(self, inputs: object, params: object) -> list[int]:
        if isinstance(inputs, dict):
            if "multi_modal_data" in inputs or "multi_modal_embeddings" in inputs:
                raise ValueError("this model takes no images")
            inputs = inputs.get("prompt_token_ids", inputs.get("prompt"))
        if isinstance(inputs, str):
            if self.tokenizer is None:
                raise ValueError("tokenizer is required to encode a prompt")
            special = cast("SamplingBase", params).add_special_tokens
            return self.tokenizer.encode(inputs, add_special_tokens=special)
        if not isinstance(inputs, list):
            kind = type(inputs).__name__
            raise TypeError(f"The inputs must be type str or list of int, but got {kind}")
        assert type(inputs[0]) is int, "prompt_token_ids must be a list of int"
        assert all(type(token_id) is int for token_id in inputs), "all ids must be int"
        return list(inputs)

    def _check_request(
        self, prompt: list[int], params: SamplingBase, given: dict[str, object]
    ) -> None:
        _check_simulated(params)
        params.begin(self.tokenizer, self._stream_interval)
        if len(prompt) > self._max_num_tokens and not self._is_chunked:
            message = f"the prompt is longer than max_num_tokens ({self._max_num_tokens})"
            is_new = self._surface.has("request_error_for_long_prompts")
            raise RequestError(message) if is_new else ValueError(message)
        if params.guided_decoding is not None and self._executor is not None:
            engine = self._executor.engine
            if engine is None or engine.guides is None:
                raise ValueError("guided_decoding_backend is not set")
        disaggregated = given["disaggregated_params"]
        kind = getattr(disaggregated, "request_type", None)
        if kind == "context_only":
            params.max_tokens = 1  # type: ignore[misc] # a slot of what is made of it
        if kind is not None:
            raise NotImplementedError("the stand-in serves in one piece only")
        self._check_lora(given["lora_request"])
        priority = given.get("priority", 0.5)
        if isinstance(priority, float) and not 0 <= priority <= 1:
            raise ValueError("priority must be in 0..1")

    def _check_lora(self, lora: object) -> None:
        if not isinstance(lora, LoRABase):
            return
        if self._lora_config() is None:
            raise ValueError("LoRA is not enabled: lora_config is not set")
        known = self._lora_paths.setdefault(lora.lora_int_id, lora.lora_path)
        assert known == lora.lora_path, "one lora_int_id stands for two adapters"

    def _decode(self, token_ids: list[int], skip_special: bool) -> str:  # noqa: FBT001
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special)

    def get_stats_async(self, timeout: float | None = 2) -> IterationResult | FetchedResult:
        """Iteration statistics, as something to iterate over."""
        return self._running().stats(timeout)

    def get_stats(self, timeout: float | None = 2) -> list[Stats]:
        """Iteration statistics."""
        return self._running().stats(timeout).get_results()

    def get_kv_cache_events_async(
        self, timeout: float | None = 2
    ) -> IterationResult | FetchedResult:
        """Events of the KV cache, as something to iterate over."""
        return self._running().kv_events(timeout)

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[Stats]:
        """Events of the KV cache."""
        return self._running().kv_events(timeout).get_results()

    def _running(self) -> Executor:
        if self._executor is None:
            raise RuntimeError("LLM is shutting down")
        return self._executor

    def shutdown(self) -> None:
        """Ends the engine, in whatever time that takes."""
        executor = self._executor
        if executor is not None:
            executor.shutdown()
            self._executor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    @override
    def __getstate__(self) -> NoReturn:
        raise RuntimeError("LLM object can not be pickled.")

    def __del__(self) -> None:
        if getattr(self, "_executor", None) is not None:
            self.shutdown()


def _check_health(self: BaseLLM) -> bool:
    """Whether nothing fatal is known. Newer versions only."""
    executor = self._executor
    return executor is not None and executor.check_health()


def _get_kv_cache_capacity(self: BaseLLM) -> dict[str, int]:
    """Size of the KV cache. Newer versions only."""
    cache = self._cache
    return {
        "maxNumBlocks": cache.blocks_max,
        "tokensPerBlock": cache.tokens_per_block,
        "maxNumTokens": cache.blocks_max * cache.tokens_per_block,
    }


def make_llm(surface: Surface) -> type[BaseLLM]:
    """Makes the class of one version."""
    head = surface.table("LLM.__init__")
    members: dict[str, object] = {
        "_surface": surface,
        "_init_signature": surface.signature(head, extra=True),
        "_call_signature": surface.signature(surface.table("LLM.generate_async")),
        "__module__": "tensorrt_llm.llmapi.llm",
        "__signature__": surface.signature(head, extra=True),
        "generate_async": _with_signature(surface),
    }
    if surface.has("check_health"):
        members["_check_health"] = _check_health
        members["get_kv_cache_capacity"] = _get_kv_cache_capacity
    return type("LLM", (BaseLLM,), members)


def _with_signature(surface: Surface) -> object:
    def generate_async(self: BaseLLM, *args: object, **kwargs: object) -> RequestOutput:
        return BaseLLM.generate_async(self, *args, **kwargs)

    signature = surface.signature(surface.table("LLM.generate_async"))
    generate_async.__signature__ = signature  # type: ignore[attr-defined] # read by inspect
    generate_async.__doc__ = "Starts a request and returns at once."
    return generate_async


def _settings_now(surface: Surface) -> Settings:
    """The settings of this engine: those of the environment now. The surface stays.

    Raises:
        ValueError: the environment asks for another surface than when it was imported.
    """
    now, then = read(), surface.settings
    if (now.version, now.detect) != (then.version, then.detect):
        raise ValueError("the version of the stand-in is chosen when it is imported")
    return replace(now, features=then.features)


def _fail_to_load(settings: Settings) -> None:
    for fault in settings.named("load_error"):
        raise RuntimeError(fault.text("message", "CUDA out of memory"))
    if settings.named("load_killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if settings.named("load_hang"):
        threading.Event().wait(settings.hang_s)


def _check_simulated(params: SamplingBase) -> None:
    """Raises NotImplementedError where the stand-in knows no better."""
    for name in _NOT_SIMULATED:
        if getattr(params, name):
            raise NotImplementedError(f"the stand-in does not simulate SamplingParams.{name}")


def _shut_down(found: weakref.ref[BaseLLM]) -> None:
    llm = found()
    if llm is not None:
        with contextlib.suppress(Exception):
            llm.shutdown()
