"""The stand-in for tensorrt_llm inside the process of the tests, made anew for each."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.standins.tiny_hf_model import TinyModel, write_model

STANDINS = Path(__file__).parents[2] / "standins"
PATIENCE_S = 5.0
# For how long what hangs for ever hangs here.
HANG_S = 0.01

PROMPT = [72, 101, 108, 108, 111]


@dataclass
class Standin:
    """One version of tensorrt_llm, and a model.

    Attributes:
        module: tensorrt_llm.
        model: that `llm` loads.
        loaded: what has to be shut down.
    """

    module: ModuleType
    model: TinyModel
    loaded: list[Any] = field(default_factory=list)

    def llm(self, **arguments: object) -> Any:
        """Loads the model."""
        found = self.module.LLM(model=str(self.model.folder), **arguments)
        self.loaded.append(found)
        return found

    def params(self, **fields: object) -> Any:
        """Sampling parameters: greedy, and nothing turned into text, unless told otherwise."""
        return self.module.SamplingParams(**{"detokenize": False, "max_tokens": 8, **fields})

    def start(self, llm: Any, prompt: list[int] = PROMPT, **fields: object) -> Any:
        """Starts a request that streams. Names of generate_async go there, others to `params`."""
        names = ("cache_salt", "lora_request", "priority", "streaming")
        call = {name: fields.pop(name) for name in names if name in fields}
        params = self.params(**fields)
        return llm.generate_async(prompt, **{"streaming": True, "sampling_params": params, **call})

    async def run(self, llm: Any, prompt: list[int] = PROMPT, **fields: object) -> Any:
        """Runs a request to its end."""
        return await self.start(llm, prompt, **fields).aresult()

    def name(self, path: str) -> Any:
        """Something by its full name."""
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


Load = Callable[..., Standin]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model directory."""
    return write_model(tmp_path_factory.mktemp("standin") / "model", context=256)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, model: TinyModel) -> Iterator[Load]:
    """Imports the stand-in with settings; takes it away again behind the test."""
    made: list[Standin] = []

    def make(**settings: object) -> Standin:
        given = {"banner": False, "hang_s": HANG_S, **settings}
        monkeypatch.setenv("MAAS_STANDIN_TRTLLM", json.dumps(given))
        monkeypatch.syspath_prepend(str(STANDINS))
        surface = repr([settings.get(name) for name in ("version", "features", "detect")])
        made.append(Standin(import_again(surface), model))
        return made[-1]

    yield make
    for standin in made:
        for llm in standin.loaded:
            llm.shutdown()
    forget()


_IMPORTED: dict[str, dict[str, ModuleType]] = {}


def import_again(surface: str) -> ModuleType:
    """Imports one version, or brings back what was imported of it."""
    forget()
    sys.modules.update(_IMPORTED.get(surface, {}))
    found = importlib.import_module("tensorrt_llm")
    _IMPORTED[surface] = {name: sys.modules[name] for name in list(sys.modules) if is_ours(name)}
    return found


def forget() -> None:
    """Takes the stand-ins out of what has been imported."""
    for name in list(sys.modules):
        if is_ours(name):
            del sys.modules[name]


def is_ours(name: str) -> bool:
    """Whether a module is a part of the stand-ins."""
    return name.partition(".")[0] in {"tensorrt_llm", "torch"}


@pytest.fixture
def plain(load: Load) -> Standin:
    """Version 1.2.1 without faults."""
    return load()
