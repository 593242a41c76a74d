"""Configuration of the worker."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, Self

import pydantic

from libs.capabilities import FLAGS
from libs.config import Address, Seconds, Section, ServiceConfig
from services.worker.trtllm_config import TrtllmSection, require_directory_name

ToolParser = Literal["hermes", "llama3", "mistral", "none"]
ReasoningParser = Literal["think", "none"]
EngineName = Literal["sim", "llamacpp", "trtllm"]

_MEANINGLESS: Final[Mapping[EngineName, tuple[str, ...]]] = {
    "sim": ("model_path", "digest", "trtllm"),
    "llamacpp": ("trtllm",),
    "trtllm": ("threads",),
}
DEFAULT_CAPACITY: Final[Mapping[EngineName, int]] = {"sim": 256, "llamacpp": 8, "trtllm": 256}


class PeersSection(Section):
    """Who the worker calls.

    Attributes:
        scheduler: host:port that it registers with.
        catalog: host:port where it looks up the digest of its model version before it loads
            anything; unset means that it does not.
    """

    scheduler: Address
    catalog: Address | None = None


class SimSection(Section):
    """What the simulated GPU can do; about one H100 with an 8B model. See engine/sim.py.

    Attributes:
        prefill_tokens_per_s: prompt tokens per second; 0 means at no cost.
        prefill_chunk_tokens: most prompt tokens in one step.
        decode_base: duration of a step, whatever runs.
        decode_per_lane: more for each execution that decodes.
        mean_output_tokens: mean length at which the model ends by itself; 0 means never.
        kv_tokens: tokens in the KV cache; unset means capacity times context_length.
        adapter_load: duration of loading a LoRA adapter.
        adapters: LoRA adapters that are loaded at the same time.
    """

    prefill_tokens_per_s: float = pydantic.Field(default=20_000, ge=0)
    prefill_chunk_tokens: int = pydantic.Field(default=2048, ge=1)
    decode_base: Seconds = 0.008
    decode_per_lane: Seconds = 0.000_05
    mean_output_tokens: int = pydantic.Field(default=0, ge=0)
    kv_tokens: int | None = pydantic.Field(default=None, ge=1)
    adapter_load: Seconds = 0.05
    adapters: int = pydantic.Field(default=8, ge=1, le=1024)


class WorkerSection(Section):
    """What the worker runs.

    Attributes:
        name: id of the worker, stable over restarts: "workers/{name}".
        endpoint: host:port of its gRPC server as gateways reach it.
        model_version: "models/{model}/versions/{version}" that it serves.
        engine: "sim", "llamacpp" or "trtllm".
        model_path: GGUF file, for llamacpp; directory of a Hugging Face model, for trtllm.
        digest: "sha256:<hex>" that the weights have to have, a GGUF file's or a directory's as
            engine/hf_digest.py computes it; another one is refused before anything is loaded.
        chat_template: file with a Jinja2 template that is used instead of the model's own.
        tool_parser: format of the model's tool calls: "hermes", "llama3", "mistral", or "none";
            unset means that it is read off the chat template.
        reasoning_parser: format of its reasoning: "think" or "none"; unset likewise.
        adapters_dir: directory of LoRA adapters, each a file for llamacpp and a directory for
            trtllm; unset means none, for engines that read them.
        disabled: flags of Capabilities that are switched off, whatever the engine can do; a list,
            or a text with commas.
        capacity: executions in the batch at the same time; unset means 8 for llamacpp, 256 for sim
            and trtllm.
        max_waiting: executions that may wait beyond capacity; more are refused.
        context_length: prompt and output together, tokens; unset means the model's own, and 8192
            for sim.
        threads: CPU threads of the llamacpp engine; unset means one for each core but
            one.
        probe_within: longest time until the engine's first token, at start.
        abort_within: longest time that an aborted execution may take to end; then a canary has to
            prove that the engine lives. Above the longest step, prefill included.
        canary_every: silence of the engine, at work or idle, after which it gets a canary: an
            execution of one token that nobody hears of.
        silent_within: silence of the engine after which it counts as hung and the process ends.
            More than the longest step has to lie between this and canary_every; larger for an
            engine that counts no steps and prefills long prompts in one piece.
        exit_within: longest time that the process may take to end once it has drained or its
            engine is dead; then it ends by force, with status 1.
        adapter_within: longest time that the engine may take to load an adapter.
        sim: costs of the simulated engine.
        trtllm: the trtllm engine.
    """

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    endpoint: Address
    model_version: str = pydantic.Field(
        pattern=r"^models/[A-Za-z0-9][A-Za-z0-9._-]{0,62}/versions/[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
    )
    engine: EngineName
    model_path: Path | None = None
    digest: str | None = pydantic.Field(default=None, pattern=r"^sha256:[0-9a-f]{64}$")
    chat_template: Path | None = None
    tool_parser: ToolParser | None = None
    reasoning_parser: ReasoningParser | None = None
    adapters_dir: Path | None = None
    disabled: frozenset[str] = frozenset()
    capacity: int | None = pydantic.Field(default=None, ge=1, le=4096)
    max_waiting: int = pydantic.Field(default=64, ge=0, le=65_536)
    context_length: int | None = pydantic.Field(default=None, ge=2, le=1 << 24)
    threads: int | None = pydantic.Field(default=None, ge=1, le=1024)
    probe_within: Seconds = 60.0
    abort_within: Seconds = 60.0
    canary_every: Seconds = pydantic.Field(default=4.0, gt=0)
    silent_within: Seconds = 9.0
    exit_within: Seconds = pydantic.Field(default=30.0, gt=0)
    adapter_within: Seconds = 30.0
    sim: SimSection = SimSection()
    trtllm: TrtllmSection = TrtllmSection()

    @property
    def places(self) -> int:
        """Executions in the batch at the same time."""
        return self.capacity or DEFAULT_CAPACITY[self.engine]

    @pydantic.field_validator("disabled", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @pydantic.field_validator("disabled", mode="after")
    @classmethod
    def _require_flags(cls, value: frozenset[str]) -> frozenset[str]:
        unknown = sorted(value.difference(FLAGS))
        if unknown:
            raise ValueError(f"no flag of Capabilities: {', '.join(unknown)}")
        return value

    @pydantic.model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.engine != "sim" and self.model_path is None:
            raise ValueError(f"model_path must be set for the {self.engine} engine")
        for name in _MEANINGLESS[self.engine]:
            if name in self.model_fields_set and getattr(self, name) is not None:
                raise ValueError(f"{name} has no meaning for the {self.engine} engine")
        return self

    @pydantic.model_validator(mode="after")
    def _check_silence(self) -> Self:
        if self.silent_within < 2 * self.canary_every:
            raise ValueError("silent_within must be at least twice canary_every")
        return self

    @pydantic.model_validator(mode="after")
    def _check_trtllm(self) -> Self:
        if self.engine != "trtllm":
            return self
        if self.model_path is not None:
            require_directory_name("model_path", self.model_path)
        self.trtllm.check_sizes(self.places, self.context_length)
        if self.trtllm.lora.enabled != (self.adapters_dir is not None):
            raise ValueError(
                "adapters_dir and trtllm.lora.enabled = true go together: set both or neither"
            )
        return self


class Config(ServiceConfig):
    """Everything in the worker's file.

    Attributes:
        peers: who it calls.
        worker: what it runs.
    """

    peers: PeersSection
    worker: WorkerSection
