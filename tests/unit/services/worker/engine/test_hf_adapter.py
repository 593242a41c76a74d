from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.worker.engine.base import AdapterUnusable
from services.worker.engine.hf_adapter import (
    MODULES,
    AdapterLimits,
    CheckedAdapter,
    adapter_digest,
    check_adapter,
)
from services.worker.engine.hf_model import HfModel, read_model
from tests.standins.tiny_hf_model import (
    HIDDEN,
    INNER,
    LAYERS,
    write_adapter,
    write_model,
    write_safetensors,
)

Json = dict[str, Any]
LIMITS = AdapterLimits(max_rank=8)
PREFIX = "base_model.model.model.layers.0."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HfModel:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return read_model(folder)


class Workshop:
    """An adapter that a test changes before it is checked."""

    def __init__(self, folder: Path, model: HfModel) -> None:
        self.folder = write_adapter(folder)
        self.model = model
        self.limits = LIMITS

    def configure(self, **values: object) -> None:
        path = self.folder / "adapter_config.json"
        file: Json = json.loads(path.read_text())
        file.update(values)
        path.write_text(json.dumps(file))

    def weigh(self, tensors: dict[str, tuple[int, ...]]) -> None:
        """Writes other weights: shapes by name."""
        zeros = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
        write_safetensors(self.folder / "adapter_model.safetensors", zeros)

    def check(self) -> CheckedAdapter:
        return check_adapter(self.folder, self.model, self.limits)

    def refusal(self) -> str:
        with pytest.raises(AdapterUnusable) as caught:
            self.check()
        assert str(self.folder) not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def workshop(tmp_path: Path, model: HfModel) -> Workshop:
    return Workshop(tmp_path / "adapter", model)


def pair(module: str, outputs: int, inputs: int, rank: int = 4) -> dict[str, tuple[int, ...]]:
    name = f"{PREFIX}{module}"
    return {f"{name}.lora_A.weight": (rank, inputs), f"{name}.lora_B.weight": (outputs, rank)}


def test_an_adapter_that_fits_is_described(workshop: Workshop) -> None:
    found = workshop.check()

    assert found.rank == 4
    assert found.modules == {"q_proj", "v_proj"}
    assert found.weight_bytes == (workshop.folder / "adapter_model.safetensors").stat().st_size


def test_every_matrix_of_a_layer_may_be_changed(tmp_path: Path, model: HfModel) -> None:
    modules = tuple(sorted(MODULES - {"gate_up_proj"}))
    folder = write_adapter(tmp_path, rank=8, target_modules=modules)

    assert check_adapter(folder, model, LIMITS).modules == set(modules)


def test_targets_may_be_a_pattern_or_paths(workshop: Workshop) -> None:
    for targets in (".*(q|v)_proj", ["layers.0.self_attn.q_proj", "v_proj"], None):
        workshop.configure(target_modules=targets)
        assert workshop.check().modules == {"q_proj", "v_proj"}


def test_ranks_by_name_are_those_of_the_weights(workshop: Workshop) -> None:
    workshop.weigh(
        pair("self_attn.q_proj", HIDDEN, HIDDEN, 2) | pair("mlp.up_proj", INNER, HIDDEN, 8)
    )
    assert "another rank than 4" in workshop.refusal()

    workshop.configure(rank_pattern={"q_proj": 2, "up_proj": 8})
    assert workshop.check().rank == 8

    workshop.limits = AdapterLimits(max_rank=4)
    assert "rank of its layers.0.mlp.up_proj is not within 1..4" in workshop.refusal()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": None}, "only LORA"),
        ({"r": 9}, "within 1..8"),
        ({"r": 0}, "within 1..8"),
        ({"r": True}, "within 1..8"),
        ({"r": 2}, "another rank than 2"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"alpha_pattern": {"q_proj": 1}}, "alpha_pattern"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model too"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head'; here it may change"),
    ],
)
def test_what_an_engine_would_do_otherwise_is_refused(
    workshop: Workshop, values: Json, said: str
) -> None:
    workshop.configure(**values)

    assert said in workshop.refusal()


def test_a_start_that_leaves_the_model_alone_is_fine(workshop: Workshop) -> None:
    workshop.configure(init_lora_weights="gaussian", use_rslora=True, bias=None)

    assert workshop.check().rank == 4


