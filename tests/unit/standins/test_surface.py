"""What the stand-in for tensorrt_llm refuses, and what each version has."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest

from tests.standins.tiny_hf_model import TinyModel
from tests.unit.standins.conftest import PROMPT, STANDINS, Load, Standin

OLD, NEW, NEWEST = "1.2.1", "1.3.0rc14", "1.4.0rc1"


def test_unknown_arguments_of_the_constructor_are_refused(plain: Standin) -> None:
    with pytest.raises(ValueError, match="LLM got invalid argument: block_reuse"):
        plain.llm(block_reuse=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tensor_parallel_size", True), ("max_batch_size", "8"), ("dtype", None), ("backend", 3)],
)
def test_arguments_of_another_type_are_refused(plain: Standin, name: str, value: object) -> None:
    with pytest.raises(TypeError, match=name):
        plain.llm(**{name: value})


@pytest.mark.parametrize(
    "config",
    [
        {"kv_cache_config": {"fraction": 0.5}},
        {"kv_cache_config": {"tokens_per_block": 32.5}},
        {"scheduler_config": {"capacity_scheduler_policy": "FIFO"}},
        {"cuda_graph_config": {"sizes": [1]}},
        {"speculative_config": {"decoding_type": "Guess"}},
        {"speculative_config": {"decoding_type": "NGram", "draft": 3}},
    ],
)
def test_nested_configurations_are_strict(plain: Standin, config: dict[str, object]) -> None:
    with pytest.raises((pydantic.ValidationError, ValueError)):
        plain.llm(**config)


def test_more_devices_than_there_are_cannot_be_used(load: Load) -> None:
    with pytest.raises(RuntimeError, match="GPUs"):
        load(gpus=2).llm(tensor_parallel_size=4)


def test_a_model_that_is_not_there_cannot_be_loaded(plain: Standin, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model directory"):
        plain.module.LLM(model=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"top_k": -1}, ValueError),
        ({"top_p": 1.5}, ValueError),
        ({"temperature": -1.0}, ValueError),
        ({"n": 2, "best_of": 1}, ValueError),
        ({"n": 2}, ValueError),
        ({"random_seed": 1}, TypeError),
        ({"max_tokens": 5.0}, TypeError),
        ({"max_tokens": np.int64(5)}, TypeError),
        ({"stop_token_ids": (1, 2)}, TypeError),
        ({"ignore_eos": 1}, TypeError),
        ({"embedding_bias": np.zeros(8, np.float32)}, TypeError),
    ],
)
def test_sampling_parameters_are_strict(
    plain: Standin, fields: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        plain.params(**fields)


def test_sampling_parameters_take_no_places_and_no_other_fields(plain: Standin) -> None:
    with pytest.raises(TypeError):
        plain.module.SamplingParams(1)
    with pytest.raises(AttributeError):
        plain.params().max_token = 3


def test_more_than_one_guide_is_refused(plain: Standin) -> None:
    guided = plain.name("tensorrt_llm.sampling_params.GuidedDecodingParams")

    with pytest.raises(ValueError, match="only one guide"):
        guided(regex="a", json={"type": "object"})


def test_a_lora_request_wants_a_path_that_exists(plain: Standin, tmp_path: Path) -> None:
    request = plain.name("tensorrt_llm.executor.request.LoRARequest")

    with pytest.raises(ValueError, match="does not exist"):
        request("a", 1)
    with pytest.raises(TypeError):
        request("a", 1, str(tmp_path), "gguf")


@pytest.mark.parametrize("field", ["generate_async", "SamplingParams", "KvCacheConfig"])
def test_what_is_newer_can_be_detected(load: Load, field: str) -> None:
    expected = {"generate_async": "priority", "SamplingParams": "logprobs_mode"}
    name = expected.get(field, "use_kv_cache_manager_v2")

    assert name not in names_of(load(version=OLD), field)


@pytest.mark.parametrize("field", ["generate_async", "SamplingParams", "KvCacheConfig"])
def test_newer_versions_have_more(load: Load, field: str) -> None:
    expected = {"generate_async": "priority", "SamplingParams": "logprobs_mode"}
    name = expected.get(field, "use_kv_cache_manager_v2")

    assert name in names_of(load(version=NEW), field)


def names_of(standin: Standin, what: str) -> set[str]:
    if what == "generate_async":
        return set(inspect.signature(standin.module.LLM.generate_async).parameters)
    if what == "SamplingParams":
        return {entry.name for entry in dataclasses.fields(standin.module.SamplingParams)}
    return set(standin.name(f"tensorrt_llm.llmapi.{what}").model_fields)


@pytest.mark.parametrize(
    ("version", "there", "gone"),
    [
        (OLD, "tensorrt_llm.lora_helper", "tensorrt_llm._torch.peft.lora.config"),
        (NEWEST, "tensorrt_llm._torch.peft.lora.config", "tensorrt_llm.lora_helper"),
    ],
)
def test_lora_config_moves(load: Load, version: str, there: str, gone: str) -> None:
    standin = load(version=version)

    assert standin.name(f"{there}.LoraConfig")(max_lora_rank=8).max_lora_rank == 8
    with pytest.raises(ModuleNotFoundError):
        standin.name(f"{gone}.LoraConfig")


def test_only_newer_versions_know_a_dead_engine_and_their_health(load: Load) -> None:
    old = load(version=OLD)

    assert not hasattr(old.module.LLM, "_check_health")
    with pytest.raises(AttributeError):
        old.name("tensorrt_llm.executor.EngineDeadError")


def test_the_newest_version_knows_a_dead_engine_and_its_health(load: Load) -> None:
    newest = load(version=NEWEST)

    assert issubclass(newest.name("tensorrt_llm.executor.EngineDeadError"), Exception)
    assert newest.llm()._check_health() is True


def test_arguments_of_the_constructor_can_be_detected(plain: Standin) -> None:
    fields = plain.name("tensorrt_llm.llmapi.llm_args.TorchLlmArgs").model_fields

    assert {"model", "kv_cache_config", "guided_decoding_backend"} <= set(fields)
    assert "enable_lora" not in fields


def test_outputs_have_the_documented_names(plain: Standin) -> None:
    source = json.loads((STANDINS / "tensorrt_llm" / "signatures.json").read_text())
    output = plain.name("tensorrt_llm.llmapi.CompletionOutput")
    result = plain.name("tensorrt_llm.llmapi.RequestOutput")
    made: Any = result(2, PROMPT, plain.params())

    fields = [entry.name for entry in dataclasses.fields(output) if entry.init]
    assert fields == list(source["CompletionOutput"])
    assert all(hasattr(output(0), name) for name in source["CompletionOutput.properties"])
    names = [name.strip("()").partition("(")[0] for name in source["RequestOutput"]]
    assert [one for name in names for one in name.split("/") if not hasattr(made, one)] == []


def test_an_engine_cannot_be_pickled(plain: Standin) -> None:
    with pytest.raises(RuntimeError, match="pickled"):
        pickle.dumps(plain.llm())


@pytest.mark.parametrize(
    "settings",
    [
        {"speed": 3},
        {"faults": [{"name": "wedged"}]},
        {"faults": [{"name": "wedge", "seconds": 1}]},
        {"features": {"EngineDead": True}},
    ],
)
def test_unknown_settings_are_refused(load: Load, settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"unknown|no fault|has no|no features"):
        load(**settings).llm()


def test_importing_prints_and_a_process_may_die_at_a_token(model: TinyModel) -> None:
    """In a process of its own. Importing it does not import torch."""
    code = (
        "import sys, tensorrt_llm\n"
        "assert 'torch' not in sys.modules\n"
        "llm = tensorrt_llm.LLM(model=sys.argv[1])\n"
        "result = llm.generate_async([1, 2], streaming=True)\n"
        "print(len(next(result).outputs[0].token_ids))\n"
        "result.result()\n"
    )
    environment = {
        **os.environ,  # noqa: TID251 - a child process needs its own
        "PYTHONPATH": str(STANDINS),
        "MAAS_STANDIN_TRTLLM": json.dumps(
            {"step_s": 0.02, "faults": [{"name": "process_killed", "request": 1, "tokens": 3}]}
        ),
    }
    command = [sys.executable, "-u", "-c", code, str(model.folder)]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert done.stdout == "[TensorRT-LLM] TensorRT-LLM version: 1.2.1\n1\n"
    assert done.returncode == -signal.SIGKILL


def test_tensors_are_strict(plain: Standin) -> None:
    torch: Any = pytest.importorskip("torch")
    bias = torch.zeros(4, dtype=torch.float32)

    bias[torch.tensor([1, 2])] = torch.tensor([0.5, -1.0])

    assert bias.tolist() == [0, 0.5, -1, 0]
    assert plain.params(embedding_bias=bias).embedding_bias is bias
    with pytest.raises(RuntimeError, match="dtypes"):
        bias[torch.tensor([1])] = torch.tensor([1])
