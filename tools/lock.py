"""Resolves pyproject.toml into the lock files, with uv in a throw-away environment.

The runtime lock and that of workers with TensorRT-LLM are constrained by the development lock, so
that all name the same versions. Those of benchmarks and of what checks deployments hold their own
groups alone and are installed beside the development lock. Index lines are left out: where packages
come from is everybody's own configuration.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tools.local.place import ROOT

FLAGS = (
    "--universal",
    "--python-version=3.11",
    "--generate-hashes",
    "--no-emit-index-url",
    "--no-annotate",
    "--no-header",
    "--quiet",
)


def main() -> int:
    """Writes all locks; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "uv"], check=True)
        compiling = [str(python), "-m", "uv", "pip", "compile", *FLAGS]
        for flags in (
            ("pyproject.toml", "--extra=dev", "--output-file=requirements-dev.lock"),
            (
                "pyproject.toml",
                "--constraints=requirements-dev.lock",
                "--output-file=requirements.lock",
            ),
            (
                "pyproject.toml",
                "--extra=trtllm",
                "--constraints=requirements-dev.lock",
                "--output-file=requirements-trtllm.lock",
            ),
            ("--group=bench", "--output-file=requirements-bench.lock"),
            (
                "--group=deploy",
                "--constraints=requirements-dev.lock",
                "--output-file=requirements-deploy.lock",
            ),
        ):
            print(" ".join(flags), flush=True)
            subprocess.run([*compiling, *flags], cwd=ROOT, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
