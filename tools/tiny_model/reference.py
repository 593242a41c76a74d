"""A plain reading of the GGUF file in numpy: the evaluation measures the file that we ship.

Independent of torch and of llama.cpp, so that it can be compared with both. Weights are read back
from their eight bits, the arithmetic is float32. It is a measuring tool, not an engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, models

from tools.tiny_model.chat_format import SPECIAL_TOKENS
from tools.tiny_model.tokenizer import empty_tokenizer

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(slots=True)
class Cache:
    """Keys and values of every layer, float32, (layers, rows, key_heads, length, head_width)."""

    keys: Floats
    values: Floats
    length: int = 0


class ReferenceModel:
    """A model read from a GGUF file; it knows the llama architecture only."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self._fields = {name: field.contents() for name, field in reader.fields.items()}
        self._weights: dict[str, Floats] = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            for tensor in reader.tensors
        }
        self.layers: int = self._fields["llama.block_count"]
        self.heads: int = self._fields["llama.attention.head_count"]
        self.key_heads: int = self._fields["llama.attention.head_count_kv"]
        self.width: int = self._fields["llama.embedding_length"]
        self.context: int = self._fields["llama.context_length"]
        self._epsilon: float = self._fields["llama.attention.layer_norm_rms_epsilon"]
        self.parameters = sum(weight.size for weight in self._weights.values())
        self.tokenizer = _read_tokenizer(self._fields)
        half = self.width // self.heads // 2
        base: float = self._fields["llama.rope.freq_base"]
        angles = np.outer(np.arange(self.context), base ** -(np.arange(half) / half))
        self._cosine, self._sine = (f(angles).astype(np.float32) for f in (np.cos, np.sin))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; the names of special tokens become special tokens."""
        token_ids: list[int] = self.tokenizer.encode(text).ids
        return token_ids

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of `token_ids` without special tokens."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def new_cache(self, rows: int, length: int) -> Cache:
        """Return an empty cache for `rows` sequences of at most `length` tokens."""
        shape = (self.layers, rows, self.key_heads, length, self.width // self.heads)
        return Cache(np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    def forward(self, token_ids: Ids, cache: Cache) -> Floats:
        """Append `token_ids`, int64 (rows, count), and return logits (rows, count, vocabulary)."""
        stream = self._weights["token_embd.weight"][token_ids]
        for layer in range(self.layers):
            stream = stream + self._attention(layer, stream, cache)
            stream = stream + self._feed_forward(layer, stream)
        cache.length += token_ids.shape[1]
        logits: Floats = self._norm("output_norm", stream) @ self._weights["output.weight"].T
        return logits

    def _attention(self, layer: int, stream: Floats, cache: Cache) -> Floats:
        rows, count, _ = stream.shape
        start, stop = cache.length, cache.length + count
        normed = self._norm(f"blk.{layer}.attn_norm", stream)
        query, key, value = (
            (normed @ self._weights[f"blk.{layer}.attn_{part}.weight"].T).reshape(
                rows, count, -1, self.width // self.heads
            )
            for part in "qkv"
        )
        cache.keys[layer, :, :, start:stop] = self._rotate(key, start).swapaxes(1, 2)
        cache.values[layer, :, :, start:stop] = value.swapaxes(1, 2)
        keys, values = (part[layer, :, :, None, :stop] for part in (cache.keys, cache.values))
        # Neighbouring query heads share a key head: (rows, key_heads, group, count, head_width).
        grouped = (rows, count, self.key_heads, self.heads // self.key_heads, -1)
        asking: Floats = self._rotate(query, start).reshape(grouped).transpose(0, 2, 3, 1, 4)
        scores: Floats = asking @ keys.swapaxes(-1, -2) / np.float32(asking.shape[-1] ** 0.5)
        scores += np.triu(np.full((count, stop), -np.inf, np.float32), start + 1)
        mixed: Floats = (_softmax(scores) @ values).transpose(0, 3, 1, 2, 4)
        update: Floats = (
            mixed.reshape(rows, count, -1) @ self._weights[f"blk.{layer}.attn_output.weight"].T
        )
        return update

    def _feed_forward(self, layer: int, stream: Floats) -> Floats:
        normed = self._norm(f"blk.{layer}.ffn_norm", stream)
        gate = normed @ self._weights[f"blk.{layer}.ffn_gate.weight"].T
        up = normed @ self._weights[f"blk.{layer}.ffn_up.weight"].T
        # The hyperbolic tangent is the logistic curve that can not overflow.
        inner = gate * (np.tanh(gate / 2) + 1) / 2 * up
        update: Floats = inner @ self._weights[f"blk.{layer}.ffn_down.weight"].T
        return update

    def _norm(self, name: str, stream: Floats) -> Floats:
        square = np.square(stream).mean(axis=-1, keepdims=True, dtype=np.float32)
        scaled: Floats = stream / np.sqrt(square + np.float32(self._epsilon))
        return scaled * self._weights[f"{name}.weight"]

    def _rotate(self, vectors: Floats, start: int) -> Floats:
        stop = start + vectors.shape[1]
        cosine, sine = self._cosine[start:stop, None], self._sine[start:stop, None]
        even, odd = vectors[..., 0::2], vectors[..., 1::2]
        turned = np.stack((even * cosine - odd * sine, even * sine + odd * cosine), axis=-1)
        return turned.reshape(vectors.shape)


def _softmax(scores: Floats) -> Floats:
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: Floats = raised / raised.sum(axis=-1, keepdims=True)
    return shares


def _read_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer as the file describes it, not as training left it."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = empty_tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer
