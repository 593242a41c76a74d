"""Writes a LoRA adapter for a GGUF model: random, seeded, and strong enough to be seen.

The format is GGUF version 3 (ggml's docs/gguf.md); what an adapter holds is what llama.cpp reads: a
pair of matrices for each changed weight W of shape (out, in), A (rank, in) and B (out, rank), and
W' = W + alpha / rank * B A.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.worker.engine.gguf import describe

RANK = 4
ALPHA = 8.0
SEED = 17
_ALIGNMENT = 32
_STRING, _FLOAT32 = 8, 6
_F32 = 0
_CHANGED = ("attn_q.weight", "attn_v.weight", "attn_output.weight")

Matrix = npt.NDArray[np.float32]


def write_adapter(path: Path, model: Path, *, seed: int = SEED) -> str:
    """Writes an adapter that fits a model; returns "sha256:<hex>" of the file.

    Args:
        path: of the file.
        model: GGUF file.
        seed: other ones make other adapters.

    Raises:
        OSError: a file cannot be read or written.
    """
    found = describe(model)
    random = np.random.default_rng(seed)
    matrices: list[tuple[str, Matrix]] = []
    for name, tensor in sorted(found.tensors.items()):
        if not name.endswith(_CHANGED):
            continue
        # The innermost dimension first, as GGUF has them.
        inner, outer = tensor.shape
        for part, shape in (("lora_a", (RANK, inner)), ("lora_b", (outer, RANK))):
            values = random.normal(0, 1 / np.sqrt(inner), shape).astype(np.float32)
            matrices.append((f"{name}.{part}", values))
    fields: dict[str, str | float] = {
        "general.type": "adapter",
        "general.architecture": str(found.fields["general.architecture"]),
        "adapter.type": "lora",
        "adapter.lora.alpha": ALPHA,
    }
    data = _gguf(fields, matrices)
    path.write_bytes(data)
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _gguf(fields: dict[str, str | float], matrices: Sequence[tuple[str, Matrix]]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(matrices), len(fields))
    for name, value in fields.items():
        head += _text(name)
        if isinstance(value, str):
            head += struct.pack("<I", _STRING) + _text(value)
        else:
            head += struct.pack("<If", _FLOAT32, value)
    body = b""
    for name, values in matrices:
        head += _text(name) + struct.pack("<I", values.ndim)
        head += struct.pack(f"<{values.ndim}Q", *reversed(values.shape))
        head += struct.pack("<IQ", _F32, len(body))
        body = _aligned(body + values.tobytes())
    return _aligned(head) + body


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)
