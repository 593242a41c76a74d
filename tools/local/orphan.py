"""Processes that have lost their parent: found in /proc and ended.

Two kinds. What a child of a living supervisor leaves behind when it is killed (a PostgreSQL
backend, an engine) comes to the supervisor, which has made itself the reaper of its descendants.
What a killed supervisor has left is found by a later one through the record of what it had
started. Does nothing where there is no /proc.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tools.local import credential

_PR_SET_CHILD_SUBREAPER = 36
_PROC = Path("/proc")
_BOOT = _PROC / "sys/kernel/random/boot_id"
_POLL_S = 0.02
ENDED_TIMEOUT_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc.

    Attributes:
        pid: process id.
        state: one letter; Z is dead and waiting for its parent.
        parent: process id.
        session: process id of the leader of its session.
        start: clock ticks since boot; with pid it names a process for ever.
    """

    pid: int
    state: str
    parent: int
    session: int
    start: int


def find(pid: int) -> Process | None:
    """Reads one process; None when it is gone, or there is no /proc."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    # The name, in parentheses, may hold anything.
    fields = text.rpartition(")")[2].split()
    return Process(pid, fields[0], int(fields[1]), int(fields[3]), int(fields[19]))


def all_processes() -> Iterator[Process]:
    """Reads every process."""
    if not _PROC.is_dir():
        return
    for entry in os.listdir(_PROC):  # noqa: PTH208 - hundreds of names, no need of paths
        if entry.isdecimal():
            found = find(int(entry))
            if found is not None:
                yield found


def adopt_descendants() -> None:
    """Makes this process the one that orphaned descendants come to. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signals a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def kill_group(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signals a process group that may be gone."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def sweep(children: Iterable[int]) -> list[int]:
    """Kills and buries every child of this process that is not among `children`.

    Returns their process ids. Only what has been adopted can be unknown, so nothing may be started
    while this runs.
    """
    known = set(children)
    me = os.getpid()
    found = [item.pid for item in all_processes() if item.parent == me and item.pid not in known]
    for pid in found:
        kill(pid)
    for pid in found:
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            continue
    return found


class Record:
    """The file that says what a supervisor has started."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
        self._started: dict[str, tuple[int, int]] = {}

    def note(self, name: str, pid: int) -> None:
        """Adds or replaces a process."""
        found = find(pid)
        self._started[name] = (pid, 0 if found is None else found.start)
        credential.write(self._path, json.dumps({"boot": self._boot, "started": self._started}))

    def end_leftovers(self, stop_signals: Mapping[str, signal.Signals]) -> list[str]:
        """Ends what is left of an earlier supervisor; returns the names.

        Args:
            stop_signals: for names that must not simply be killed; the rest is.
        """
        left = {name: pids for name, pids in self._leftovers().items() if pids}
        for name, pids in left.items():
            for pid in pids:
                kill(pid, stop_signals.get(name, signal.SIGKILL))
        everything = [pid for pids in left.values() for pid in pids]
        if not _wait_gone(everything):
            for pid in everything:
                kill(pid)
            _wait_gone(everything)
        self._path.unlink(missing_ok=True)
        return sorted(left)

    def _leftovers(self) -> dict[str, list[int]]:
        """Living processes by the name under which their session was started."""
        try:
            record = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        started = record["started"] if record["boot"] == self._boot else {}
        sessions = {}
        for name, (pid, start) in started.items():
            leader = find(pid)
            # A number that names a session is not given to another process meanwhile: members
            # without a leader are ours, a leader with another start is not.
            if leader is None or leader.start == start:
                sessions[pid] = name
        left: dict[str, list[int]] = {name: [] for name in started}
        for item in all_processes():
            if item.session in sessions and item.state != "Z":
                left[sessions[item.session]].append(item.pid)
        return left


def _wait_gone(pids: Iterable[int]) -> bool:
    """Waits until none of them lives; False when the time is up."""
    for _ in range(int(ENDED_TIMEOUT_S / _POLL_S)):
        living = [item for pid in pids if (item := find(pid)) is not None and item.state != "Z"]
        if not living:
            return True
        time.sleep(_POLL_S)
    return False
