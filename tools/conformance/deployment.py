"""What is tested: addresses, keys, and what may be done to its workers."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from tools.conformance.verdict import CannotShow

COMMAND_S = 60.0
"""Longest time that a command of the operator may take."""

WorkerAction = Callable[[str], Awaitable[None]]
"""Does something to a worker, given its name: "workers/w1"."""
Action = Callable[[], Awaitable[None]]
Statement = Callable[[str], Awaitable[None]]
"""Runs SQL as the superuser, in one transaction, with triggers off: what nobody should do."""
Figure = Callable[[], Awaitable[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """A LoRA adapter that workers can read.

    Attributes:
        adapter_id: last part of its name.
        path: relative to the workers' directory of adapters; empty when it was created already.
        digest: "sha256:<hex>" of the file.
    """

    adapter_id: str
    path: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A running suite as seen from outside.

    Attributes:
        endpoint: host:port of the gateway.
        api_key: of a tenant with credit.
        model: offering to call.
        admin_key: of an administrator; None when there is none.
        auth: host:port, for making and revoking keys; None when it is not reached.
        billing: host:port, for balances and usage records; None when it is not reached.
        scheduler: host:port, for the workers and their load; None when it is not reached.
        certificates: PEM of the certificates to trust; None for plaintext.
        stall_limit_s: after which a client that does not read is cut off.
        replay_window_s: for which frames are kept after the end.
        refused_within_s: longest time of a refusal of what burns time.
        kill: kills a worker process at once; None when that is not allowed.
        drain: asks a worker process to stop, as SIGTERM does; None when that is not allowed.
        catalog: host:port, for LoRA adapters; None when it is not reached.
        adapter: a LoRA adapter of the model that exists, or can be created; None for none.
        more_endpoints: host:port of further gateways of the same deployment.
        kill_gateway: kills the gateway's process at once; None when that is not allowed.
        tamper: alters the ledger's tables; only on a suite that is thrown away.
        busy_s: seconds that all engines have worked so far; None where workers are not reached.
        disabled: starts another deployment in which an operator has switched capabilities off,
            given their flags; None where that cannot be done.
        without_database: takes PostgreSQL away until it is left; None where that is not allowed.
    """

    endpoint: str
    api_key: str
    model: str
    admin_key: str | None = None
    auth: str | None = None
    billing: str | None = None
    scheduler: str | None = None
    certificates: bytes | None = None
    stall_limit_s: float = 30.0
    replay_window_s: float = 60.0
    refused_within_s: float = 0.05
    kill: WorkerAction | None = None
    drain: WorkerAction | None = None
    catalog: str | None = None
    adapter: AdapterFile | None = None
    more_endpoints: Sequence[str] = ()
    kill_gateway: Action | None = None
    tamper: Statement | None = None
    busy_s: Figure | None = None
    disabled: Callable[[Sequence[str]], AbstractAsyncContextManager[Deployment]] | None = None
    without_database: Callable[[], AbstractAsyncContextManager[None]] | None = None


def shell_action(command: str) -> WorkerAction:
    """An action that runs a command of the operator; {worker} in it is the worker's id."""

    async def act(worker: str) -> None:
        await _run(command.replace("{worker}", shlex.quote(worker.rpartition("/")[2])))

    return act


def command_of(command: str) -> Action:
    """An action that runs a command of the operator as it is."""
    return lambda: _run(command)


async def _run(text: str) -> None:
    process = await asyncio.create_subprocess_shell(text)
    try:
        async with asyncio.timeout(COMMAND_S):
            code = await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise CannotShow(f"an operator's command took longer than {COMMAND_S:g} s") from None
    if code != 0:
        raise CannotShow(f"an operator's command ended with exit code {code}")
