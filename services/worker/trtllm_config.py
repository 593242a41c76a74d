"""Configuration of the trtllm engine: the section [worker.trtllm].

It says what an operator decides: how the model is spread over GPUs, how memory and batches are cut,
and what the engine may do. The rest is the adapter's, which knows what goes together: whatever is
missing here cannot be set, and above all nothing reaches TensorRT-LLM that lets a model directory
run code of its own. Paths and sizes are checked here, files when the engine starts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import pydantic

from libs.config import Seconds, Section

_SIZE: Final = re.compile(r"(\d+)(KiB|MiB|GiB|TiB)")
_UNITS_BYTES: Final = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_TOKENS_PER_BLOCK: Final = (8, 16, 32, 64, 128)


def _parse_size(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if match is None:
        raise ValueError('a size is a number of bytes, or a text as "512MiB" or "16GiB"')
    return int(match[1]) * _UNITS_BYTES[match[2]]


Size = Annotated[int, pydantic.BeforeValidator(_parse_size), pydantic.Field(ge=0, le=1 << 50)]
"""A number of bytes, as an integer or with its unit."""

SpeculationKind = Literal["none", "draft", "eagle", "mtp", "ngram"]
GuidedBackend = Literal["llguidance", "xgrammar", "none"]
LoraModule = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"
]  # fmt: skip
"""Matrices of a layer that an adapter may change, as Hugging Face names them."""


class ParallelismSection(Section):
    """How one model is spread over GPUs.

    Attributes:
        tensor: GPUs that share each layer.
        pipeline: groups of such GPUs, each with some of the layers.
        moe_expert: of the `tensor` GPUs, over how many the experts of a mixture are spread; unset
            leaves it to the engine, which splits every expert over all of them.
        moe_tensor: over how many each expert is split; moe_expert * moe_tensor = tensor.
        gpus_per_node: GPUs of one machine that the engine may use; unset means all that it sees.
        attention_data_parallel: each of the `tensor` GPUs computes the attention of its own
            requests, with the KV cache of those only: more requests fit, at a higher latency each.
            For models with few KV heads, as DeepSeek's. Each GPU then has room in its batch for all
            of worker.capacity, so that none waits because requests were spread unevenly.
    """

    tensor: int = pydantic.Field(default=1, ge=1, le=128)
    pipeline: int = pydantic.Field(default=1, ge=1, le=64)
    moe_expert: int | None = pydantic.Field(default=None, ge=1, le=128)
    moe_tensor: int | None = pydantic.Field(default=None, ge=1, le=128)
    gpus_per_node: int | None = pydantic.Field(default=None, ge=1, le=128)
    attention_data_parallel: bool = False

    @property
    def gpus(self) -> int:
        """That the whole model takes."""
        return self.tensor * self.pipeline

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        expert, split = self.moe_expert, self.moe_tensor
        for name, value in (("moe_expert", expert), ("moe_tensor", split)):
            if value is not None and self.tensor % value:
                raise ValueError(f"{name} = {value} must divide tensor = {self.tensor}")
        if expert is not None and split is not None and expert * split != self.tensor:
            raise ValueError(
                f"moe_expert * moe_tensor = {expert * split} must be tensor = {self.tensor}: "
                "set one of the two and leave the other out"
            )
        if self.attention_data_parallel and self.tensor == 1:
            raise ValueError("attention_data_parallel needs tensor = 2 or more")
        return self


class KvCacheSection(Section):
    """The KV cache.

    Attributes:
        free_gpu_memory_fraction: of the GPU memory that is free after the weights are loaded, the
            share that becomes KV cache. What is left is for activations and CUDA graphs: lower it
            when the engine runs out of memory while it starts or under load.
        max_tokens: most tokens in it; unset means as many as the memory takes.
        reuse: requests with equal salts share what they have in common at the beginning. Off, no
            request ever finds its prompt cached.
        partial_reuse: a block of which only the beginning is equal counts, too; it is copied.
        dtype: "auto" takes what the checkpoint says; "fp8" halves the cache, at some accuracy.
        host_size: memory of the host for blocks that the GPU has no room for, in bytes or as
            "16GiB"; 0 means none.
        tokens_per_block: what is shared, counted, and told to the scheduler is whole blocks.
        event_buffer: events of the cache that the engine keeps until they are fetched; the oldest
            are lost beyond that, and the scheduler is then told to forget what it knew.
    """

    free_gpu_memory_fraction: float = pydantic.Field(default=0.9, gt=0, lt=1)
    max_tokens: int | None = pydantic.Field(default=None, ge=1)
    reuse: bool = True
    partial_reuse: bool = True
    dtype: Literal["auto", "fp8"] = "auto"
    host_size: Size = 0
    tokens_per_block: int = 32
    event_buffer: int = pydantic.Field(default=100_000, ge=1, le=10_000_000)

    @pydantic.field_validator("tokens_per_block")
    @classmethod
    def _check_block(cls, value: int) -> int:
        if value not in _TOKENS_PER_BLOCK:
            raise ValueError(f"must be one of {', '.join(map(str, _TOKENS_PER_BLOCK))}")
        return value

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.host_size and not self.reuse:
            raise ValueError("host_size keeps blocks for reuse: set reuse = true, or host_size = 0")
        return self


class BatchingSection(Section):
    """What runs together in one step. How many requests at most is worker.capacity.

    Attributes:
        max_num_tokens: most tokens of one step, prompts and outputs together. Larger prefills
            faster; smaller makes the others wait less for a long prompt.
        chunked_prefill: longer prompts are computed in several steps. Without it a prompt longer
            than max_num_tokens is refused.
        capacity_policy: who may start while the KV cache is short. "guaranteed_no_evict" starts a
            request when its prompt and its longest output fit, so nothing that has begun is ever
            thrown out; requests that may become much longer than they do keep others waiting, so
            give offerings a modest default of output tokens. "max_utilization" starts what fits
            now and throws out and computes again what does not fit later: more requests at once,
            but much slower when memory is really short, and TensorRT-LLM 1.2 has crashed with it.
        chunking_policy: whose chunks go first: "first_come_first_served", "equal_progress", or
            unset, which leaves it to the engine.
        overlap_scheduler: the next step is prepared while the GPU computes. Unset means wherever
            it is possible, which is everywhere but with the speculation of "draft" and "ngram".
        stream_interval: steps between two messages of a request, while few requests run.
        stream_interval_under_load: the same when nearly all places are taken: each message costs
            the processor some time, whatever is in it. The first token is told at once in any case.
    """

    max_num_tokens: int = pydantic.Field(default=8192, ge=16, le=1 << 20)
    chunked_prefill: bool = True
    capacity_policy: Literal["guaranteed_no_evict", "max_utilization"] = "guaranteed_no_evict"
    chunking_policy: Literal["first_come_first_served", "equal_progress"] | None = None
    overlap_scheduler: bool | None = None
    stream_interval: int = pydantic.Field(default=1, ge=1, le=64)
    stream_interval_under_load: int = pydantic.Field(default=4, ge=1, le=64)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.chunking_policy is not None and not self.chunked_prefill:
            raise ValueError("chunking_policy has no meaning without chunked_prefill = true")
        if self.stream_interval_under_load < self.stream_interval:
            raise ValueError("stream_interval_under_load must be at least stream_interval")
        return self


class CudaGraphsSection(Section):
    """Recorded steps, which start on the GPU at once. Each takes up to 200 MB of its memory.

    Attributes:
        enabled: steps in which all requests decode are recorded. Off, decoding is much slower.
        batch_sizes: for which numbers of requests; empty leaves the choice to the engine.
        max_batch_size: the engine chooses up to this number; unset means worker.capacity.
        padding: other numbers are filled up to the next recorded one, which is nearly always
            faster than not to use a recording.
    """

    enabled: bool = True
    batch_sizes: tuple[pydantic.PositiveInt, ...] = pydantic.Field(default=(), max_length=256)
    max_batch_size: int | None = pydantic.Field(default=None, ge=1, le=4096)
    padding: bool = True

    @property
    def largest(self) -> int | None:
        """Of what was asked for; None when nothing was."""
        return max(self.batch_sizes) if self.batch_sizes else self.max_batch_size

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_sizes and self.max_batch_size is not None:
            raise ValueError("set batch_sizes or max_batch_size, not both")
        if not self.enabled and self.largest is not None:
            raise ValueError("batch_sizes and max_batch_size need enabled = true")
        return self


class QuantizationSection(Section):
    """Number types of the weights. The checkpoint itself says how it is quantized.

    To serve a quantized model, point worker.model_path at a quantized checkpoint: the engine reads
    its quantization from hf_quant_config.json or config.json, and quantizes nothing by itself. The
    KV cache has its own key, kv_cache.dtype.

    Attributes:
        dtype: number type of what is not quantized; "auto" takes what the checkpoint says.
        dynamic_scales: scales of activations are measured in every step, even where the checkpoint
            brings its own.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    dynamic_scales: bool = False


