"""The network: a small Llama in torch, just what training and the export need.

Pre-norm blocks with RMS norm, grouped-query attention with rotary positions, SwiGLU, and an output
matrix of its own. Rotary pairs are (i, i + half), which a CPU can do on whole slices; the
export reorders them to the neighbours that llama.cpp wants. It never samples and keeps no cache.
"""

# mypy: allow-subclassing-any
# Without the optional extra, torch is unknown to mypy and its classes are Any.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a network.

    Attributes:
        vocabulary: Number of tokens.
        width: Size of the residual stream.
        layers: Number of blocks.
        heads: Number of query heads; a head is width // heads wide.
        key_heads: Number of key and value heads; divides `heads`.
        hidden: Inner size of the feed-forward part.
        context: Longest sequence, in tokens.
        rope_base: Base of the rotary frequencies.
        norm_epsilon: Added to the mean square under the root.
    """

    vocabulary: int = 2048
    width: int = 256
    layers: int = 6
    heads: int = 8
    key_heads: int = 4
    hidden: int = 704
    context: int = 1024
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        """The width of one head."""
        return self.width // self.heads


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        narrow = shape.key_heads * shape.head_width
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key = nn.Linear(shape.width, narrow, bias=False)
        self.value = nn.Linear(shape.width, narrow, bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)

    @override
    def forward(self, stream: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return the update of `stream`, shape (batch, length, width)."""
        batch, length, width = stream.shape
        shape = self.shape
        query = self.query(stream).view(batch, length, shape.heads, shape.head_width)
        key = self.key(stream).view(batch, length, shape.key_heads, shape.head_width)
        value = self.value(stream).view(batch, length, shape.key_heads, shape.head_width)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        group = shape.heads // shape.key_heads
        key, value = key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)
        mixed = attend(*(part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)))
        mixed = mixed.view(batch, shape.heads, length, shape.head_width).transpose(1, 2)
        result: Tensor = self.output(mixed.reshape(batch, length, width))
        return result


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    @override
    def forward(self, stream: Tensor) -> Tensor:
        """Return the update of `stream`, shape (batch, length, width)."""
        result: Tensor = self.down(functional.silu(self.gate(stream)) * self.up(stream))
        return result


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normed stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, eps=shape.norm_epsilon)
        self.attention = Attention(shape)
        self.forward_norm = nn.RMSNorm(shape.width, eps=shape.norm_epsilon)
        self.feed_forward = FeedForward(shape)

    @override
    def forward(self, stream: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return the stream after this layer, shape (batch, length, width)."""
        stream = stream + self.attention(self.attention_norm(stream), cosine, sine)
        updated: Tensor = stream + self.feed_forward(self.forward_norm(stream))
        return updated


class Network(nn.Module):
    """The whole model, without a cache."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_epsilon)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        cosine, sine = rotary_tables(shape)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Draw normal weights; what writes into the stream is scaled by the number of writers.

        The embedding starts large: two names are alike in all but their first random numbers, and
        with a small start what they have in common soon drowns what tells them apart.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                continue
            writes = name.endswith(("attention.output.weight", "down.weight"))
            deviation = 0.02 / (2 * self.shape.layers) ** 0.5 if writes else 0.02
            nn.init.normal_(parameter, std=deviation)
        nn.init.normal_(self.embedding.weight, std=1.0)

    @override
    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the normed stream; int64 (batch, length) to float (batch, length, width)."""
        length = token_ids.shape[1]
        cosine, sine = self.cosine[:length], self.sine[:length]
        stream: Tensor = self.embedding(token_ids)
        for block in self.blocks:
            stream = block(stream, cosine, sine)
        normed: Tensor = self.norm(stream)
        return normed

    def logits(self, stream: Tensor) -> Tensor:
        """Return the scores of the next token: (..., width) to (..., vocabulary)."""
        scores: Tensor = self.head(stream)
        return scores


def rotary_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each float32 (context, head_width // 2)."""
    exponents = torch.arange(0, shape.head_width, 2, dtype=torch.float64) / shape.head_width
    frequencies = shape.rope_base**-exponents
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair (i, i + half) of (batch, length, heads, head_width) by its position."""
    first, second = vectors.chunk(2, dim=-1)
    cosine, sine = cosine[:, None, :].to(vectors.dtype), sine[:, None, :].to(vectors.dtype)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return causal attention; all shapes are (batch * heads, length, head_width).

    Written out because the backward pass of torch's fused kernel is three times slower on a CPU
    for documents as short as ours.
    """
    length, width = query.shape[1:]
    future = torch.full((length, length), -1e4, dtype=query.dtype).triu(1)
    scores = torch.baddbmm(future, query * width**-0.5, key.transpose(1, 2))
    return torch.softmax(scores, dim=-1) @ value
