"""One process that has to be there: started, waited for, started again when it dies.

A child runs in a session of its own, so that a Ctrl-C in the terminal reaches the supervisor
alone, and on a leash, so that it does not outlive the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from libs.postgres.cluster import Owner
from tools.local import leash, orphan
from tools.local.place import ROOT

BACKOFF_S = (0.0, 0.25, 0.5, 1.0, 2.0)
"""Waits before starts that follow failures in a row; the last one repeats."""
STEADY_S = 10.0
"""Who has been ready for this long starts again at once when it dies."""
READY_POLL_S = 0.05
READY_TIMEOUT_S = 60.0
LOG_BYTES_MAX = 32 * 1024 * 1024
TAIL_LINES = 15
_TAIL_BYTES = 16 * 1024


class StartFailure(Exception):
    """A child did not become ready. The text has the last lines of its log."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How to run a child.

    Attributes:
        name: for people, and of its log.
        argv: program and arguments.
        is_ready: takes the process id; whether it does its work now.
        env: the whole environment; None for ours.
        owner: account to run as; None for ours.
        stop_signal: asks it to end.
        stop_timeout_s: after which it is killed.
        parent_lost_signal: from the kernel when the supervisor dies.
        ready_timeout_s: after which a child that is not ready is killed.
        starts_max: attempts at the first start before giving up.
        final_exits: exit codes after which another attempt cannot help.
        before_start: what is done before each start; None for nothing.
    """

    name: str
    argv: tuple[str, ...]
    is_ready: Callable[[int], Awaitable[bool]]
    env: Mapping[str, str] | None = None
    owner: Owner | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_s: float = 15.0
    parent_lost_signal: signal.Signals = signal.SIGKILL
    ready_timeout_s: float = READY_TIMEOUT_S
    starts_max: int = 2
    final_exits: tuple[int, ...] = ()
    before_start: Callable[[], None] | None = None


class Log:
    """A child's output: a file that does not grow without bound."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = 0

    def open(self) -> int:
        """Opens it for a new process; the caller closes the descriptor."""
        self.trim()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._start = os.fstat(descriptor).st_size
        return descriptor

    def trim(self) -> None:
        """Moves what is there to FILE.1 once it is large; the writer goes on at the start."""
        if not self.path.exists() or self.path.stat().st_size < LOG_BYTES_MAX:
            return
        previous = self.path.with_name(self.path.name + ".1")
        previous.unlink(missing_ok=True)
        with self.path.open("rb") as source, previous.open("wb") as target:
            previous.chmod(0o600)
            while piece := source.read(1 << 20):
                target.write(piece)
        os.truncate(self.path, 0)
        self._start = 0

    def tail(self) -> str:
        """The last lines of the latest process."""
        with self.path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._start, end - _TAIL_BYTES))
            text = "\n".join(
                _plain(line) for line in file.read().decode("utf-8", "replace").split("\n")
            )
        lines = text.rstrip().split("\n")
        return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:])


def _plain(line: str) -> str:
    """A line of a log for people: a stack trace inside JSON becomes lines again."""
    try:
        event = json.loads(line)
        trace: str = event.pop("exception")
    except (ValueError, KeyError, AttributeError, TypeError):
        return line
    return f"{json.dumps(event)}\n{trace}"


async def _at_once(_pid: int) -> bool:
    return True


class Nursery:
    """What the children of one supervisor share: who they are, and how deaths are cleaned up."""

    def __init__(self, record: orphan.Record) -> None:
        self._record = record
        self._pids: set[int] = set()
        # While it is held, every child of ours is in _pids, so that the rest is orphans.
        self._changing = asyncio.Lock()

    async def spawn(self, spec: Spec, output: int) -> asyncio.subprocess.Process:
        """Starts a process on its leash."""
        account = ("-", "-")
        if spec.owner is not None:
            account = (str(spec.owner.uid), str(spec.owner.gid))
        ties = (str(int(spec.parent_lost_signal)), str(os.getpid()))
        async with self._changing:
            if spec.before_start is not None:
                spec.before_start()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", leash.__file__, *ties, *account, *spec.argv),
                cwd=ROOT,
                env=spec.env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            self._pids.add(process.pid)
        self._record.note(spec.name, process.pid)
        return process

    async def run(self, name: str, argv: Sequence[str], log: Log) -> int:
        """Runs a process to its end; returns its exit code. Cancelling kills it."""
        output = log.open()
        try:
            process = await self.spawn(Spec(name=name, argv=tuple(argv), is_ready=_at_once), output)
        finally:
            os.close(output)
        try:
            return await process.wait()
        finally:
            orphan.kill_group(process.pid)
            await process.wait()
            await self.bury(process.pid)

    async def bury(self, pid: int) -> None:
        """Ends whatever a dead child has left behind: its group, and orphans of other groups."""
        orphan.kill_group(pid)
        async with self._changing:
            self._pids.discard(pid)
            orphan.sweep(self._pids)


