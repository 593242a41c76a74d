"""The suite as a list of children: who is started after whom, and when each counts as ready."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from libs.postgres.cluster import Cluster
from tools.local.child import READY_TIMEOUT_S, Spec
from tools.local.options import Options
from tools.local.place import METRICS_OFFSET, STATEFUL
from tools.local.probe import is_serving

POSTGRES = "postgres"
STOP_SIGNALS = {POSTGRES: signal.SIGINT}
"""What ends a process that must not simply be killed: SIGINT is PostgreSQL's fast shutdown."""


def postgres_spec(cluster: Cluster) -> Spec:
    """The database server.

    A server that was killed may leave processes in its shared memory for a moment, and a new one
    refuses to start until they are gone: hence the many attempts.
    """
    command = cluster.command()

    async def is_ready(pid: int) -> bool:
        return cluster.is_ready(pid)

    return Spec(
        name=POSTGRES,
        argv=command.argv,
        env=command.env,
        owner=command.owner,
        is_ready=is_ready,
        stop_signal=STOP_SIGNALS[POSTGRES],
        parent_lost_signal=STOP_SIGNALS[POSTGRES],
        starts_max=10,
        before_start=cluster.clear_empty_locks,
    )


def service_spec(name: str, config: Path, options: Options) -> Spec:
    """A process of ours: "auth", "worker-1"."""
    is_slow = name.startswith("worker") and options.engine == "trtllm"
    more = options.environments.get(name)
    module = f"services.{name.partition('-')[0]}"
    return Spec(
        name=name,
        argv=(sys.executable, "-m", module, "--config", str(config)),
        env={**os.environ, **more} if more else None,  # noqa: TID251 - for a child
        is_ready=_serves(options.ports.of_process(name)),
        ready_timeout_s=options.start_timeout_s if is_slow else READY_TIMEOUT_S,
        final_exits=(os.EX_CONFIG,),
    )


def _serves(port: int) -> Callable[[int], Awaitable[bool]]:
    async def is_ready(_pid: int) -> bool:
        return await is_serving(port)

    return is_ready


def stages(options: Options) -> list[list[str]]:
    """Names of our own processes, those first that others need."""
    return [list(STATEFUL), [*options.worker_names, *options.gateway_names]]


def listeners(options: Options) -> dict[int, str]:
    """Every port of the suite, and whose it is."""
    names = [name for stage in stages(options) for name in stage]
    ports = {options.ports.of_process(name): name for name in names}
    return ports | {port + METRICS_OFFSET: f"metrics of {name}" for port, name in ports.items()}
