"""What loads are run against: the whole suite, and the floors. Each for the length of a `with`."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench import envoy
from tests.bench.processes import Family, children_of, suite_family

ROOT = Path(__file__).resolve().parent.parent.parent
ENVOY = Path(sys.executable).parent / "envoy"
PORT_BASE = 53050
"""Of the suite that is measured; another suite of this machine may use the default ports."""
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
SETTLE_S = 0.5
"""Longer than a gateway waits before it settles, with room for the settlement."""
_POLL_S = 0.05


class BenchError(Exception):
    """Something that is measured did not start, or did not end as it should."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a client talks to.

    Attributes:
        name: for the table.
        endpoint: host:port.
        api_key: credential; any text for a floor.
        model: to call; any text for a floor.
        pids: its processes by name; for a suite see `state`.
        state: state directory of a suite; None for a floor.
    """

    name: str
    endpoint: str
    api_key: str
    model: str
    pids: Family
    state: Path | None = None

    def settle(self) -> None:
        """Waits until what a load caused is done, in a suite: settlements follow in batches."""
        if self.state is not None:
            time.sleep(SETTLE_S)

    def family(self) -> Family:
        """The processes as they are now."""
        if self.state is not None:
            return suite_family(self.state)
        return {name: [*pids, *children_of(pids[0])] for name, pids in self.pids.items()}


def alone() -> socket.socket:
    """Takes the port below the suite's, and keeps it while the socket is open.

    Raises:
        BenchError: another measurement runs on this machine: each would spoil the other.
    """
    guard = socket.socket()
    try:
        guard.bind(("127.0.0.1", PORT_BASE - 1))
    except OSError as error:
        guard.close()
        raise BenchError("another one runs on this machine; wait for its end") from error
    return guard


@contextmanager
def floor(interval_s: float) -> Iterator[Target]:
    """Runs the floor's server."""
    with _server("tests.bench.floor", str(interval_s)) as (port, pid):
        yield Target("floor", f"127.0.0.1:{port}", "none", "none", {"floor": [pid]})


@contextmanager
def two_hops() -> Iterator[Target]:
    """Runs the two bare servers of the suite's shape."""
    with (
        _server("tests.bench.two_hops", "worker") as (worker_port, worker_pid),
        _server("tests.bench.two_hops", "gateway", worker_port) as (port, pid),
    ):
        pids = {"gateway": [pid], "worker-1": [worker_pid]}
        yield Target("two hops", f"127.0.0.1:{port}", "none", "none", pids)


@contextmanager
def _server(module: str, *arguments: str) -> Iterator[tuple[str, int]]:
    """Runs a server that prints its port; gives that and its process id.

    Raises:
        BenchError: it did not start.
    """
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise BenchError(f"{module} did not start")
        try:
            yield port, process.pid
        finally:
            process.stdin.close()
            _end(process)


@contextmanager
def through_envoy(behind: Target) -> Iterator[Target]:
    """Runs Envoy in front of a floor.

    Raises:
        BenchError: it is not installed, or does not listen in time.
    """
    if not ENVOY.exists():
        raise BenchError("Envoy is not installed: run this as `make bench`")
    (port,) = free_ports(1)
    upstream_port = int(behind.endpoint.rpartition(":")[2])
    with tempfile.TemporaryDirectory(prefix="maas-envoy-") as folder:
        path = Path(folder) / "envoy.json"
        path.write_text(envoy.config(port, upstream_port))
        command = [str(ENVOY), "-c", str(path), "--log-level", "error", "--disable-hot-restart"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                _await_listening(port, process)
                pids = {**behind.pids, "envoy": [process.pid]}
                yield Target("Envoy", f"127.0.0.1:{port}", "none", "none", pids)
            finally:
                process.terminate()
                _end(process)


@contextmanager
def suite(flags: Sequence[str]) -> Iterator[Target]:
    """Runs a suite with ports and state of its own.

    Args:
        flags: of `python -m tools.up`.

    Raises:
        BenchError: it does not start; the text is what it said.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="maas-bench-"))
        state = Path(folder)
        stack.callback(_tool, "tools.down", f"--state={state}")
        _tool("tools.up", *flags, f"--state={state}", "--detach")
        found = {}
        for line in (state / "dev.env").read_text().splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            found[name] = shlex.split(value)[0]
        _tool("tests.bench.credit", found["MAAS_BILLING"], found["MAAS_ADMIN_KEY"])
        yield Target(
            "suite",
            found["MAAS_ENDPOINT"],
            found["MAAS_API_KEY"],
            found["MAAS_MODEL"],
            {},
            state,
        )


def _tool(module: str, *arguments: str) -> None:
    environment = {**os.environ, "MAAS_PORT_BASE": str(PORT_BASE)}  # noqa: TID251 - make's interface
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise BenchError(f"{module} ended with {done.returncode}:\n{done.stdout}")


def free_ports(count: int) -> list[int]:
    """Finds ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(item.getsockname()[1]) for item in sockets]
    for item in sockets:
        item.close()
    return ports


def _await_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(int(START_TIMEOUT_S / _POLL_S)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(_POLL_S)
    raise BenchError("Envoy did not start")


def _end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Waits for the end, and makes it if need be."""
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
