"""The processes of an engine's child: started together, and ended together.

A child may start more processes, and these may leave its process group: daemons of MPI do. So the
environment of a child holds a mark that nobody else's has, which all that it starts inherit; what
carries it when the child is gone is killed as well. The mark names its worker, too: what a worker
that was killed has left behind, with the memory of a GPU, is killed by the next one.

What the child says last is found on its stderr. Engines write much more there, so it is read all
the time and only the end of it is kept.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MARK: Final = "MAAS_ENGINE_CHILD"
"""Variable that an engine's child and all that it starts have in their environment."""

LAST_WORDS: Final = "last words: "
"""Begins a line on stderr that says why a child ends; it goes before later lines of others."""

_ROOT: Final = Path(__file__).parents[3]
_MARKED: Final = f"{MARK}=".encode()
_MARK_WORDS: Final = 4
DEAD_STATES: Final = "ZX"
"""Of processes that have ended, in /proc."""

_START_FIELD: Final = 19
_STDERR: Final = 2
_PROC: Final = Path("/proc")
_REAP_TICK_S: Final = 0.005
_TAIL_BYTES: Final = 1 << 14
_READ_BYTES: Final = 1 << 16
_READS_MAX: Final = 64
_WORDS_SHOWN: Final = 400
_STOPPED_WITHIN_S: Final = 0.5
_SWEEP_WITHIN_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildProgram:
    """What runs as the child.

    Attributes:
        module: run with `python -m`; its argument is the socket's descriptor.
        name: of its process, for messages.
        exit_timeout_s: how long a child whose socket is closed may take to exit before it and
            all that it started are killed.
        interpreter: Python that runs it; None for the one that runs here. Another one finds this
            checkout and nothing else of what is installed here.
        shows_output: what it prints to stdout goes where our log goes; else nowhere.
    """

    module: str
    name: str
    exit_timeout_s: float = 1.0
    interpreter: Path | None = None
    shows_output: bool = False


