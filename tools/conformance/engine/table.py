"""The engines of the contract. A new one is a new row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from tools.conformance.engine.rows import Row, llamacpp, sim
from tools.conformance.engine.trtllm import trtllm

ROWS: Final[Mapping[str, Callable[[Path], Row]]] = MappingProxyType(
    {"sim": sim, "llamacpp": llamacpp, "trtllm": trtllm}
)
"""Makes a row, given an empty folder for the files of its model. Raises CannotShow if it cannot."""
