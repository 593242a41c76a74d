"""A plain forward pass in numpy over a GGUF file, independent of llama.cpp, for tests.

It knows the llama architecture only. Weights are read back from their eight bits; the arithmetic is
float32, while llama.cpp rounds activations to eight bits, so results agree to a tenth or so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Reference:
    """A model read from a GGUF file. `weights` may be changed."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        self.weights: dict[str, Floats] = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            for tensor in reader.tensors
        }
        self._layers = int(fields["llama.block_count"])
        self._heads = int(fields["llama.attention.head_count"])
        self._key_heads = int(fields["llama.attention.head_count_kv"])
        self._epsilon = float(fields["llama.attention.layer_norm_rms_epsilon"])
        self._base = float(fields["llama.rope.freq_base"])

    def states(self, ids: Sequence[int]) -> Floats:
        """The last hidden states, shape (ids, width)."""
        stream = self.weights["token_embd.weight"][list(ids)]
        for layer in range(self._layers):
            stream = stream + self._attention(layer, stream)
            stream = stream + self._feed_forward(layer, stream)
        return self._norm("output_norm", stream)

    def logprobs(self, ids: Sequence[int]) -> Floats:
        """Log-probabilities of what follows each id, shape (ids, vocabulary)."""
        logits = self.states(ids) @ self.weights["output.weight"].T
        logits = logits - logits.max(axis=1, keepdims=True)
        scores: Floats = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return scores

    def _attention(self, layer: int, stream: Floats) -> Floats:
        count = len(stream)
        width = stream.shape[1] // self._heads
        normed = self._norm(f"blk.{layer}.attn_norm", stream)
        query, key, value = (
            (normed @ self.weights[f"blk.{layer}.attn_{part}.weight"].T).reshape(count, -1, width)
            for part in "qkv"
        )
        group = self._heads // self._key_heads
        queries = self._rotate(query).transpose(1, 0, 2)
        keys = np.repeat(self._rotate(key).transpose(1, 2, 0), group, axis=0)
        values = np.repeat(value.transpose(1, 0, 2), group, axis=0)
        scores = queries @ keys / np.float32(width**0.5)
        scores += np.triu(np.full((count, count), -np.inf, np.float32), 1)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = (shares @ values).transpose(1, 0, 2).reshape(count, -1)
        update: Floats = mixed @ self.weights[f"blk.{layer}.attn_output.weight"].T
        return update

    def _feed_forward(self, layer: int, stream: Floats) -> Floats:
        normed = self._norm(f"blk.{layer}.ffn_norm", stream)
        gate, up = (
            normed @ self.weights[f"blk.{layer}.ffn_{part}.weight"].T for part in ("gate", "up")
        )
        inner = gate * (np.tanh(gate / 2) + 1) / 2 * up
        update: Floats = inner @ self.weights[f"blk.{layer}.ffn_down.weight"].T
        return update

    def _norm(self, name: str, stream: Floats) -> Floats:
        square = np.square(stream).mean(axis=-1, keepdims=True, dtype=np.float32)
        scaled: Floats = stream / np.sqrt(square + np.float32(self._epsilon))
        return scaled * self.weights[f"{name}.weight"]

    def _rotate(self, vectors: Floats) -> Floats:
        half = vectors.shape[-1] // 2
        angles = np.outer(np.arange(len(vectors)), self._base ** -(np.arange(half) / half))
        cosine, sine = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
        even, odd = vectors[..., 0::2], vectors[..., 1::2]
        turned = np.stack((even * cosine - odd * sine, even * sine + odd * cosine), axis=-1)
        return turned.reshape(vectors.shape)


def write_adapter(
    path: Path, reference: Reference, *, seed: int, architecture: str = "llama", rank: int = 4
) -> dict[str, Floats]:
    """Writes a LoRA adapter in GGUF; returns what it adds to each weight."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * rank)
    added: dict[str, Floats] = {}
    for name, weight in reference.weights.items():
        if not name.endswith(("attn_q.weight", "attn_v.weight", "ffn_up.weight")):
            continue
        rows, columns = weight.shape
        down = rng.normal(0, 0.05, (rank, columns)).astype(np.float32)
        up = rng.normal(0, 0.2, (rows, rank)).astype(np.float32)
        writer.add_tensor(f"{name}.lora_a", down)
        writer.add_tensor(f"{name}.lora_b", up)
        added[name] = (2 * up @ down).astype(np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return added
