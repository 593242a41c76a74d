"""LoRA adapters: loaded when a request names one, the one unused for longest dropped."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from .language import Floats, LanguageModel, read_json
from .records import LoRABase

_LORAS_DEFAULT = 4


class RefusedAdapter(ValueError):
    """An adapter cannot be used."""


class Adapters:
    """The adapters of one engine. Belongs to its thread.

    Attributes:
        loads: how many were read from disk; of an adapter that was dropped, once more.
    """

    def __init__(self, model: LanguageModel, *, rank_max: int, loras_max: int | None) -> None:
        self._model = model
        self._rank_max = rank_max
        self._loras_max = loras_max or _LORAS_DEFAULT
        self._loaded: OrderedDict[int, Floats] = OrderedDict()
        self.loads = 0

    def get(self, request: LoRABase) -> Floats:
        """Loads an adapter, unless it is loaded.

        Raises:
            RefusedAdapter: it cannot be used.
        """
        found = self._loaded.pop(request.lora_int_id, None)
        if found is None:
            try:
                found = self._load(Path(request.lora_path))
            except ValueError as error:
                raise RefusedAdapter(str(error)) from error
        self._loaded[request.lora_int_id] = found
        if len(self._loaded) > self._loras_max:
            self._loaded.popitem(last=False)
        return found

    def _load(self, folder: Path) -> Floats:
        rank = read_json(folder / "adapter_config.json").get("r")
        if not isinstance(rank, int) or rank > self._rank_max:
            raise ValueError(f"the rank of an adapter is above {self._rank_max}")
        self.loads += 1
        return self._model.adapter(folder)