class SpeculativeSection(Section):
    """Tokens that are guessed ahead and checked by the model, several in one step.

    It makes single outputs faster and full batches slower. The engine cannot combine it with a
    pipeline; NVIDIA has not tried it with LoRA adapters.

    Attributes:
        kind: who guesses. "none"; "draft": a small model with the same vocabulary; "eagle": an
            EAGLE-3 head trained for the model; "mtp": layers of the model itself, where it has
            them; "ngram": what followed the same tokens earlier in the same request.
        tokens: guessed at once; needed by every kind but "none".
        model_path: absolute path of the directory of the small model or the head; for "draft" and
            "eagle".
        max_ngram: most tokens that have to be the same, for "ngram".
        max_concurrency: nothing is guessed while more requests than this run; unset means always.
    """

    kind: SpeculationKind = "none"
    tokens: int | None = pydantic.Field(default=None, ge=1, le=64)
    model_path: Path | None = None
    max_ngram: int | None = pydantic.Field(default=None, ge=1, le=64)
    max_concurrency: int | None = pydantic.Field(default=None, ge=1, le=4096)

    @property
    def tokens_per_step(self) -> int:
        """Most tokens of one request in one step."""
        return 1 + (self.tokens or 0)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        needed, optional = _SPECULATION[self.kind]
        for name in ("tokens", "model_path", "max_ngram", "max_concurrency"):
            is_set = getattr(self, name) is not None
            if name in needed and not is_set:
                raise ValueError(f'{name} must be set for kind = "{self.kind}"')
            if is_set and name not in needed | optional:
                raise ValueError(f'{name} has no meaning for kind = "{self.kind}": leave it out')
        if self.model_path is not None:
            require_directory_name("model_path", self.model_path)
        return self


