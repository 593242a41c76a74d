"""A model of more than 100 million parameters whose weights mean nothing, as a GGUF file.

What an engine does with a token depends on the shape of the weights, not on their values. The
vocabulary is that of our own small model, whose metadata is copied; the shape is another. Matrices
are in Q8_0, vectors in F32, as in the file that the vocabulary comes from.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

# Source: ggml/docs/gguf.md.
_MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32
_UINT32, _STRING, _ARRAY = 4, 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_F32, _Q8_0 = 0, 8
# Q8_0: 32 numbers as one float16, which they are multiplied with, and 32 bytes.
_BLOCK = 32
_BLOCK_TYPE = np.dtype([("scale", "<f2"), ("numbers", "i1", (_BLOCK,))])
_SPREAD = 0.02
"""Standard deviation of weights, about that of a model before its training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Shape of a Llama model.

    Attributes:
        vocabulary: tokens; those of the file that the metadata comes from.
        context: prompt and output together, tokens.
        width: of the residual stream.
        hidden: of the feed-forward network.
        layers: how many.
        heads: of queries.
        key_heads: of keys and values.
    """

    vocabulary: int = 2048
    context: int = 1024
    width: int = 1024
    hidden: int = 2816
    layers: int = 9
    heads: int = 16
    key_heads: int = 4

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, (outputs, inputs), in the order of the file."""
        keys = self.width // self.heads * self.key_heads
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocabulary, self.width)}
        for layer in range(self.layers):
            found |= {
                f"blk.{layer}.{name}.weight": shape
                for name, shape in {
                    "attn_norm": (self.width,),
                    "attn_q": (self.width, self.width),
                    "attn_k": (keys, self.width),
                    "attn_v": (keys, self.width),
                    "attn_output": (self.width, self.width),
                    "ffn_norm": (self.width,),
                    "ffn_gate": (self.hidden, self.width),
                    "ffn_up": (self.hidden, self.width),
                    "ffn_down": (self.width, self.hidden),
                }.items()
            }
        return found | {
            "output_norm.weight": (self.width,),
            "output.weight": (self.vocabulary, self.width),
        }

    def parameters(self) -> int:
        """How many numbers all tensors have."""
        return sum(int(np.prod(shape)) for shape in self.tensors().values())

    def metadata(self) -> dict[str, int]:
        """What of a file's metadata tells the shape."""
        head = self.width // self.heads
        return {
            "llama.vocab_size": self.vocabulary,
            "llama.context_length": self.context,
            "llama.embedding_length": self.width,
            "llama.block_count": self.layers,
            "llama.feed_forward_length": self.hidden,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.key_heads,
            "llama.attention.key_length": head,
            "llama.attention.value_length": head,
            "llama.rope.dimension_count": head,
        }


def write(path: Path, like: Path, shape: Shape) -> None:
    """Writes the model.

    Args:
        path: of the new file.
        like: a GGUF file of a Llama model; its vocabulary must be as large as the shape says.
        shape: of the new one.
    """
    entries = _metadata(like)
    for key, value in shape.metadata().items():
        entries[key] = struct.pack("<II", _UINT32, value)
    tensors = shape.tensors()
    with path.open("wb") as file:
        file.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(entries)))
        for key, entry in entries.items():
            file.write(_text(key) + entry)
        offset = 0
        for name, lengths in tensors.items():
            kind = _F32 if len(lengths) == 1 else _Q8_0
            # Innermost first.
            dimensions = struct.pack(f"<I{len(lengths)}Q", len(lengths), *reversed(lengths))
            file.write(_text(name) + dimensions + struct.pack("<IQ", kind, offset))
            offset += _padded(_bytes_of(lengths))
        chance = np.random.default_rng(0)
        for lengths in tensors.values():
            _align(file)
            _values(lengths, chance).tofile(file)
        _align(file)


def _values(lengths: tuple[int, ...], chance: np.random.Generator) -> NDArray[np.generic]:
    if len(lengths) == 1:
        return np.ones(lengths, np.float32)
    blocks = np.empty(int(np.prod(lengths)) // _BLOCK, _BLOCK_TYPE)
    blocks["numbers"] = chance.integers(-127, 128, blocks["numbers"].shape, np.int8)
    # Numbers that are spread evenly from -127 to 127 have a standard deviation of about 73.
    blocks["scale"] = _SPREAD / 73
    return blocks


def _bytes_of(lengths: tuple[int, ...]) -> int:
    numbers = int(np.prod(lengths))
    return numbers * 4 if len(lengths) == 1 else numbers // _BLOCK * _BLOCK_TYPE.itemsize


def _padded(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _align(file: IO[bytes]) -> None:
    file.write(bytes(_padded(file.tell()) - file.tell()))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _metadata(path: Path) -> dict[str, bytes]:
    """Reads a file's metadata: type and value of each key as they stand there."""
    entries = {}
    with path.open("rb") as file:
        assert file.read(4) == _MAGIC, path
        _, _, count = struct.unpack("<IQQ", file.read(20))
        for _ in range(count):
            (length,) = struct.unpack("<Q", file.read(8))
            key = file.read(length).decode()
            start = file.tell()
            (kind,) = struct.unpack("<I", file.read(4))
            _skip(file, kind)
            end = file.tell()
            file.seek(start)
            entries[key] = file.read(end - start)
    return entries


def _skip(file: IO[bytes], kind: int) -> None:
    if kind == _STRING:
        file.seek(struct.unpack("<Q", file.read(8))[0], 1)
    elif kind == _ARRAY:
        item, count = struct.unpack("<IQ", file.read(12))
        for _ in range(count):
            _skip(file, item)
    else:
        file.seek(_SIZES[kind], 1)
