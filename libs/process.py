"""The life of a process: flags, strict configuration, signals, exit codes, background tasks.

A main is `process.run(Config, main)`. Nothing happens at import.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import structlog

from libs import config as configuration
from libs import failpoints, observability
from libs.config import ConfigError, ConfigT, ServiceConfig
from libs.loop import EventLoop

EXIT_OK = 0
EXIT_FAILED = 1
GARBAGE_YOUNG_MAX = 10_000
"""Objects made since the last collection before there is another one."""
EXIT_BAD_CONFIG = 78  # EX_CONFIG of sysexits.h

log = structlog.get_logger(__name__)


class StartError(Exception):
    """The process cannot start; the message tells an operator what to do."""


def run(kind: type[ConfigT], main: Callable[[ConfigT], Awaitable[None]]) -> None:
    """Reads flags and configuration, runs `main` on uvloop, and exits.

    Flags: --config PATH, --check-config, --print-config. SIGTERM and SIGINT are left to
    `stop_signal`, which mains wait for through `libs.rpc.Server.serve`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--check-config", action="store_true", help="check the file and exit")
    parser.add_argument("--print-config", action="store_true", help="show the result and exit")
    arguments = parser.parse_args()
    try:
        config = configuration.load(kind, arguments.config)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_BAD_CONFIG)
    if arguments.print_config:
        sys.stdout.write(config.model_dump_json(indent=2) + "\n")
    if arguments.print_config or arguments.check_config:
        sys.exit(EXIT_OK)
    sys.exit(_run(config, main))


def _run(config: ConfigT, main: Callable[[ConfigT], Awaitable[None]]) -> int:
    if isinstance(config, ServiceConfig):
        observability.configure_logs(config.identity.name, config.log.level)
        failpoints.arm(config.failpoints.rules(), config.failpoints.marks)

    async def guarded() -> None:
        await main(config)

    # What lives on is looked through less often: nearly all garbage dies by its reference count.
    gc.set_threshold(GARBAGE_YOUNG_MAX, 20, 20)
    try:
        with asyncio.Runner(loop_factory=EventLoop) as runner:
            runner.run(guarded())
    except (StartError, ConfigError) as error:
        log.error("start failed", cause=str(error))  # noqa: TRY400 - an operator's mistake, no defect
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    except Exception:
        log.exception("process failed")
        return EXIT_FAILED
    return EXIT_OK


async def stop_signal() -> None:
    """Waits for SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()


Cancel = Callable[[], object]
"""Asks a task to end. Nothing happens when it has ended."""


class Background:
    """Tasks that live as long as the process part that owns them.

    An async context manager. A task that ends with an exception calls `on_failure`, so that a dead
    task never goes unnoticed; leaving cancels the rest and waits for them.
    """

    def __init__(self, on_failure: Callable[[BaseException], None] | None = None) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_failure = on_failure

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def start(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> Cancel:
        """Starts a task that is cancelled when the owner ends; returns what ends it before."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task.cancel

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        assert error is not None
        log.error("background task failed", task=task.get_name(), exc_info=error)
        if self._on_failure is not None:
            self._on_failure(error)