_SPECULATION: Final[dict[SpeculationKind, tuple[frozenset[str], frozenset[str]]]] = {
    # What a kind needs, and what it takes besides.
    "none": (frozenset(), frozenset()),
    "draft": (frozenset({"tokens", "model_path"}), frozenset({"max_concurrency"})),
    "eagle": (frozenset({"tokens", "model_path"}), frozenset({"max_concurrency"})),
    "mtp": (frozenset({"tokens"}), frozenset({"max_concurrency"})),
    "ngram": (frozenset({"tokens", "max_ngram"}), frozenset({"max_concurrency"})),
}


class GuidedDecodingSection(Section):
    """Outputs that have to match a schema, a regular expression or a grammar.

    Attributes:
        backend: what enforces them. "llguidance" is the library with which the worker checks them
            before the engine sees them, so it does what was checked; "xgrammar" can be promised
            for fewer kinds; "none" refuses every request with a constraint.
    """

    backend: GuidedBackend = "llguidance"


class LoraSection(Section):
    """LoRA adapters, in directories as PEFT writes them.

    Attributes:
        enabled: requests may ask for adapters, in worker.adapters_dir, which has to be set. It
            takes GPU memory whether or not they do.
        max_rank: highest rank of an adapter; others are refused before the engine sees them.
        max_loras: adapters in GPU memory at the same time.
        max_cpu_loras: in the host's memory; those unused for longest are read again when needed.
        target_modules: matrices of a layer that adapters may change.
    """

    enabled: bool = False
    max_rank: int = pydantic.Field(default=64, ge=1, le=512)
    max_loras: int = pydantic.Field(default=8, ge=1, le=1024)
    max_cpu_loras: int = pydantic.Field(default=64, ge=1, le=4096)
    target_modules: tuple[LoraModule, ...] = pydantic.Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
    )

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_cpu_loras < self.max_loras:
            raise ValueError(
                f"max_cpu_loras = {self.max_cpu_loras} must be at least max_loras = "
                f"{self.max_loras}: what is on the GPU stays in the host's memory, too"
            )
        fields = type(self).model_fields.items()
        if not self.enabled and any(getattr(self, name) != field.default for name, field in fields):
            raise ValueError("the other keys of lora need enabled = true")
        return self