GOOD = pair("self_attn.q_proj", HIDDEN, HIDDEN)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "no weights"),
        (pair("self_attn.q_proj", HIDDEN, HIDDEN + 1), "does not have the shape"),
        (pair("self_attn.q_proj", HIDDEN - 1, HIDDEN), "does not have the shape"),
        (pair("mlp.down_proj", INNER, HIDDEN), "does not have the shape"),
        (dict(list(GOOD.items())[:1]), "only half of layers.0.self_attn.q_proj"),
        (GOOD | {f"{PREFIX}self_attn.q_proj.lora_B.weight": (HIDDEN, 3)}, "is not within 1..8"),
        (GOOD | {f"{PREFIX}self_attn.q_proj.lora_B.weight": (HIDDEN,)}, "no matrix"),
        (GOOD | {"base_model.model.lm_head.lora_A.weight": (4, 4)}, "no LoRA of a layer's"),
        (GOOD | {f"{PREFIX}self_attn.q_proj.lora_magnitude_vector": (4,)}, "no LoRA of a layer's"),
        (GOOD | pair("mlp.experts.0.up_proj", INNER, HIDDEN), "no LoRA of a layer's"),
        (GOOD | pair("mlp.gate_up_proj", 2 * INNER, HIDDEN), "the model has no layers.0.mlp.gate"),
        (GOOD | pair("self_attn.qkv_proj", HIDDEN, HIDDEN), "'qkv_proj'; here it may change"),
        (
            {name.replace("layers.0", f"layers.{LAYERS}"): shape for name, shape in GOOD.items()},
            f"the model has no layers.{LAYERS}.self_attn.q_proj",
        ),
        (
            {name.replace("model.layers", "vision.layers"): shape for name, shape in GOOD.items()},
            "no LoRA of a layer's",
        ),
        (
            GOOD
            | {
                name.replace("model.layers", "language_model.model.layers"): shape
                for name, shape in GOOD.items()
            },
            "two tensors for the same half",
        ),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused(
    workshop: Workshop, tensors: dict[str, tuple[int, ...]], said: str
) -> None:
    workshop.weigh(tensors)

    assert said in workshop.refusal()


def test_only_what_the_engine_was_started_for_may_be_changed(workshop: Workshop) -> None:
    workshop.limits = AdapterLimits(max_rank=8, target_modules=frozenset({"q_proj"}))
    assert "'v_proj'; here it may change q_proj" in workshop.refusal()

    # The configuration is a claim; the tensors are what is loaded.
    workshop.configure(target_modules=["q_proj"])
    assert "'v_proj'" in workshop.refusal()


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (remove("adapter_config.json"), "there is no adapter_config.json"),
        (remove("adapter_model.safetensors"), "there is no adapter_model.safetensors"),
        (write("adapter_config.json", b"["), "adapter_config.json is no JSON"),
        (write("adapter_config.json", b" " * (2 << 20)), "longer than 1048576"),
        (write("adapter_model.safetensors", b"x" * 99), "no header of a safetensors file"),
        (write("adapter_model.bin", b"x"), "adapter_model.bin may run code"),
    ],
)
def test_files_that_are_no_adapter_are_refused(
    workshop: Workshop, break_it: Callable[[Path], object], said: str
) -> None:
    break_it(workshop.folder)

    assert said in workshop.refusal()


def test_of_packed_weights_the_side_to_the_rest_of_the_model_is_compared(
    workshop: Workshop, tmp_path: Path
) -> None:
    write_model(tmp_path / "packed")
    halves = {
        f"model.layers.0.{module}.qweight": np.zeros((2, 2), np.float32)
        for module in ("self_attn.q_proj", "self_attn.o_proj")
    }
    write_safetensors(tmp_path / "packed" / "model.safetensors", halves)
    workshop.model = read_model(tmp_path / "packed")

    workshop.weigh(pair("self_attn.q_proj", 2 * HIDDEN, HIDDEN))
    assert workshop.check().modules == {"q_proj"}
    workshop.weigh(pair("self_attn.q_proj", HIDDEN, HIDDEN + 1))
    assert "does not have the shape" in workshop.refusal()
    workshop.weigh(pair("self_attn.o_proj", HIDDEN + 1, HIDDEN))
    assert "does not have the shape" in workshop.refusal()


def test_the_digest_of_an_adapter_can_be_made_by_hand(workshop: Workshop) -> None:
    (workshop.folder / "README.md").write_text("not part of it")

    by_hand = subprocess.run(
        ["sh", "-c", "sha256sum adapter_config.json adapter_model.safetensors | sha256sum"],
        cwd=workshop.folder,
        capture_output=True,
        check=True,
        text=True,
    )
    assert adapter_digest(workshop.folder) == f"sha256:{by_hand.stdout.split()[0]}"

    remove("adapter_model.safetensors")(workshop.folder)
    with pytest.raises(AdapterUnusable, match="there is no adapter_model"):
        adapter_digest(workshop.folder)
