"""Output tokens a second: the whole suite beside the bare LLM API, same work, same engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from services.worker.config import WorkerSection
from tools.ask import read_variables
from tools.conformance.engine.processes import descendants_of
from tools.conformance.verdict import CannotShow
from tools.gpu_check.bare import MARK
from tools.gpu_check.load import READY
from tools.gpu_check.workload import Outcome, Run, Workload, together
from tools.local.options import START_ON_GPU_S
from tools.local.place import ROOT, State
from tools.local.temporary import SuiteFailure, temporary_suite

STREAMS_PER_CLIENT = 32
RUN_S = 900.0
"""Longest time of one run."""
_CONTEXT_SPARE = 64
_LINE_MAX = 1 << 20
_LAST_WORDS = 400

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What both sides run.

    Attributes:
        model: directory of the model.
        section: [worker.trtllm] of a worker's configuration, without adapters.
        python: that has tensorrt_llm.
        environment: variables that the engine needs.
        work: how much is asked for.
    """

    model: Path
    section: Mapping[str, object]
    python: Path
    environment: Mapping[str, str]
    work: Workload

    @property
    def capacity(self) -> int:
        """Places of the engine: one for each stream."""
        return max(self.work.streams)

    @property
    def context_length(self) -> int:
        """Tokens that one request needs, and a little more."""
        return self.work.input_tokens + self.work.output_tokens + _CONTEXT_SPARE


def engine_settings(setup: Setup) -> dict[str, object]:
    """What the adapter would tell its child process."""
    worker = WorkerSection.model_validate(
        {
            "name": "w1",
            "endpoint": "127.0.0.1:1",
            "model_version": "models/check/versions/1",
            "engine": "trtllm",
            "model_path": setup.model,
            "capacity": setup.capacity,
            "context_length": setup.context_length,
            "trtllm": setup.section,
        }
    )
    return {
        "model_path": str(setup.model),
        "capacity": setup.capacity,
        "context_length": setup.context_length,
        "expected_digest": None,
        "trtllm": worker.trtllm.model_dump(mode="json"),
    }


async def bare_runs(setup: Setup) -> list[Run]:
    """Makes all runs on the bare LLM API.

    Raises:
        CannotShow: it failed; with its last words.
    """
    job = {"settings": engine_settings(setup), "work": dataclasses.asdict(setup.work)}
    limit_s = START_ON_GPU_S + RUN_S * len(setup.work.streams)
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            str(setup.python),
            "-m",
            "tools.gpu_check.bare",
            cwd=ROOT,
            env={**os.environ, **setup.environment},  # noqa: TID251 - for a child
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            limit=_LINE_MAX,
        )
        try:
            async with asyncio.timeout(limit_s):
                _tell(process, json.dumps(job))
                line = await _marked(process)
        except TimeoutError:
            raise CannotShow(f"the bare LLM API did not end within {limit_s:.0f} s") from None
        finally:
            await _end(process)
        if line is None:
            raise CannotShow(f"the bare LLM API failed: {_last_words(errors)}")
    return [Run(**found) for found in json.loads(line)]


