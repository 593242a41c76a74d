"""The trtllm engine: TensorRT-LLM on NVIDIA GPUs, in a child process (trtllm_child).

The child runs in TensorRT-LLM's own Python, which need not have anything that this suite depends
on: TensorRT-LLM pins numpy, llguidance and more to versions that contradict ours. So trtllm_child
and all that it imports keep to the standard library, numpy (what 1.26 and 2 share), tensorrt_llm
and modules of this package that do the same; no pydantic, structlog, grpc, libs, maas, llguidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from services.worker.engine.child_engine import ChildEngine
from services.worker.engine.child_processes import ChildProgram
from services.worker.engine.wire_facts import Setting


class TrtllmEngine(ChildEngine):
    """An Engine over a Hugging Face model directory, as services.worker.engine.base says.

    Args:
        settings: "model_path", "capacity", "context_length", "expected_digest" and "trtllm", the
            section of the configuration.
        interpreter: Python that has tensorrt_llm; None for the one that runs here.
        start_timeout_s: most time that loading may take.
    """

    def __init__(
        self,
        settings: Mapping[str, Setting],
        *,
        interpreter: Path | None = None,
        start_timeout_s: float,
    ) -> None:
        program = ChildProgram(
            module="services.worker.engine.trtllm_child",
            name="TensorRT-LLM",
            exit_timeout_s=8.0,
            interpreter=interpreter,
            # TensorRT-LLM tells there how it loads, and what it did when it could not.
            shows_output=True,
        )
        super().__init__(program, settings, start_timeout_s=start_timeout_s)
