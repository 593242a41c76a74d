"""CPU time of processes, from /proc (Linux)."""

from __future__ import annotations

import json
import os
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def children_of(pid: int) -> list[int]:
    """Lists the descendants of a process."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found += [int(child), *children_of(int(child))]
    return found


def cpu_s(pid: int) -> float:
    """User and system time of one process, with its threads and without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


class Suite:
    """The processes of a running suite, by name."""

    def __init__(self, state: Path) -> None:
        started = json.loads((state / "processes.json").read_text())["started"]
        # The seed has done its work and is gone.
        self._pids = {name: int(entry[0]) for name, entry in started.items() if name != "seed"}

    def cpu_s(self) -> dict[str, float]:
        """CPU time of each process; an engine's child is listed beside its worker."""
        found: dict[str, float] = {}
        for name, pid in self._pids.items():
            family = children_of(pid)
            if name.startswith("worker"):
                found[name] = cpu_s(pid)
                found[f"{name} engine"] = sum(_safe(child) for child in family)
            else:
                found[name] = cpu_s(pid) + sum(_safe(child) for child in family)
        return found


def _safe(pid: int) -> float:
    try:
        return cpu_s(pid)
    except OSError:
        return 0.0
