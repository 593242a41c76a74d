"""What the llamacpp engine's batch in flight asks of whatever computes: llamacpp_model does."""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from services.worker.engine.llamacpp_slots import Slot

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

SCORED_ROWS_MAX: Final = 64
"""Most prompt positions in one step whose logits are wanted: each takes a row of the vocabulary."""


class DecodeFailedError(Exception):
    """The decoder could not compute a step. Its message holds nothing of a prompt or an output."""


class Decoder(Protocol):
    """What computes: rows of (token, position, slot) into logits, with a KV cache behind it.

    The caller writes the first n entries of the columns and calls decode(n).

    Attributes:
        tokens: int32, shape (rows,): token ids.
        positions: int32, shape (rows,): place in the sequence.
        slots: int32, shape (rows,): sequence, ascending.
        wanted: int8, shape (rows,): not 0 where logits are wanted.
        is_end: bool, shape (vocabulary,): tokens that end a generation.
        keeps_prefixes: whether the end of a sequence can be dropped.
    """

    tokens: Ids
    positions: Ids
    slots: Ids
    wanted: npt.NDArray[np.int8]
    is_end: Flags
    keeps_prefixes: bool

    def decode(self, rows: int) -> Floats:
        """Computes; returns logits of the wanted rows, in order, valid until the next call.

        The caller may change them.

        Raises:
            DecodeFailedError: the KV cache may hold part of the rows; forget() before going on.
        """
        ...

    def forget(self, slot: Slot, start: int) -> bool:
        """Drops the tokens of a slot from a position on; False when only all can be dropped."""
        ...

    def copy(self, source: Slot, target: Slot) -> None:
        """Copies all tokens of a slot into another one, which is empty."""
        ...

    def use_adapter(self, handle: int | None) -> None:
        """Has the next calls of decode apply an adapter, or none.

        Raises:
            DecodeFailedError: it cannot be applied.
        """
        ...
