"""A suite in a place and on ports of its own, stopped and removed at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from libs.postgres import cluster
from tools.local.place import METRICS_OFFSET, PORTS_SPAN, ROOT, Ports, State

START_S = 150.0
STOP_S = 150.0
# Below the range from which systems take the numbers of outgoing connections.
_BASES = range(20_000, 31_000, PORTS_SPAN)
_BASE_ATTEMPTS = 100


class SuiteFailure(Exception):
    """The suite did not start; the text has its words."""


@contextlib.contextmanager
def temporary_suite(
    flags: Sequence[str],
    *,
    start_timeout_s: float = START_S,
    environment: Mapping[str, str] | None = None,
    ports: Ports | None = None,
) -> Iterator[State]:
    """Runs a suite until the block is left.

    Args:
        flags: of `make run`.
        start_timeout_s: longest time until it is ready.
        environment: more variables for its processes.
        ports: of its own; without them they are chosen.

    Raises:
        SuiteFailure: it did not start.
    """
    root = Path(tempfile.mkdtemp(prefix="maas-suite-"))
    state = State(root)
    try:
        arguments = ["--state", str(root), *flags, "--detach"]
        base = (ports or free_ports()).base
        variables = {**(environment or {}), "MAAS_PORT_BASE": str(base)}
        done = _tool("tools.up", arguments, start_timeout_s, variables)
        if done.returncode != 0:
            raise SuiteFailure(f"{done.stdout}{done.stderr}")
        yield state
    except subprocess.TimeoutExpired:
        raise SuiteFailure(f"the suite was not ready within {start_timeout_s:g} s") from None
    finally:
        _tool("tools.down", ["--state", str(root)], STOP_S, {})
        if (root / "postgres").exists():
            cluster.place(root).destroy()
        shutil.rmtree(root)


def _tool(
    module: str, arguments: Sequence[str], timeout_s: float, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},  # noqa: TID251 - for a child
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )


def free_ports() -> Ports:
    """Ports that are free just now.

    Raises:
        SuiteFailure: none was found.
    """
    for _ in range(_BASE_ATTEMPTS):
        base = secrets.choice(_BASES)
        if all(
            _is_free(base + n) and _is_free(base + n + METRICS_OFFSET) for n in range(PORTS_SPAN)
        ):
            return Ports(base)
    raise SuiteFailure("no free ports between 20000 and 31000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