async def _marked(process: asyncio.subprocess.Process) -> str | None:
    """What stands behind MARK in what a process prints; None when it ends without."""
    assert process.stdout is not None
    async for line in process.stdout:
        text = line.decode("utf-8", "replace")
        if text.startswith(MARK):
            return text.removeprefix(MARK)
    return None


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kills a process and all that its engine has started: the next engine needs the GPU."""
    for process_id in (*descendants_of(process.pid), process.pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process_id, signal.SIGKILL)
    await process.wait()


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - _LINE_MAX))
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return (lines[-1] if lines else "without a word")[:_LAST_WORDS]


async def suite_runs(setup: Setup) -> list[Run]:
    """Makes all runs through a suite of its own.

    Raises:
        CannotShow: it failed; with the reason.
    """
    flags = ["--engine", "trtllm", "--model", str(setup.model), "--capacity", str(setup.capacity)]
    settings: dict[str, Scalar] = {"worker.context_length": setup.context_length}
    settings |= flat("worker.trtllm", setup.section)
    for name, value in settings.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        flags += ["--set", f"{name}={text}"]
    suite = temporary_suite(
        flags, start_timeout_s=START_ON_GPU_S + RUN_S, environment=setup.environment
    )
    try:
        state = await asyncio.to_thread(suite.__enter__)
    except SuiteFailure as failure:
        raise CannotShow(f"the suite did not start: {str(failure)[-_LAST_WORDS:]}") from None
    try:
        return [await _run(setup.work, streams, state) for streams in setup.work.streams]
    finally:
        await asyncio.to_thread(suite.__exit__, None, None, None)


def flat(prefix: str, section: Mapping[str, object]) -> dict[str, Scalar]:
    """Settings by "section.key".

    Raises:
        CannotShow: one is a list, which `--set` has no form for.
    """
    found: dict[str, Scalar] = {}
    for name, value in section.items():
        if isinstance(value, Mapping):
            found |= flat(f"{prefix}.{name}", value)
        elif isinstance(value, str | int | float | bool):
            found[f"{prefix}.{name}"] = value
        elif isinstance(value, Path):
            found[f"{prefix}.{name}"] = str(value)
        elif value is not None:
            raise CannotShow(f"{prefix}.{name} is no single value: leave it out of --config")
    return found


async def _run(work: Workload, streams: int, state: State) -> Run:
    """One run, from as many client processes as it takes not to measure the client."""
    variables = read_variables(state)
    count = -(-streams // STREAMS_PER_CLIENT)
    jobs = [
        {
            "endpoint": variables["MAAS_ENDPOINT"],
            "key": variables["MAAS_API_KEY"],
            "model": variables["MAAS_MODEL"],
            "work": dataclasses.asdict(work),
            "streams": streams,
            "own": list(range(number, streams, count)),
            "limit_s": RUN_S,
        }
        for number in range(count)
    ]
    clients = [await _start_client() for _ in jobs]
    try:
        async with asyncio.timeout(2 * RUN_S):
            return together(streams, await _drive(clients, jobs))
    except TimeoutError:
        raise CannotShow(f"{streams} streams did not end within {2 * RUN_S:.0f} s") from None
    finally:
        for client in clients:
            if client.returncode is None:
                client.kill()
            await client.wait()


async def _start_client() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tools.gpu_check.load",
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        limit=_LINE_MAX,
    )


async def _drive(
    clients: Sequence[asyncio.subprocess.Process], jobs: Sequence[Mapping[str, object]]
) -> list[Outcome]:
    """Lets all clients get ready, then start together."""
    for client, job in zip(clients, jobs, strict=True):
        _tell(client, json.dumps(job))
    for client in clients:
        if await _hear(client) != READY:
            raise CannotShow("a client of the suite failed before its run")
    for client in clients:
        _tell(client, "go")
    return [Outcome(**json.loads(await _hear(client))) for client in clients]


def _tell(client: asyncio.subprocess.Process, line: str) -> None:
    assert client.stdin is not None
    client.stdin.write(f"{line}\n".encode())


async def _hear(client: asyncio.subprocess.Process) -> str:
    """The next line of a client.

    Raises:
        CannotShow: it has ended.
    """
    assert client.stdout is not None
    line = await client.stdout.readline()
    if not line:
        raise CannotShow("a client of the suite ended early")
    return line.decode().strip()


def table(bare: Sequence[Run], suite: Sequence[Run]) -> list[str]:
    """Both sides beside each other."""
    lines = [
        "streams   bare tokens/s  suite tokens/s   ratio   first token bare ms   suite ms  failed"
    ]
    for left, right in zip(bare, suite, strict=True):
        ratio = right.tokens_per_s / left.tokens_per_s if left.tokens_per_s else 0.0
        failed = sum(left.failures.values()) + sum(right.failures.values())
        lines.append(
            f"{left.streams:7d}   {left.tokens_per_s:13.1f}  {right.tokens_per_s:14.1f}"
            f"   {ratio:5.3f}   {left.first_token_s * 1e3:19.1f}   {right.first_token_s * 1e3:8.1f}"
            f"  {failed:6d}"
        )
    return lines
