"""The worker as a process: what it does when a signal comes, or its engine goes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from maas.engine.v1 import engine_service_pb2 as pb
from maas.engine.v1 import engine_service_pb2_grpc

from libs.errors import Reason, Unavailable
from libs.rpc import Peer
from tests.integration.services.worker.harness import (
    MODEL_VERSION,
    PATIENCE_S,
    SERVICE,
    Gateway,
    execution,
)

ROOT = Path(__file__).parents[4]
MODEL = ROOT / "services" / "worker" / "models" / "maas-tiny-story.gguf"
SIM = 'engine = "sim"'
HANGING = "tests.integration.services.worker.hanging_worker"
HASTY = 'canary_every = "500ms"\nsilent_within = "1500ms"\nexit_within = "1s"'
LLAMACPP = f'engine = "llamacpp"\nmodel_path = "{MODEL}"\ncapacity = 2\nthreads = 1'


def write_config(folder: Path, engine: str, grace: str) -> Path:
    (folder / "worker.token").write_text("ms_worker")
    (folder / "gateway.sha256").write_text(hashlib.sha256(b"ms_gateway").hexdigest())
    allowed = "\n".join(
        f'"{SERVICE.full_name}/{method.name}" = ["gateway"]' for method in SERVICE.methods
    )
    path = folder / "worker.toml"
    path.write_text(
        f"""
[server]
listen = "127.0.0.1:0"
metrics_listen = "127.0.0.1:0"
drain_grace = "{grace}"
[identity]
name = "worker"
token_file = "{folder}/worker.token"
[identity.callers]
gateway = "{folder}/gateway.sha256"
[identity.allow]
{allowed}
[peers]
scheduler = "127.0.0.1:1"
[worker]
name = "w1"
endpoint = "127.0.0.1:1"
model_version = "{MODEL_VERSION}"
{engine}
"""
    )
    return path


@asynccontextmanager
async def running(
    folder: Path, engine: str, grace: str = "5s", *, program: str = "services.worker"
) -> AsyncIterator[tuple[Process, str]]:
    """Starts a worker whose scheduler is away; gives the process and its address."""
    config = write_config(folder, engine, grace)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", program, "--config", str(config), stdout=PIPE, stderr=PIPE
    )
    try:
        yield process, await address(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def address(process: Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        while line := await process.stdout.readline():
            event = json.loads(line)
            if event["event"] == "listening":
                return f"127.0.0.1:{event['port']}"
    raise AssertionError((await process.communicate())[1].decode())


async def exit_status(process: Process) -> int:
    async with asyncio.timeout(PATIENCE_S):
        await process.communicate()
    assert process.returncode is not None
    return process.returncode


@asynccontextmanager
async def gateway(endpoint: str) -> AsyncIterator[Gateway]:
    async with Peer(endpoint, "ms_gateway", [SERVICE]) as peer:
        stub = engine_service_pb2_grpc.EngineServiceStub(peer.channel)
        async with peer.both_ways(stub.ExecuteMany) as call:
            opened = Gateway(call)
            await opened.send(grant=1 << 16)
            yield opened


async def read_to_the_end(endpoint: str) -> None:
    async with asyncio.timeout(PATIENCE_S), gateway(endpoint) as stream:
        while True:
            await stream.call.read()


async def read_some(stream: Gateway) -> pb.ExecuteManyResponse:
    """Any message with tokens; the harness's own check of texts knows only the sim's vocabulary."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            response = await stream.call.read()
            assert isinstance(response, pb.ExecuteManyResponse)
            if response.events.lanes or response.events.ended:
                return response


async def test_serves_without_a_scheduler_and_finishes_before_it_ends(tmp_path: Path) -> None:
    async with running(tmp_path, SIM) as (process, endpoint), gateway(endpoint) as stream:
        await until_serving(endpoint)
        await stream.send(execution(1, tokens=60))
        await stream.read()

        process.send_signal(signal.SIGTERM)
        await stream.until_ended(1)

        assert len(stream.told[1].token_ids) == 60
        assert await exit_status(process) == 0


async def until_serving(endpoint: str) -> None:
    async with watching_health(endpoint) as watch, asyncio.timeout(PATIENCE_S):
        while await watch() != health_pb2.HealthCheckResponse.SERVING:
            pass


