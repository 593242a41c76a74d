"""The naive adapter's process: a worker that ends when it is told to."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from pathlib import Path

_LOOK_S = 0.02


def main(model: Path) -> None:
    """Loads an engine, and waits for SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    llm = importlib.import_module("tensorrt_llm").LLM(model=str(model))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while llm is not None:
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
