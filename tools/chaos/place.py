"""A suite that is thrown away afterwards: started and stopped, its processes found and armed.

Starts and stops it before and after any gRPC of this process; in between processes are signalled
only, and the supervisor, which has no gRPC in it, starts again what dies.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from libs.failpoints import Rule
from libs.postgres import cluster
from tools.ask import read_variables
from tools.chaos import network, plan
from tools.chaos.audit import TOKENS_PER_S
from tools.chaos.network import Jam
from tools.local import credential, orphan
from tools.local.place import ROOT, Ports, State, address
from tools.local.probe import is_serving
from tools.local.temporary import SuiteFailure, free_ports, temporary_suite

__all__ = ["Network", "Place", "SuiteFailure", "own_suite"]

CAPACITY = 32
_SETTINGS = (
    # Money is at rest soon, and slices are acquired and closed all the time.
    "gateway.slice_idle=500ms",
    "gateway.replay_window=10s",
    # Processes are away, or stand still, for longer than these.
    f"billing.lease_duration={plan.LEASE_S:g}s",
    f"billing.grace={plan.GRACE_S:g}s",
    "billing.sweep_interval=1s",
)
_NETWORK_END_S = 5.0


class Network:
    """The process that all links pass through.

    Attributes:
        entries: host:port by the name of the link.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._input, self._output = process.stdin, process.stdout
        self.entries: Mapping[str, str] = json.loads(self._output.readline())

    def jam(self, jam: Jam) -> None:
        """Has a trouble begin."""
        self._input.write(jam.to_line())
        self._input.flush()

    def lags(self) -> list[tuple[float, float]]:
        """When the process itself stood still, by the clock of all loops."""
        self._input.write(f"{network.LAGS_ASKED.decode()}\n")
        self._input.flush()
        return [(start_s, end_s) for start_s, end_s in json.loads(self._output.readline())]


class Place:
    """A running suite."""

    def __init__(self, state: State, ports: Ports, network: Network | None = None) -> None:
        self.state = state
        self._ports = ports
        self._network = network
        self._database = cluster.place(state.root)
        self.variables = read_variables(state)

    @property
    def marks(self) -> Path:
        """Folder with a folder for each process in which its fail-points note that they acted."""
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

    def entry(self, gateway: str) -> str:
        """host:port at which clients find a gateway."""
        if self._network is None:
            return address(self._ports.of_process(gateway))
        return self._network.entries[f"clients>{gateway}"]

    @property
    def links(self) -> list[str]:
        """Names of the links that can be jammed."""
        return [] if self._network is None else list(self._network.entries)

    def jam(self, jam: Jam) -> None:
        """Has a trouble of the network begin."""
        assert self._network is not None
        self._network.jam(jam)

    def lags(self) -> list[tuple[float, float]]:
        """When the network stood still though nobody had asked for it."""
        return [] if self._network is None else self._network.lags()

    def arm(self, name: str, rules: Sequence[Rule]) -> None:
        """Has the next lives of a process die at fail-points, each once over all of them."""
        folder = self.marks / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self.state.config / f"{name}.toml"
        points = json.dumps([str(rule) for rule in rules])
        marks = json.dumps(str(folder))
        section = f"\n[failpoints]\nallow = true\npoints = {points}\nmarks = {marks}\n"
        credential.write(file, file.read_text(encoding="utf-8") + section)

    def keep_logs(self) -> Path:
        """Copies the logs to a folder that stays; returns it."""
        folder = Path(tempfile.mkdtemp(prefix="maas-chaos-logs-"))
        shutil.copytree(self.state.logs, folder, dirs_exist_ok=True)
        return folder

    def acted(self) -> set[str]:
        """Rules that have acted, as "process: rule"."""
        return {f"{mark.parent.name}: {mark.name}" for mark in self.marks.glob("*/*")}


@contextlib.contextmanager
def own_suite(gateways: int = 1, *, has_network: bool = True) -> Iterator[Place]:
    """Starts a suite in a place and on ports of its own; stopped and removed at the end.

    Args:
        gateways: how many.
        has_network: links lead through a process where they can be jammed.

    Raises:
        SuiteFailure: it did not start.
    """
    ports = free_ports()
    flags = ["--engine", "sim", "--workers", str(len(plan.workers()))]
    flags += ["--gateways", str(gateways), "--capacity", str(CAPACITY)]
    flags += ["--step", f"{1000 / TOKENS_PER_S:g}ms"]
    with contextlib.ExitStack() as stack:
        found = None
        settings = list(_SETTINGS)
        if has_network:
            found = stack.enter_context(_network(plan.links(gateways), ports))
            settings += detours(found.entries)
        for setting in settings:
            flags += ["--set", setting]
        state = stack.enter_context(temporary_suite(flags, ports=ports))
        yield Place(state, ports, found)


@contextlib.contextmanager
def _network(links: Mapping[str, str], ports: Ports) -> Iterator[Network]:
    """Runs the process of the network; it ends when its input does.

    Args:
        links: processes by the name of the link that leads to them.
        ports: of the suite.
    """
    targets = [f"{link}={address(ports.of_process(name))}" for link, name in links.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", network.__name__, *targets],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A Ctrl-C is for the campaign, which then takes everything down in order.
        start_new_session=True,
    )
    with process:
        try:
            yield Network(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_NETWORK_END_S)
            process.kill()


def detours(entries: Mapping[str, str]) -> list[str]:
    """Settings that lead services through the network instead of to each other."""
    found = []
    for link, entry in entries.items():
        source, _, target = link.partition(">")
        if source == "gateways":
            found.append(f"{target}:worker.endpoint={entry}")
        elif source != "clients":
            found.append(f"{source}:peers.{target}={entry}")
    return found
