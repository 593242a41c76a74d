"""The simulated embeddings: each token has a fixed direction, a text the sum of its tokens'.

Equal inputs are equal, and the more tokens two texts share, the closer they are. Order counts for
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import EmbeddingFailed
from services.worker.engine.sim_output import splitmix
from services.worker.engine.sim_tokenizer import SimTokenizer

DIMENSIONS = 64

Vectors = npt.NDArray[np.float32]


class SimEmbedding:
    """The directions of one vocabulary."""

    def __init__(self, tokenizer: SimTokenizer) -> None:
        self._size = tokenizer.vocabulary_size

    @cached_property
    def _directions(self) -> npt.NDArray[np.float64]:
        """Row of each token. Made when somebody embeds: 20 ms."""
        numbers = np.arange(1, self._size * DIMENSIONS + 1, dtype=np.uint64)
        shares = splitmix(numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)
        directions: npt.NDArray[np.float64] = shares / (1 << 53) - 0.5
        return directions.reshape(self._size, DIMENSIONS)

    def embed(self, inputs: Sequence[Sequence[int]], context_length: int) -> Vectors:
        """Embeds token ids. 1 us a token.

        Args:
            inputs: token ids.
            context_length: most tokens of one input.

        Returns:
            float32, shape (inputs, DIMENSIONS), each of length 1.

        Raises:
            EmbeddingFailed: an input is empty, too long or has a token that does not exist.
        """
        found: Vectors = np.empty((len(inputs), DIMENSIONS), dtype=np.float32)
        for row, token_ids in enumerate(inputs):
            ids = np.array(token_ids, dtype=np.int64)
            if not 0 < ids.size <= context_length:
                raise EmbeddingFailed(f"an input has {ids.size} tokens, not 1 to {context_length}")
            if ids.min() < 0 or ids.max() >= self._size:
                raise EmbeddingFailed("an input has a token that is not in the vocabulary")
            whole = self._directions[ids].sum(axis=0)
            found[row] = whole / np.linalg.norm(whole)
        return found
