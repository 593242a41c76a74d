"""Writes a LoRA adapter in PEFT's form for a Hugging Face model: random, seeded, and strong."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import EngineStartError
from services.worker.engine.hf_adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_digest
from services.worker.engine.hf_model import read_model
from tools.conformance.verdict import CannotShow

RANK = 4
ALPHA = 8.0
_CHANGED = ("q_proj", "v_proj")
# Of the model's own names, "layers.0.self_attn.q_proj", PEFT makes these.
_NAME = "base_model.model.model.{matrix}.lora_{half}.weight"

Matrix = npt.NDArray[np.float32]


def write_adapter(folder: Path, model: Path, *, seed: int) -> str:
    """Writes an adapter that fits a model; returns its digest.

    Args:
        folder: made here.
        model: directory of a Hugging Face model.
        seed: other ones make other adapters.

    Raises:
        CannotShow: the model cannot be read, or has no such matrices.
    """
    try:
        matrices = read_model(model).matrices
    except EngineStartError as error:
        raise CannotShow(f"no adapter can be made: {error}") from None
    random = np.random.default_rng(seed)
    tensors: dict[str, Matrix] = {}
    for name, shape in sorted(matrices.items()):
        if shape is None or not name.endswith(_CHANGED):
            continue
        outputs, inputs = shape
        for half, size in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            values = random.normal(0, 1 / np.sqrt(inputs), size).astype(np.float32)
            tensors[_NAME.format(matrix=name, half=half)] = values
    if not tensors:
        raise CannotShow("the model has none of the matrices that adapters for checks change")
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(_config()), encoding="utf-8")
    (folder / WEIGHTS_FILE).write_bytes(_safetensors(tensors))
    return adapter_digest(folder)


def _config() -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(_CHANGED),
    }


def _safetensors(tensors: dict[str, Matrix]) -> bytes:
    header: dict[str, object] = {}
    body = b""
    for name, values in tensors.items():
        data = values.tobytes()
        place = [len(body), len(body) + len(data)]
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": place}
        body += data
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + body
