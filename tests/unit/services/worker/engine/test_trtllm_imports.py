"""What the child of the trtllm engine imports: its Python has little of what ours has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[5]
# What TensorRT-LLM's Python has anyway; all else has to come with the modules of the engine.
ALLOWED = {"numpy", "typing_extensions", "services"}


def test_the_child_needs_nothing_that_tensorrt_llm_does_not_bring() -> None:
    source = (
        "import sys; before = set(sys.modules); import services.worker.engine.trtllm_child; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    # Without what a checkout's environment adds at its start.
    found = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True
    )

    names = set(found.stdout.split())
    assert {"numpy", "services"} <= names
    foreign = names - ALLOWED - sys.stdlib_module_names
    assert not {name for name in foreign if not name.startswith(("_", "cython"))}
