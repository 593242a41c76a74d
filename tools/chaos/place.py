"""A suite that is thrown away afterwards: started and stopped, its processes found and armed.

Starts and stops it before and after any gRPC of this process; in between processes are signalled
only, and the supervisor, which has no gRPC in it, starts again what dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from libs.failpoints import Rule
from libs.postgres import cluster
from tools.ask import read_variables
from tools.local import credential, orphan
from tools.local.place import METRICS_OFFSET, ROOT, Ports, State
from tools.local.probe import is_serving

WORKERS = 2
CAPACITY = 32
STEP = "10ms"
START_S = 150.0
SLICE_IDLE = "500ms"
REPLAY_WINDOW = "10s"
_SETTINGS = (
    # Money is at rest soon, and slices are acquired and closed all the time.
    f"gateway.slice_idle={SLICE_IDLE}",
    f"gateway.replay_window={REPLAY_WINDOW}",
)
_SPAN = 16
# Below the range from which systems take the numbers of outgoing connections.
_BASES = range(20_000, 31_000, _SPAN)
_BASE_ATTEMPTS = 100


class SuiteFailure(Exception):
    """The suite did not start; the text has its words."""


class Place:
    """A running suite."""

    def __init__(self, state: State, ports: Ports) -> None:
        self.state = state
        self._ports = ports
        self._database = cluster.place(state.root)
        self.variables = read_variables(state)

    @property
    def marks(self) -> Path:
        """Folder in which fail-points note that they have acted."""
        return self.state.root / "marks"

    def pid(self, name: str) -> int | None:
        """Process id of a component, as started last; None while it is being started."""
        try:
            record = json.loads(self.state.processes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        pid, start = record["started"][name]
        found = orphan.find(int(pid))
        is_it = found is not None and found.start == start and found.state != "Z"
        return int(pid) if is_it else None

    def names(self) -> list[str]:
        """All components."""
        record = json.loads(self.state.processes.read_text(encoding="utf-8"))
        return [name for name in record["started"] if name != "seed"]

    def backends(self) -> list[int]:
        """Processes of PostgreSQL beside the first."""
        parent = self.pid("postgres")
        if parent is None:
            return []
        return sorted(item.pid for item in orphan.all_processes() if item.parent == parent)

    async def is_well(self, name: str) -> bool:
        """Whether a component does its work."""
        pid = self.pid(name)
        if pid is None:
            return False
        if name == "postgres":
            return self._database.is_ready(pid)
        return await is_serving(self._ports.of_process(name))

    def arm(self, name: str, rules: Sequence[Rule]) -> None:
        """Has the next lives of a process die at fail-points, each once over all of them."""
        self.marks.mkdir(mode=0o700, exist_ok=True)
        file = self.state.config / f"{name}.toml"
        points = json.dumps([str(rule) for rule in rules])
        marks = json.dumps(str(self.marks))
        section = f"\n[failpoints]\nallow = true\npoints = {points}\nmarks = {marks}\n"
        credential.write(file, file.read_text(encoding="utf-8") + section)

    def keep_logs(self) -> Path:
        """Copies the logs to a folder that stays; returns it."""
        folder = Path(tempfile.mkdtemp(prefix="maas-chaos-logs-"))
        shutil.copytree(self.state.logs, folder, dirs_exist_ok=True)
        return folder

    def acted(self) -> set[str]:
        """Rules that have acted, as texts."""
        return set(os.listdir(self.marks)) if self.marks.is_dir() else set()  # noqa: PTH208 - names


@contextlib.contextmanager
def own_suite() -> Iterator[Place]:
    """Starts a suite in a place and on ports of its own; stopped and removed at the end.

    Raises:
        SuiteFailure: it did not start.
    """
    root = Path(tempfile.mkdtemp(prefix="maas-chaos-"))
    ports = Ports(_free_port_base())
    state = State(root)
    try:
        _start(state, ports)
        yield Place(state, ports)
    finally:
        _tool("tools.down", ports, "--state", str(root))
        if (root / "postgres").exists():
            cluster.place(root).destroy()
        shutil.rmtree(root)


def _start(state: State, ports: Ports) -> None:
    flags = ["--engine", "sim", "--workers", str(WORKERS), "--capacity", str(CAPACITY)]
    flags += ["--step", STEP]
    for setting in _SETTINGS:
        flags += ["--set", setting]
    done = _tool("tools.up", ports, "--state", str(state.root), *flags, "--detach")
    if done.returncode != 0:
        raise SuiteFailure(f"{done.stdout}{done.stderr}")


def _tool(module: str, ports: Ports, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "MAAS_PORT_BASE": str(ports.base)},  # noqa: TID251 - for a child
        capture_output=True,
        text=True,
        check=False,
        timeout=START_S,
    )


def _free_port_base() -> int:
    """A base from which on all ports are free just now.

    Raises:
        SuiteFailure: none was found.
    """
    for _ in range(_BASE_ATTEMPTS):
        base = secrets.choice(_BASES)
        if all(_is_free(base + n) and _is_free(base + n + METRICS_OFFSET) for n in range(_SPAN)):
            return base
    raise SuiteFailure("no free ports between 20000 and 31000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
