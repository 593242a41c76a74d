"""TensorRT-LLM's stand-in inside the process of the tests, in the version that a test asks for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from services.worker.engine.trtllm_surface import QUIET, Surface, detect
from services.worker.engine.wire_facts import Setting
from services.worker.trtllm_config import TrtllmSection

STANDINS = Path(__file__).parents[4] / "standins"
VERSIONS = ("1.2.1", "1.3.0rc14", "1.4.0rc1")


@contextmanager
def package(place: Path, **settings: object) -> Iterator[None]:
    """Lets `import tensorrt_llm` find the one in a directory, and forgets it afterwards."""
    before = _forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        patch.setenv("MAAS_STANDIN_TRTLLM", json.dumps({"banner": False, **settings}))
        for name in QUIET:
            # What is set in between is undone.
            patch.setenv(name, "0")
        try:
            yield
        finally:
            _forget()
            sys.modules.update(before)


@contextmanager
def installed(version: str) -> Iterator[Surface]:
    """Gives the surface of a version."""
    with package(STANDINS, version=version):
        yield detect()


def told(
    *,
    model_path: Path = Path("/models/m"),
    capacity: int = 16,
    context_length: int | None = 4096,
    **section: object,
) -> dict[str, Setting]:
    """What a worker with this configuration tells the child."""
    return {
        "model_path": str(model_path),
        "capacity": capacity,
        "context_length": context_length,
        "expected_digest": None,
        "trtllm": TrtllmSection.model_validate(section).model_dump(mode="json"),
    }


def _forget() -> dict[str, ModuleType]:
    """Takes it out of what has been imported."""
    names = [name for name in sys.modules if name.partition(".")[0] in {"tensorrt_llm", "torch"}]
    return {name: sys.modules.pop(name) for name in names}
