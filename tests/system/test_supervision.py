"""`make run` and `make stop`: start, recovery from kills, errors, second starts."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from tests.system.suite import Client, Suite, eventually_settled, kill, wait_gone
from tools.local.place import METRICS_OFFSET
from tools.seed import GRANT_NANOS

WHOLE_WITHIN_S = 10.0
SECOND_START_WITHIN_S = 15.0
PROCESSES = ("auth", "catalog", "billing", "scheduler", "gateway", "worker-1", "postgres")


@pytest.mark.parametrize("name", PROCESSES)
async def test_whole_again_after_kill(running_suite: Suite, client: Client, name: str) -> None:
    """kill -9 in the middle of 20 streams: nothing to repair by hand, no money lost."""
    pid = running_suite.pids()[name]
    async with asyncio.TaskGroup() as streams:
        for _ in range(20):
            streams.create_task(stream_or_fail(client))
        await asyncio.sleep(0.3)

        kill(pid)

        await client.whole_within(running_suite, WHOLE_WITHIN_S)
    assert running_suite.pids()[name] != pid
    await eventually_settled(client)


async def stream_or_fail(client: Client) -> bool:
    """One long stream; True when it ended well. How it fails is its own tests' matter."""
    try:
        await client.generate(max_output_tokens=100)
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_whole_again_after_kill_of_a_backend(running_suite: Suite, client: Client) -> None:
    """PostgreSQL restarts itself when one of its processes is killed; services reconnect."""
    postmaster = running_suite.pids()["postgres"]
    backends = [
        pid
        for pid in running_suite.children("postgres")
        if b"maas" in Path(f"/proc/{pid}/cmdline").read_bytes()  # noqa: ASYNC240
    ]

    kill(backends[0])

    await client.whole_within(running_suite, WHOLE_WITHIN_S)
    assert running_suite.pids()["postgres"] == postmaster
    await eventually_settled(client)


def test_second_run_is_refused(running_suite: Suite) -> None:
    got = running_suite.up()

    assert got.returncode != 0
    assert f"running already (process {running_suite.supervisor})" in got.stderr


async def test_killed_supervisor_takes_all_with_it_and_the_next_recovers(
    running_suite: Suite, client: Client
) -> None:
    pids = list(running_suite.pids().values())
    assert running_suite.supervisor is not None

    kill(running_suite.supervisor)
    wait_gone(pids, within_s=5)

    started_s = time.perf_counter()
    running_suite.start()
    assert time.perf_counter() - started_s < SECOND_START_WITHIN_S
    assert Client(running_suite).variables == client.variables
    await client.generate()
    await eventually_settled(client)


async def test_second_start_changes_nothing(suite: Suite) -> None:
    """The first one in the foreground, ended as by Ctrl-C; stop may be repeated."""
    assert start_and_interrupt(suite) == 0
    wait_gone(list(suite.pids().values()), within_s=0.1)
    first = suite.environment()

    suite.start()

    client = Client(suite)
    assert client.variables == first
    balance = await client.balance()
    assert (balance.posted.nanos, balance.held.nanos) == (GRANT_NANOS, 0)
    pids = list(suite.pids().values())
    suite.stop()
    suite.stop()
    wait_gone(pids, within_s=0.1)
    assert suite.supervisor is None


def start_and_interrupt(suite: Suite) -> int:
    """Runs the suite in the foreground until it is ready, then sends SIGINT; the exit code."""
    process = subprocess.Popen(
        suite.command(),
        env={**os.environ, "MAAS_PORT_BASE": str(suite.base)},  # noqa: TID251 - for a child
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Paste" in line:
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize(
    ("offset", "name"), [(3, "billing"), (METRICS_OFFSET, "metrics of gateway")]
)
def test_port_in_use_is_named(suite: Suite, offset: int, name: str) -> None:
    with socket.create_server(("127.0.0.1", suite.base + offset)):
        got = suite.up()

    assert got.returncode != 0
    assert f"port {suite.base + offset} ({name}) is in use" in got.stdout
    assert suite.supervisor is None


def test_child_that_cannot_start_shows_why(suite: Suite, tmp_path: Path) -> None:
    """A file that begins like a model and is none."""
    weights = tmp_path / "broken.gguf"
    weights.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))

    got = suite.up("--engine", "llamacpp", "--model", str(weights))

    assert got.returncode != 0
    assert "worker-1 did not start" in got.stdout
    wait_gone(list(suite.pids().values()), within_s=0.1)


def test_secrets_are_for_their_owner_alone(running_suite: Suite) -> None:
    files = [*running_suite.state.secrets.iterdir(), running_suite.state.environment]

    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o600"}
