"""The columns of a llama_batch: rows of (token, position, sequence), one sequence each."""

from __future__ import annotations

import numpy as np

from services.worker.engine.llamacpp_api import Batch


class Columns:
    """Columns that are written in place, and the structure that names their addresses.

    Args:
        rows: most of them.

    Attributes:
        tokens: int32, shape (rows,): token ids.
        positions: int32, shape (rows,): place in the sequence.
        slots: int32, shape (rows,): sequence.
        wanted: int8, shape (rows,): not 0 where an output is wanted.
        batch: the structure; whoever uses it sets n_tokens.
    """

    def __init__(self, rows: int) -> None:
        self.tokens = np.zeros(rows, np.int32)
        self.positions = np.zeros(rows, np.int32)
        self.slots = np.zeros(rows, np.int32)
        self.wanted = np.zeros(rows, np.int8)
        # Every row is in one sequence, whose id is the row's entry in slots.
        self._sequence_counts = np.ones(rows, np.int32)
        self._sequence_addresses = self.slots.ctypes.data + self.slots.itemsize * np.arange(
            rows, dtype=np.uintp
        )
        self.batch = Batch(
            n_tokens=0,
            token=self.tokens.ctypes.data,
            embd=None,
            pos=self.positions.ctypes.data,
            n_seq_id=self._sequence_counts.ctypes.data,
            seq_id=self._sequence_addresses.ctypes.data,
            logits=self.wanted.ctypes.data,
        )
