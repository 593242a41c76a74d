"""Configuration of the worker."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import pydantic

from libs.capabilities import FLAGS
from libs.config import Address, Seconds, Section, ServiceConfig

ToolParser = Literal["hermes", "llama3", "mistral", "none"]
ReasoningParser = Literal["think", "none"]


class PeersSection(Section):
    """Who the worker calls.

    Attributes:
        scheduler: host:port that it registers with.
    """

    scheduler: Address


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
        engine: "sim" or "llamacpp".
        model_path: GGUF file, for llamacpp.
        chat_template: file with a Jinja2 template that is used instead of the model's own.
        tool_parser: format of the model's tool calls: "hermes", "llama3", "mistral", or "none";
            unset means that it is read off the chat template.
        reasoning_parser: format of its reasoning: "think" or "none"; unset likewise.
        adapters_dir: directory of LoRA adapters; unset means none, for engines that read files.
        disabled: flags of Capabilities that are switched off, whatever the engine can do; a list,
            or a text with commas.
        capacity: executions in the batch at the same time; unset means 8 for llamacpp, 256 for sim.
        max_waiting: executions that may wait beyond capacity; more are refused.
        context_length: prompt and output together, tokens; unset means the model's own, and 8192
            for sim.
        threads: CPU threads of the llamacpp engine; unset means one for each core but
            one.
        probe_within: longest time until the engine's first token, at start.
        abort_within: longest time that an aborted execution may take to end; then the engine
            counts as hung and the process ends. Above the longest step, prefill included.
        adapter_within: longest time that the engine may take to load an adapter.
        sim: costs of the simulated engine.
    """

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    endpoint: Address
    model_version: str = pydantic.Field(
        pattern=r"^models/[A-Za-z0-9][A-Za-z0-9._-]{0,62}/versions/[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
    )
    engine: Literal["sim", "llamacpp"]
    model_path: Path | None = None
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
    adapter_within: Seconds = 30.0
    sim: SimSection = SimSection()

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
        if self.engine == "llamacpp" and self.model_path is None:
            raise ValueError("model_path must be set for the llamacpp engine")
        if self.engine == "sim" and self.model_path is not None:
            raise ValueError("model_path has no meaning for the sim engine")
        return self


class Config(ServiceConfig):
    """Everything in the worker's file.

    Attributes:
        peers: who it calls.
        worker: what it runs.
    """

    peers: PeersSection
    worker: WorkerSection
