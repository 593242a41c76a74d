"""From the configuration of the trtllm engine to the arguments of TensorRT-LLM's LLM().

Keywords only, and only those that the installed version has. What an operator has asked for and the
version cannot do is refused by name: nothing is left out in silence. Parts of the configuration are
made with TensorRT-LLM's own classes, because dicts mean different things in different versions.

Runs in the child process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from services.worker.engine.base import EngineStartError
from services.worker.engine.trtllm_settings import TrtllmSettings, Values, read_settings
from services.worker.engine.trtllm_surface import Config, Surface
from services.worker.engine.wire_facts import Setting

LAUNCHED: Final = "TLLM_SPAWN_PROXY_PROCESS"
"""Variable that trtllm-llmapi-launch sets for the program that it runs on the first rank."""

_MODULES: Final[Mapping[str, str]] = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_dense",
    "gate_proj": "mlp_h_to_4h",
    "up_proj": "mlp_gate",
    "down_proj": "mlp_4h_to_h",
    "gate_up_proj": "mlp_gate_up",
}
# Classes of the kinds of speculation, newest name first.
_SPECULATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "draft": ("DraftTargetDecodingConfig",),
    "eagle": ("Eagle3DecodingConfig", "EagleDecodingConfig"),
    "mtp": ("MTPDecodingConfig",),
    "ngram": ("NGramDecodingConfig",),
}
# What NVIDIA runs without the overlap scheduler.
_NO_OVERLAP: Final = frozenset({"draft", "ngram"})
_DRAFT_MODELS: Final = ("speculative_model", "speculative_model_dir")
# Switches of the kinds that have always been able to draw tokens inside the model's own graph, and
# so with a sampler of their own; off, TensorRT-LLM's usual sampler draws.
_ONE_MODEL: Final[Mapping[str, str]] = {"eagle": "eagle3_one_model", "mtp": "mtp_eagle_one_model"}
# Lets that sampler draw anything but the likeliest token; does nothing in newer versions.
_ANY_SAMPLING: Final = "allow_advanced_sampling"
# Came when that sampler had learnt to do so by itself, and all kinds had become its.
_REJECTION: Final = "use_rejection_sampling"
_ERROR_SHOWN: Final = 300


def check_launch(settings: TrtllmSettings, environment: Mapping[str, str]) -> None:
    """Refuses several machines without the launcher, which would hang while the model loads.

    Args:
        settings: of the worker.
        environment: of this process.

    Raises:
        EngineStartError: likewise.
    """
    nodes = settings.values("multi_node").integer("nodes")
    if nodes > 1 and LAUNCHED not in environment:
        raise EngineStartError(
            f"worker.trtllm.multi_node.nodes = {nodes}, but the worker was not started by "
            "trtllm-llmapi-launch: start it with MPI, as deploy/kubernetes shows"
        )


def llm_arguments(settings: Mapping[str, Setting], surface: Surface) -> dict[str, object]:
    """Makes the arguments of LLM().

    Args:
        settings: as the worker sent them.
        surface: of the installed version.

    Raises:
        EngineStartError: the version cannot do what was asked for; says which key.
    """
    told = read_settings(settings)
    call = _Call("LLM()", surface.llm_arguments, surface.version)
    call.set("model", str(told.model_path))
    # LLM is the PyTorch backend in every version; those that know the word are held to it.
    call.offer("backend", "pytorch")
    # Written out, so that no other default of any version can run what lies beside the weights.
    call.set("trust_remote_code", False)
    # TensorRT-LLM needs its tokenizer for guided decoding; text is the worker's all the same.
    call.set("skip_tokenizer_init", False)
    # Processes that turn ids into text: nobody here asks for text.
    call.offer("num_postprocess_workers", 0)
    # Timings of requests, which are kept for ever in some versions and measured here anyway.
    call.offer("return_perf_metrics", False)
    _set_sizes(call, told)
    _set_parallelism(call, told.values("parallelism"))
    call.set("kv_cache_config", _kv_cache(told, surface))
    call.set("scheduler_config", _scheduler(told.values("batching"), surface))
    graphs = _cuda_graphs(told.values("cuda_graphs"), told.capacity, surface)
    call.set("cuda_graph_config", graphs, "cuda_graphs.enabled")
    _set_statistics(call, told.values("statistics"), surface)
    _set_quantization(call, told.values("quantization"))
    _set_guided_decoding(call, told.values("guided_decoding"), surface)
    if told.values("lora").flag("enabled"):
        call.set("lora_config", _lora(told.values("lora"), surface), "lora.enabled")
    speculative = told.values("speculative")
    if speculative.text("kind") != "none":
        call.set("speculative_config", _speculation(speculative, surface), "speculative.kind")
    return call.keywords


def draws_in_graph(settings: TrtllmSettings, surface: Surface) -> bool:
    """Whether tokens are drawn by the sampler of one-model speculation.

    That sampler knows temperature, top_k and top_p. Penalties, min_p, biases, seeds and
    log-probabilities are the usual sampler's: with it, nobody may be promised them.

    Raises:
        EngineStartError: the version does not have this kind of speculation.
    """
    kind = settings.values("speculative").text("kind")
    if kind == "none":
        return False
    defaults = _speculation_config(kind, surface).defaults
    return _REJECTION in defaults or (kind in _ONE_MODEL and _ANY_SAMPLING in defaults)


class _Call:
    """Keywords for one callable; only those that it has.

    Args:
        owner: of the keywords, for messages.
        names: that it has.
        version: of TensorRT-LLM.
    """

    def __init__(self, owner: str, names: Iterable[str], version: str) -> None:
        self._owner = owner
        self._names = frozenset(names)
        self._version = version
        self.keywords: dict[str, object] = {}

    def set(self, name: str, value: object, key: str = "") -> None:
        """Sets what has to be set.

        Args:
            name: of the keyword.
            value: of it.
            key: of the configuration that asks for it; empty for what the adapter needs.

        Raises:
            EngineStartError: there is no such keyword.
        """
        if name not in self._names:
            if key:
                raise _cannot(key, self._version)
            raise EngineStartError(
                f"{self._owner} of TensorRT-LLM {self._version} has no {name}: install another "
                "version"
            )
        self.keywords[name] = value

    def offer(self, name: str, value: object) -> None:
        """Sets what is as good as the default where there is no such keyword."""
        if name in self._names:
            self.keywords[name] = value

    def choose(self, name: str, value: object, default: object, key: str) -> None:
        """Sets what an operator has chosen; what nobody has chosen, only where it is there.

        None stands for the engine's own choice, and is left to it.
        """
        if value is None:
            return
        if value == default:
            self.offer(name, value)
        else:
            self.set(name, value, key)


def _call_of(config: Config, surface: Surface) -> _Call:
    return _Call(config.name, config.defaults, surface.version)


def _made(config: Config, call: _Call, key: str) -> object:
    """Makes a part of the configuration.

    Raises:
        EngineStartError: TensorRT-LLM refuses a value.
    """
    try:
        return config.make(**call.keywords)
    except (ValueError, TypeError, AssertionError) as error:
        why = str(error)[:_ERROR_SHOWN]
        raise EngineStartError(
            f"TensorRT-LLM refuses what worker.trtllm.{key} says: {why}"
        ) from error


def _cannot(key: str, version: str) -> EngineStartError:
    return EngineStartError(
        f"TensorRT-LLM {version} cannot do what worker.trtllm.{key} asks for: leave the key out, "
        "or install another version"
    )


def _set_sizes(call: _Call, told: TrtllmSettings) -> None:
    batching = told.values("batching")
    call.set("max_batch_size", told.capacity)
    call.set("max_num_tokens", batching.integer("max_num_tokens"))
    if told.context_length is not None:
        call.set("max_seq_len", told.context_length)
    overlaps = batching.flag_or_none("overlap_scheduler")
    if overlaps is None:
        overlaps = told.values("speculative").text("kind") not in _NO_OVERLAP
    for name, value, default, key in (
        ("enable_chunked_prefill", batching.flag("chunked_prefill"), False, "chunked_prefill"),
        ("disable_overlap_scheduler", not overlaps, False, "overlap_scheduler"),
        ("stream_interval", batching.integer("stream_interval"), 1, "stream_interval"),
    ):
        call.choose(name, value, default, f"batching.{key}")


def _set_parallelism(call: _Call, parallelism: Values) -> None:
    call.set("tensor_parallel_size", parallelism.integer("tensor"))
    spread = parallelism.flag("attention_data_parallel")
    for name, value, default, key in (
        ("pipeline_parallel_size", parallelism.integer("pipeline"), 1, "pipeline"),
        ("moe_expert_parallel_size", parallelism.integer_or_none("moe_expert"), None, "moe_expert"),
        ("moe_tensor_parallel_size", parallelism.integer_or_none("moe_tensor"), None, "moe_tensor"),
        ("gpus_per_node", parallelism.integer_or_none("gpus_per_node"), None, "gpus_per_node"),
        ("enable_attention_dp", spread, False, "attention_data_parallel"),
    ):
        call.choose(name, value, default, f"parallelism.{key}")


def _set_statistics(call: _Call, statistics: Values, surface: Surface) -> None:
    """On PyTorch there are no statistics without the switch, and no events without a buffer."""
    has_iterations = statistics.flag("iterations")
    call.choose(
        "enable_iter_perf_stats", has_iterations, default=False, key="statistics.iterations"
    )
    if has_iterations and not surface.has_stats:
        raise _cannot("statistics.iterations", surface.version)
    if statistics.flag("kv_events") and not surface.has_kv_events:
        raise _cannot("statistics.kv_events", surface.version)


def _set_quantization(call: _Call, quantization: Values) -> None:
    call.choose("dtype", quantization.text("dtype"), default="auto", key="quantization.dtype")
    call.choose(
        "force_dynamic_quantization",
        quantization.flag("dynamic_scales"),
        default=False,
        key="quantization.dynamic_scales",
    )


def _set_guided_decoding(call: _Call, guided: Values, surface: Surface) -> None:
    backend, key = guided.text("backend"), "guided_decoding.backend"
    if backend == "none":
        return
    if surface.guided is None:
        raise _cannot(key, surface.version)
    call.set("guided_decoding_backend", backend, key)


def _kv_cache(told: TrtllmSettings, surface: Surface) -> object:
    config, cache = surface.configs["KvCacheConfig"], told.values("kv_cache")
    call = _call_of(config, surface)
    tells = told.values("statistics").flag("kv_events")
    fraction = cache.number("free_gpu_memory_fraction")
    call.set("free_gpu_memory_fraction", fraction, "kv_cache.free_gpu_memory_fraction")
    call.set("enable_block_reuse", cache.flag("reuse"), "kv_cache.reuse")
    call.set("tokens_per_block", cache.integer("tokens_per_block"), "kv_cache.tokens_per_block")
    for name, value, default, key in (
        ("max_tokens", cache.integer_or_none("max_tokens"), None, "max_tokens"),
        ("enable_partial_reuse", cache.flag("partial_reuse"), True, "partial_reuse"),
        ("dtype", cache.text("dtype"), "auto", "dtype"),
        ("host_cache_size", cache.integer("host_size") or None, None, "host_size"),
        ("event_buffer_max_size", cache.integer("event_buffer") if tells else 0, 0, "event_buffer"),
    ):
        call.choose(name, value, default, f"kv_cache.{key}")
    return _made(config, call, "kv_cache")


def _scheduler(batching: Values, surface: Surface) -> object:
    config = surface.configs["SchedulerConfig"]
    call = _call_of(config, surface)
    policy = batching.text("capacity_policy").upper()
    call.set("capacity_scheduler_policy", policy, "batching.capacity_policy")
    chunking = batching.text_or_none("chunking_policy")
    if chunking is not None:
        call.set("context_chunking_policy", chunking.upper(), "batching.chunking_policy")
    return _made(config, call, "batching")


def _cuda_graphs(graphs: Values, capacity: int, surface: Surface) -> object | None:
    """None, passed explicitly, is how recording is switched off: the default is on."""
    if not graphs.flag("enabled"):
        return None
    config = surface.configs["CudaGraphConfig"]
    call = _call_of(config, surface)
    call.choose("enable_padding", graphs.flag("padding"), default=False, key="cuda_graphs.padding")
    sizes = sorted(set(graphs.integers("batch_sizes")))
    if sizes:
        call.set("batch_sizes", sizes, "cuda_graphs.batch_sizes")
    else:
        largest = graphs.integer_or_none("max_batch_size") or capacity
        call.set("max_batch_size", largest, "cuda_graphs.max_batch_size")
    return _made(config, call, "cuda_graphs")


def _lora(lora: Values, surface: Surface) -> object:
    config = surface.configs.get("LoraConfig")
    if (
        config is None
        or surface.lora_request is None
        or "lora_request" not in surface.generate_parameters
    ):
        raise _cannot("lora.enabled", surface.version)
    call = _call_of(config, surface)
    # No lora_dir: with one, the engine would take its tokenizer from there.
    call.set("max_lora_rank", lora.integer("max_rank"), "lora.max_rank")
    call.set("max_loras", lora.integer("max_loras"), "lora.max_loras")
    call.set("max_cpu_loras", lora.integer("max_cpu_loras"), "lora.max_cpu_loras")
    modules = [_MODULES[name] for name in lora.texts("target_modules")]
    call.set("lora_target_modules", modules, "lora.target_modules")
    return _made(config, call, "lora")


def _speculation_config(kind: str, surface: Surface) -> Config:
    for name in _SPECULATIONS[kind]:
        config = surface.configs.get(name)
        if config is not None:
            return config
    raise _cannot("speculative.kind", surface.version)


def _speculation(wanted: Values, surface: Surface) -> object:
    kind, tokens = wanted.text("kind"), wanted.integer("tokens")
    config = _speculation_config(kind, surface)
    call = _call_of(config, surface)
    if kind == "mtp" and config.defaults.get("num_nextn_predict_layers") is not None:
        # Where this is a setting and no note of the engine's own, it sets the other.
        call.set("num_nextn_predict_layers", tokens, "speculative.tokens")
    else:
        call.set("max_draft_len", tokens, "speculative.tokens")
    model_path = wanted.text_or_none("model_path")
    if model_path is not None:
        name = next((name for name in _DRAFT_MODELS if name in config.defaults), _DRAFT_MODELS[0])
        call.set(name, model_path, "speculative.model_path")
    if wanted.is_set("max_concurrency"):
        most = wanted.integer("max_concurrency")
        call.set("max_concurrency", most, "speculative.max_concurrency")
    if kind == "ngram":
        longest = wanted.integer("max_ngram")
        call.set("max_matching_ngram_size", longest, "speculative.max_ngram")
        # A pool of all requests would let one tenant's output be guessed from another's.
        call.set("is_public_pool", False, "speculative.kind")
    _set_sampler(call, kind, config)
    return _made(config, call, "speculative")


def _set_sampler(call: _Call, kind: str, config: Config) -> None:
    """Makes the sampler in the graph draw as requests ask.

    Left alone, it takes the likeliest token in older versions, whatever a request asks for. In the
    oldest it cannot do otherwise: there the slower form, with a model of its own for the guesses,
    is what draws as it should.
    """
    if _ANY_SAMPLING in config.defaults:
        call.set(_ANY_SAMPLING, True)
    elif kind in _ONE_MODEL and _REJECTION not in config.defaults:
        call.set(_ONE_MODEL[kind], False, "speculative.kind")