class ChildProcess:
    """A child that has been started. All but `reap` belongs to the event loop.

    Args:
        program: what to run.
        theirs: its end of the socket.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, program: ChildProgram, theirs: socket.socket) -> None:
        self._program = program
        self._mark = f"{_own_name()}:{secrets.token_hex(16)}"
        self._tail = b""
        # What they hold, memory of a GPU above all, is needed now.
        kill_orphans()
        # From this thread: on Linux a child may die with the thread that started it.
        self._process = subprocess.Popen(
            [
                str(program.interpreter or sys.executable),
                "-m",
                program.module,
                str(theirs.fileno()),
            ],
            # The same checkout as ours, wherever we were started: `-m` looks there first.
            cwd=_ROOT,
            env={**os.environ, MARK: self._mark},  # noqa: TID251 - handed on, not read
            stdin=subprocess.DEVNULL,
            stdout=_STDERR if program.shows_output else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            # A group of its own, so that what it starts can be ended with it. The terminal's Ctrl-C
            # and a supervisor's SIGTERM are for this process, which drains and needs the child.
            start_new_session=True,
        )
        if self._process.stderr is not None:
            os.set_blocking(self._process.stderr.fileno(), False)

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, as of `subprocess`; None until it has been waited for."""
        return self._process.returncode

    @property
    def stderr_fd(self) -> int | None:
        """Descriptor to wait on for `read_stderr`."""
        stream = self._process.stderr
        return None if stream is None else stream.fileno()

    def read_stderr(self) -> bool:
        """Takes what has been written; returns whether there may come more."""
        stream = self._process.stderr
        if stream is None or stream.closed:
            return False
        try:
            data = os.read(stream.fileno(), _READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        return bool(data)

    def kill(self) -> None:
        """Kills the child and its group, unless it has been waited for."""
        if self._process.returncode is None:
            self._kill_group()

    def reap(self) -> str:
        """Waits for a child whose socket is closed, kills it if need be; says how it ended.

        Blocks, for its exit timeout and about a second at most. Nobody reads stderr meanwhile.
        """
        began_s = time.perf_counter()
        give_up_s = began_s + self._program.exit_timeout_s
        while not self._has_ended() and time.perf_counter() < give_up_s:
            time.sleep(_REAP_TICK_S)
            if time.perf_counter() > began_s + _STOPPED_WITHIN_S and _is_stopped(self.pid):
                # By SIGSTOP: it will not do anything any more.
                break
        # Before it is waited for: until then its number, which is the group's, is nobody else's.
        self._kill_group()
        self._process.wait()
        _kill_marked(self._mark)
        status = self._process.returncode
        how = f"exited with status {status}"
        if status < 0:
            with contextlib.suppress(ValueError):
                how = f"was killed by {signal.Signals(-status).name}"
        words = self._last_words()
        return f"the {self._program.name} process {how}" + (f": {words}" if words else "")

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _has_ended(self) -> bool:
        """Whether it has ended, leaving it to be waited for."""
        flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
        try:
            return os.waitid(os.P_PID, self._process.pid, flags) is not None
        except ChildProcessError:
            return True

    def _last_words(self) -> str:
        """The last line on stderr, or the last one that was meant to be it."""
        for _ in range(_READS_MAX):
            before = self._tail
            if not self.read_stderr() or self._tail == before:
                break
        if self._process.stderr is not None:
            self._process.stderr.close()
        lines = self._tail.decode("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        meant = [line.removeprefix(LAST_WORDS) for line in said if line.startswith(LAST_WORDS)]
        return (meant or said or [""])[-1][:_WORDS_SHOWN]


def _is_stopped(process_id: int) -> bool:
    """Whether a process was halted by a signal; False where there is no /proc."""
    try:
        status = (_PROC / str(process_id) / "stat").read_text("utf-8", "replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "T"


def _kill_marked(mark: str) -> None:
    """Kills what a dead child has left behind, in other groups too; where there is /proc.

    Until nothing is left, since one that is about to be killed may start another one; a second at
    most.
    """
    wanted = f"{MARK}={mark}".encode()
    give_up_s = time.perf_counter() + _SWEEP_WITHIN_S
    while found := [number for number in process_ids() if _carries(number, wanted)]:
        for number in found:
            _kill_one(number, wanted)
        if time.perf_counter() > give_up_s:
            return
        time.sleep(_REAP_TICK_S)


def kill_orphans() -> None:
    """Kills what engines of dead workers have left behind, of our own user.

    Reads all of /proc: some milliseconds, blocking.
    """
    place = _own_name().partition(":")[0]
    for number in process_ids():
        mark = _mark_of(number)
        # Numbers of another namespace are not ours to understand.
        if mark is None or mark.partition(":")[0] != place or not _is_of_our_user(number):
            continue
        if not _has_owner(mark):
            _kill_one(number, f"{MARK}={mark}".encode())


def _is_of_our_user(process_id: int) -> bool:
    """Whether a process is: root sees those of all."""
    try:
        return (_PROC / str(process_id)).stat().st_uid == os.geteuid()
    except OSError:
        return False


def _own_name() -> str:
    """Names this process among all that there were: its namespace, number and start."""
    try:
        place = str((_PROC / "self" / "ns" / "pid").readlink())
    except OSError:
        place = "none"
    digits = "".join(letter for letter in place if letter.isdigit())
    return f"{digits or 0}:{os.getpid()}:{_start_of(os.getpid())}"


def _has_owner(mark: str) -> bool:
    """Whether the worker that a mark names is there; one that cannot be read is."""
    words = mark.split(":")
    if len(words) != _MARK_WORDS or not words[1].isdigit():
        return True
    try:
        return _start_of(int(words[1])) == words[2]
    except OSError:
        return True


def _start_of(process_id: int) -> str:
    """When a process started, in ticks of the kernel; empty when it is gone, or dead.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        status = (_PROC / str(process_id) / "stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = status.rpartition(")")[2].split()
    # One that nobody has waited for does not come back either.
    return "" if fields[0] in DEAD_STATES else fields[_START_FIELD]


def _mark_of(process_id: int) -> str | None:
    """The mark that a process carries; None for none."""
    for entry in _environment_of(process_id):
        if entry.startswith(_MARKED):
            return entry.removeprefix(_MARKED).decode("ascii", "replace")
    return None


def process_ids() -> list[int]:
    """Returns all processes; none where there is no /proc, or that of another namespace.

    Sandboxes may show one: its numbers mean other processes here, and none of them may be killed.
    """
    try:
        if str((_PROC / "self").readlink()) != str(os.getpid()):
            return []
        return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]
    except OSError:
        return []


def _carries(process_id: int, wanted: bytes) -> bool:
    return wanted in _environment_of(process_id)


def _environment_of(process_id: int) -> list[bytes]:
    """A process's environment at its start; empty for somebody else's, or when it is gone."""
    try:
        return (_PROC / str(process_id) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _kill_one(process_id: int, wanted: bytes) -> None:
    """Kills a process, unless its number has become another's since it was looked at."""
    try:
        handle = os.pidfd_open(process_id)
    except OSError:
        return
    try:
        if _carries(process_id, wanted):
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)