class Child:
    """Keeps one process running until it is told to stop."""

    def __init__(self, spec: Spec, nursery: Nursery, log: Log, tell: Callable[[str], None]) -> None:
        self.spec = spec
        self.ready = asyncio.Event()
        """Set while the process does its work."""
        self._nursery = nursery
        self._log = log
        self._tell = tell
        self._stopping = asyncio.Event()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()
        self._pid: int | None = None

    async def keep(self) -> None:
        """Starts the process and starts it again whenever it dies, until `stop`."""
        failures = 0
        try:
            while not self._stopping.is_set():
                was_steady = await self._live(failures)
                failures = 0 if was_steady else failures + 1
                await self._pause(failures)
        finally:
            self._ended.set()

    async def first_ready(self) -> None:
        """Waits until the process does its work for the first time.

        Raises:
            StartFailure: it could not be started.
        """
        ready = asyncio.ensure_future(self._is_ready_set())
        await asyncio.wait([ready, self._failure], return_when=asyncio.FIRST_COMPLETED)
        if self._failure.done():
            ready.cancel()
            self._failure.result()
        else:
            self._failure.cancel()

    async def _is_ready_set(self) -> None:
        await self.ready.wait()

    async def stop(self) -> None:
        """Asks the process to end, kills it when it does not, and waits."""
        self._stopping.set()
        if self._pid is not None:
            orphan.kill(self._pid, self.spec.stop_signal)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.spec.stop_timeout_s):
                    await self._ended.wait()
                return
            self._tell(f"{self.spec.name} does not stop, killing it")
            orphan.kill_group(self._pid)
        await self._ended.wait()

    def kill(self) -> None:
        """Kills the process, now; it will not be started again."""
        self._stopping.set()
        if self._pid is not None:
            orphan.kill_group(self._pid)

    def trim_log(self) -> None:
        """Keeps the log within its bound."""
        self._log.trim()

    async def _live(self, failures: int) -> bool:
        """One process from its start to its end; True when it was well for a while."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        output = self._log.open()
        try:
            process = await self._nursery.spawn(self.spec, output)
        finally:
            os.close(output)
        self._pid = process.pid
        exited = asyncio.ensure_future(process.wait())
        if await self._becomes_ready(process.pid, exited):
            if self._failure.cancelled():
                self._tell(f"{self.spec.name} is back after {loop.time() - started_s:.1f} s")
            self.ready.set()
        ready_s = loop.time()
        code = await exited
        was_ready = self.ready.is_set()
        self.ready.clear()
        self._pid = None
        await self._nursery.bury(process.pid)
        if not self._stopping.is_set():
            self._report_end(code, failures, was_ready=was_ready)
        return was_ready and loop.time() - ready_s > STEADY_S

    async def _becomes_ready(self, pid: int, exited: asyncio.Future[int]) -> bool:
        """Waits for readiness; kills a process that takes too long."""
        for _ in range(int(self.spec.ready_timeout_s / READY_POLL_S)):
            if exited.done() or self._stopping.is_set():
                return False
            if await self.spec.is_ready(pid):
                return True
            await asyncio.wait([exited], timeout=READY_POLL_S)
        orphan.kill_group(pid)
        return False

    def _report_end(self, code: int, failures: int, *, was_ready: bool) -> None:
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if self._failure.done():
            self._tell(f"{self.spec.name} died ({reason}), starting it again")
        elif not was_ready and (
            failures + 1 >= self.spec.starts_max or code in self.spec.final_exits
        ):
            text = f"{self.spec.name} did not start ({reason}). The end of {self._log.path}:"
            self._failure.set_exception(StartFailure(f"{text}\n{self._log.tail()}"))
            # Whoever waits gets it; if somebody else failed first, nobody does.
            self._failure.exception()
            self._stopping.set()

    async def _pause(self, failures: int) -> None:
        """Waits before the next start; ends early when told to stop."""
        # The first start after a steady life follows at once, and so does the first repeat.
        delay_s = BACKOFF_S[min(max(failures - 1, 0), len(BACKOFF_S) - 1)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()
