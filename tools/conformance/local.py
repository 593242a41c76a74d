"""A suite of the kit's own: two workers, short limits, removed afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from libs.postgres import cluster
from tools.ask import read_variables
from tools.conformance.deployment import AdapterFile, Deployment, WorkerAction
from tools.conformance.engine.trtllm import (
    require_stand_in,
    stand_in_environment,
    write_tiny_model,
)
from tools.conformance.lora import write_adapter
from tools.conformance.verdict import CannotShow
from tools.local.absence import Way, database_away
from tools.local.place import (
    DATABASE,
    METRICS_OFFSET,
    OWN_MODEL,
    Ports,
    State,
)
from tools.local.temporary import SuiteFailure, temporary_suite

STALL_LIMIT_S = 2.0
REPLAY_WINDOW_S = 3.0
WORKERS = 2
CAPACITY = 32
"""Two workers of it hold the 50 streams of U5, and W-2 can fill them."""
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
_STAND_IN_CONTEXT = 16_384
# A draw is a function of seed and place, as nobody promises of TensorRT-LLM itself: so that what
# goes on elsewhere can be compared.
_STAND_IN_SETTINGS = {"step_s": 0.003, "draws": "position", "kv_blocks": 32_768}
_ADAPTER_ID = "conformance"
_ADAPTER_FILE = "conformance.gguf"
_ENGINE_BUSY = "maas_worker_engine_busy_seconds_total"


@contextlib.contextmanager
def own_suite(
    engine: str = "sim", settings: Sequence[str] = (), *, gateways: int = 1
) -> Iterator[Deployment]:
    """Starts a suite in a place and on ports of its own; stopped and removed at the end.

    Args:
        engine: of its workers, as `make run` knows them.
        settings: "section.key=value" beside the kit's own.
        gateways: how many.

    Raises:
        SuiteFailure: it did not start.
    """
    with contextlib.ExitStack() as stack:
        flags = _flags(engine, settings)
        environment: dict[str, str] = {}
        if engine == "trtllm":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="maas-model-"))
            model, environment = _stand_in(Path(folder))
            flags += ["--model", str(model)]
        flags += ["--gateways", str(gateways)]
        state = stack.enter_context(temporary_suite(flags, environment=environment))
        yield _deployment(state, engine)


def _stand_in(folder: Path) -> tuple[Path, dict[str, str]]:
    """A model and the stand-in for TensorRT-LLM that runs it, at a token in some milliseconds.

    Raises:
        SuiteFailure: there is none here.
    """
    model = folder / "tiny-hf"
    try:
        require_stand_in()
        write_tiny_model(model, context=_STAND_IN_CONTEXT)
        return model, stand_in_environment(_STAND_IN_SETTINGS)
    except CannotShow as reason:
        raise SuiteFailure(str(reason)) from None


@contextlib.asynccontextmanager
async def _disabled(engine: str, flags: Sequence[str]) -> AsyncIterator[Deployment]:
    """Another suite, whose operator has switched capabilities off."""
    with contextlib.ExitStack() as stack:
        setting = f"worker.disabled={','.join(flags)}"
        # Starting one takes seconds; other tasks of the kit may go on meanwhile.
        place = await asyncio.to_thread(stack.enter_context, own_suite(engine, [setting]))
        yield place


def _flags(engine: str, settings: Sequence[str]) -> list[str]:
    flags = ["--engine", engine, "--workers", str(WORKERS)]
    chosen = [*_SETTINGS, *settings]
    if engine != "llamacpp":
        flags += ["--capacity", str(CAPACITY)]
    if engine == "sim":
        chosen += _SIM_SETTINGS
    for setting in chosen:
        flags += ["--set", setting]
    return flags


def _deployment(state: State, engine: str) -> Deployment:
    variables = read_variables(state)
    return Deployment(
        endpoint=variables["MAAS_ENDPOINT"],
        more_endpoints=variables["MAAS_ENDPOINTS"].split()[1:],
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
        kill_gateway=lambda: _signal(state, "gateway", signal.SIGKILL),
        tamper=lambda statements: _tamper(state, statements),
        busy_s=lambda: asyncio.to_thread(_busy_s, state),
        disabled=lambda flags: _disabled(engine, flags),
        without_database=lambda: database_away(state, Way.HALTED),
    )


def _adapter(state: State, engine: str) -> AdapterFile | None:
    """Makes a LoRA adapter of the suite's model; the simulated engine reads no file."""
    if engine == "trtllm":
        # `make run` starts it without room for adapters.
        return None
    if engine == "sim":
        digest = f"sha256:{1:064x}"
    else:
        digest = write_adapter(state.adapters / _ADAPTER_FILE, OWN_MODEL)
    return AdapterFile(adapter_id=_ADAPTER_ID, path=_ADAPTER_FILE, digest=digest)


def _signals(state: State, number: signal.Signals) -> WorkerAction:
    """An action that signals a worker's process; the supervisor starts another."""

    async def act(worker: str) -> None:
        await _signal(state, worker.rpartition("/")[2].replace("w", "worker-", 1), number)

    return act


async def _signal(state: State, name: str, number: signal.Signals) -> None:
    os.kill(_process_ids(state)[name], number)


def _process_ids(state: State) -> dict[str, int]:
    """Process ids by name, as started last."""
    record = json.loads(state.processes.read_text(encoding="utf-8"))
    return {name: int(started[0]) for name, started in record["started"].items()}


async def _tamper(state: State, statements: str) -> None:
    """Runs SQL that no trigger sees. A temporary file: psql reads a script."""
    text = f"BEGIN;\nSET LOCAL session_replication_role = replica;\n{statements}\nCOMMIT;\n"
    script = state.root / f"tamper-{secrets.token_hex(4)}.sql"
    script.write_text(text, encoding="utf-8")
    await asyncio.to_thread(cluster.place(state.root).run_script, script, {}, database=DATABASE)


def _busy_s(state: State) -> float:
    """Sums what the workers' metrics say of their engines."""
    names = [name for name in _process_ids(state) if name.startswith("worker-")]
    ports = Ports(int(read_variables(state)["MAAS_ENDPOINT"].rpartition(":")[2]))
    return sum(_busy_of(ports.of_process(name) + METRICS_OFFSET) for name in names)


def _busy_of(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode("ascii", "replace")
    found = re.search(rf"^{_ENGINE_BUSY} (\S+)$", text, re.MULTILINE)
    return 0.0 if found is None else float(found[1])