@asynccontextmanager
async def watching_health(endpoint: str) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Gives what waits for the next thing that health says."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE.full_name))

        async def read() -> int:
            async with asyncio.timeout(PATIENCE_S):
                return int((await watch.read()).status)

        yield read
        watch.cancel()


async def test_what_runs_longer_than_the_grace_is_told_why_it_ended(tmp_path: Path) -> None:
    async with running(tmp_path, SIM, "100ms") as (process, endpoint), gateway(endpoint) as stream:
        await stream.send(execution(1, tokens=8000))
        await stream.read()

        process.send_signal(signal.SIGTERM)
        await stream.until_ended(1)

        assert stream.told[1].reason == "WORKER_DRAINING"
        assert await exit_status(process) == 0


async def test_a_killed_engine_ends_executions_and_process(tmp_path: Path) -> None:
    async with running(tmp_path, LLAMACPP) as (process, endpoint), gateway(endpoint) as stream:
        await stream.send(execution(1, tokens=1000))
        await read_some(stream)

        os.kill(child_of(process.pid), signal.SIGKILL)

        while not (ended := (await read_some(stream)).events.ended):
            pass
        assert ended[0].failure.reason == "WORKER_LOST"
        assert await stream.call.code() is grpc.StatusCode.UNAVAILABLE
        assert await exit_status(process) == 1


async def test_a_stopped_engine_ends_executions_and_process(tmp_path: Path) -> None:
    """Stopped by a signal it is what hangs look like from here: alive, and silent."""
    engine = f"{LLAMACPP}\n{HASTY}"
    async with running(tmp_path, engine) as (process, endpoint), gateway(endpoint) as stream:
        await stream.send(execution(1, tokens=1000))
        await read_some(stream)

        async with watching_health(endpoint) as watch:
            assert await watch() == health_pb2.HealthCheckResponse.SERVING
            os.kill(child_of(process.pid), signal.SIGSTOP)
            assert await watch() == health_pb2.HealthCheckResponse.NOT_SERVING

        while not (ended := (await read_some(stream)).events.ended):
            pass
        assert ended[0].failure.reason == "WORKER_LOST"
        assert await stream.call.code() is grpc.StatusCode.UNAVAILABLE
        assert await exit_status(process) == 1


async def test_an_engine_that_hangs_in_everything_does_not_keep_the_process(
    tmp_path: Path,
) -> None:
    engine = f"{SIM}\n{HASTY}"
    async with running(tmp_path, engine, program=HANGING) as (process, endpoint):
        await until_serving(endpoint)
        with pytest.raises(Unavailable) as caught:
            await read_to_the_end(endpoint)
        assert caught.value.reason is Reason.WORKER_LOST
        async with asyncio.timeout(PATIENCE_S):
            _, errors = await process.communicate()

        assert process.returncode == 1
        assert "Timeout" in errors.decode()


async def test_a_signal_ends_a_worker_that_loads(tmp_path: Path) -> None:
    config = write_config(tmp_path, f"{SIM}\ncapacity = 1\n{HASTY}", "1s")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", HANGING, "--config", str(config), stdout=PIPE, stderr=PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        while json.loads(await process.stdout.readline()).get("stage") != "loading":
            pass
        process.send_signal(signal.SIGTERM)
        said, _ = await process.communicate()

    assert "stopped while loading" in said.decode()
    assert process.returncode == 1, "by force: its engine does not let it go"


def child_of(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('engine = "llamacpp"\nmodel_path = "/nonexistent.gguf"', "/nonexistent.gguf"),
        (f'{LLAMACPP}\ndigest = "sha256:{"ab" * 32}"', "correct worker.digest"),
    ],
    ids=["no file", "another digest"],
)
async def test_an_engine_that_cannot_start_says_what_to_do(
    tmp_path: Path, lines: str, said: str
) -> None:
    config = write_config(tmp_path, lines, "1s")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.worker", "--config", str(config), stdout=PIPE, stderr=PIPE
    )
    async with asyncio.timeout(PATIENCE_S):
        _, errors = await process.communicate()

    assert process.returncode == 1
    assert said in errors.decode()
