"""A suite of the kit's own: two workers, short limits, removed afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from libs.postgres import cluster
from tools.ask import read_variables
from tools.conformance.deployment import AdapterFile, Deployment, WorkerAction
from tools.conformance.lora import write_adapter
from tools.local.place import METRICS_OFFSET, OWN_MODEL, ROOT, State

STALL_LIMIT_S = 2.0
REPLAY_WINDOW_S = 3.0
WORKERS = 2
CAPACITY = 32
"""Two workers of it hold the 50 streams of U5, and W-2 can fill them."""
START_S = 150.0
_SETTINGS = (
    f"gateway.stall_limit={STALL_LIMIT_S:g}s",
    f"gateway.replay_window={REPLAY_WINDOW_S:g}s",
    # Money is at rest sooner: balances are compared often.
    "gateway.slice_idle=500ms",
)
_SIM_SETTINGS = (
    "worker.sim.decode_base=3ms",
    # Otherwise nothing ends by itself, and min_output_tokens and ignore_eos have no effect.
    "worker.sim.mean_output_tokens=150",
    # Slow enough that a worker can be found and killed while it prefills.
    "worker.sim.prefill_tokens_per_s=3000",
)
_ADAPTER_ID = "conformance"
_ADAPTER_FILE = "conformance.gguf"
_SPAN = 16
# Below the range from which systems take the numbers of outgoing connections.
_BASES = range(20_000, 31_000, _SPAN)
_BASE_ATTEMPTS = 100


class SuiteFailure(Exception):
    """The suite did not start; the text has its words."""


@contextlib.contextmanager
def own_suite(engine: str = "sim", settings: Sequence[str] = ()) -> Iterator[Deployment]:
    """Starts a suite in a place and on ports of its own; stopped and removed at the end.

    Args:
        engine: of its workers, as `make run` knows them.
        settings: "section.key=value" beside the kit's own.

    Raises:
        SuiteFailure: it did not start.
    """
    root = Path(tempfile.mkdtemp(prefix="maas-conformance-"))
    state = State(root)
    try:
        _start(state, engine, settings)
        yield _deployment(state, engine)
    finally:
        _tool("tools.down", "--state", str(root))
        if (root / "postgres").exists():
            cluster.place(root).destroy()
        shutil.rmtree(root)


@contextlib.asynccontextmanager
async def _disabled(engine: str, flags: Sequence[str]) -> AsyncIterator[Deployment]:
    """Another suite, whose operator has switched capabilities off."""
    with contextlib.ExitStack() as stack:
        setting = f"worker.disabled={','.join(flags)}"
        # Starting one takes seconds; other tasks of the kit may go on meanwhile.
        place = await asyncio.to_thread(stack.enter_context, own_suite(engine, [setting]))
        yield place


def _start(state: State, engine: str, settings: Sequence[str]) -> None:
    flags = ["--engine", engine, "--workers", str(WORKERS)]
    chosen = [*_SETTINGS, *settings]
    if engine == "sim":
        flags += ["--capacity", str(CAPACITY)]
        chosen += _SIM_SETTINGS
    for setting in chosen:
        flags += ["--set", setting]
    done = _tool("tools.up", "--state", str(state.root), *flags, "--detach")
    if done.returncode != 0:
        raise SuiteFailure(f"{done.stdout}{done.stderr}")


def _tool(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "MAAS_PORT_BASE": str(_free_port_base())},  # noqa: TID251 - for a child
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


def _deployment(state: State, engine: str) -> Deployment:
    variables = read_variables(state)
    return Deployment(
        endpoint=variables["MAAS_ENDPOINT"],
        api_key=variables["MAAS_API_KEY"],
        model=variables["MAAS_MODEL"],
        admin_key=variables["MAAS_ADMIN_KEY"],
        auth=variables["MAAS_AUTH"],
        billing=variables["MAAS_BILLING"],
        scheduler=variables["MAAS_SCHEDULER"],
        stall_limit_s=STALL_LIMIT_S,
        replay_window_s=REPLAY_WINDOW_S,
        kill=_signals(state, signal.SIGKILL),
        drain=_signals(state, signal.SIGTERM),
        catalog=variables["MAAS_CATALOG"],
        adapter=_adapter(state, engine),
        disabled=lambda flags: _disabled(engine, flags),
    )


def _adapter(state: State, engine: str) -> AdapterFile:
    """Makes a LoRA adapter of the suite's model; the simulated engine reads no file."""
    if engine == "sim":
        digest = f"sha256:{1:064x}"
    else:
        digest = write_adapter(state.adapters / _ADAPTER_FILE, OWN_MODEL)
    return AdapterFile(adapter_id=_ADAPTER_ID, path=_ADAPTER_FILE, digest=digest)


def _signals(state: State, number: signal.Signals) -> WorkerAction:
    """An action that signals a worker's process; the supervisor starts another."""

    async def act(worker: str) -> None:
        record = json.loads(state.processes.read_text(encoding="utf-8"))
        name = worker.rpartition("/")[2].replace("w", "worker-", 1)
        os.kill(int(record["started"][name][0]), number)

    return act