class StatisticsSection(Section):
    """What the engine tells of itself.

    Attributes:
        iterations: it counts running requests and the KV cache in every step. Without it the
            scheduler knows the load only by what this worker has counted, and no cache at all.
        kv_events: it tells what comes into and leaves the prefix cache, so that the scheduler can
            send a request to where its prompt is cached. Needs kv_cache.reuse.
        poll_interval: how often both are fetched.
    """

    iterations: bool = True
    kv_events: bool = True
    poll_interval: Seconds = pydantic.Field(default=0.1, ge=0.01, le=10)


class MultiNodeSection(Section):
    """A model that is spread over several machines.

    The worker runs on the first machine only. `trtllm-llmapi-launch python -m services.worker ...`
    is what MPI starts on every GPU: it runs the worker as the program of rank 0, and the engine's
    own loop on all others.

    Attributes:
        nodes: machines. With more than one, parallelism.gpus_per_node has to be set, and the
            worker has to be started by trtllm-llmapi-launch.
    """

    nodes: int = pydantic.Field(default=1, ge=1, le=64)


class TrtllmSection(Section):
    """The trtllm engine: TensorRT-LLM with its PyTorch backend.

    Attributes:
        python: absolute path of the Python that has TensorRT-LLM; unset means the one that runs the
            worker. TensorRT-LLM wants other versions of some packages than the suite does, so it
            usually has an environment of its own; the worker's code need not be installed there.
        load_within: longest time for checking and loading the model, tuning and recording included.
        parallelism: how the model is spread over GPUs.
        kv_cache: its KV cache.
        batching: what runs together.
        cuda_graphs: recorded steps.
        quantization: number types of the weights.
        speculative: tokens that are guessed ahead.
        guided_decoding: who enforces constraints.
        lora: adapters.
        statistics: what the engine tells of itself.
        multi_node: several machines.
    """

    python: Path | None = None
    load_within: Seconds = pydantic.Field(default=1800.0, gt=0)
    parallelism: ParallelismSection = ParallelismSection()
    kv_cache: KvCacheSection = KvCacheSection()
    batching: BatchingSection = BatchingSection()
    cuda_graphs: CudaGraphsSection = CudaGraphsSection()
    quantization: QuantizationSection = QuantizationSection()
    speculative: SpeculativeSection = SpeculativeSection()
    guided_decoding: GuidedDecodingSection = GuidedDecodingSection()
    lora: LoraSection = LoraSection()
    statistics: StatisticsSection = StatisticsSection()
    multi_node: MultiNodeSection = MultiNodeSection()

    @pydantic.field_validator("python")
    @classmethod
    def _check_python(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_absolute():
            raise ValueError("must be the absolute path of a Python")
        return value

    @pydantic.model_validator(mode="after")
    def _check_speculation(self) -> Self:
        kind = self.speculative.kind
        if kind == "none":
            return self
        if self.parallelism.pipeline > 1:
            raise ValueError(
                f'speculative.kind = "{kind}" does not go with parallelism.pipeline: set '
                "pipeline = 1 and more tensor"
            )
        if kind in {"draft", "ngram"} and self.batching.overlap_scheduler:
            raise ValueError(
                f'speculative.kind = "{kind}" does not go with batching.overlap_scheduler: leave '
                "the key out"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_events(self) -> Self:
        if self.statistics.kv_events and not self.kv_cache.reuse:
            raise ValueError(
                "statistics.kv_events tells of blocks that can be reused: with kv_cache.reuse = "
                "false, set it to false, too"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_nodes(self) -> Self:
        nodes, gpus, each = (
            self.multi_node.nodes,
            self.parallelism.gpus,
            self.parallelism.gpus_per_node,
        )
        if nodes == 1:
            if each is not None and each < gpus:
                raise ValueError(
                    f"parallelism takes tensor * pipeline = {gpus} GPUs, and gpus_per_node = "
                    f"{each}: set multi_node.nodes = {-(-gpus // each)}, or take fewer"
                )
        elif each is None:
            raise ValueError("with multi_node.nodes, parallelism.gpus_per_node must be set")
        elif nodes * each != gpus:
            raise ValueError(
                f"multi_node.nodes * parallelism.gpus_per_node = {nodes * each} must be "
                f"parallelism.tensor * pipeline = {gpus}"
            )
        return self

    def check_sizes(self, capacity: int, context_length: int | None) -> None:
        """Compares what is written here with what [worker] says.

        Args:
            capacity: requests in the batch at the same time.
            context_length: prompt and output together, tokens; None when nothing is said.

        Raises:
            ValueError: they contradict each other; says which keys.
        """
        batching = self.batching
        step = capacity * self.speculative.tokens_per_step
        if step > batching.max_num_tokens:
            raise ValueError(
                f"trtllm.batching.max_num_tokens = {batching.max_num_tokens} is less than the "
                f"{step} tokens of a step in which all requests decode: raise it, or lower capacity"
            )
        room = self.kv_cache.max_tokens
        if room is not None and context_length is not None and room < context_length:
            raise ValueError(
                f"trtllm.kv_cache.max_tokens = {room} is less than context_length = "
                f"{context_length}, so the longest requests would never fit: raise it, or leave it "
                "out"
            )
        if not batching.chunked_prefill:
            _check_whole_prompts(batching.max_num_tokens, context_length)
        largest = self.cuda_graphs.largest
        if largest is not None and largest > capacity:
            raise ValueError(
                f"trtllm.cuda_graphs asks for batches of {largest}, more than capacity = "
                f"{capacity} ever needs: ask for fewer"
            )


def _check_whole_prompts(max_num_tokens: int, context_length: int | None) -> None:
    if context_length is None:
        raise ValueError(
            "context_length must be set where trtllm.batching.chunked_prefill = false: no prompt "
            "may then be longer than max_num_tokens"
        )
    if context_length > max_num_tokens:
        raise ValueError(
            f"trtllm.batching.max_num_tokens = {max_num_tokens} is less than context_length = "
            f"{context_length}, so long prompts would be refused: set chunked_prefill = true, or "
            "raise max_num_tokens"
        )


def require_directory_name(key: str, path: Path) -> None:
    """Refuses what could be meant as a name on a model hub.

    Raises:
        ValueError: the path is not absolute.
    """
    if not path.is_absolute():
        raise ValueError(
            f"{key} must be the absolute path of a directory: names of the Hugging Face Hub are "
            "not taken, since nothing is downloaded when a worker starts"
        )
