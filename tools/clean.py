"""Removes the state of `make run`, database included, and what tools have cached: `make clean`."""

from __future__ import annotations

import shutil
import sys

from libs.postgres import cluster
from tools.local import guard
from tools.local.place import ROOT, State

CACHES = (".mypy_cache", ".ruff_cache", ".pytest_cache", ".import_linter_cache", ".hypothesis")


def main() -> int:
    """Removes it; returns the exit code."""
    state = State(ROOT / ".maas")
    if guard.holder(state.supervisor) is not None:
        sys.stderr.write("make clean: the suite is running: make stop\n")
        return 1
    if state.root.exists():
        cluster.place(state.root).destroy()
        shutil.rmtree(state.root)
    for name in CACHES:
        shutil.rmtree(ROOT / name, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
