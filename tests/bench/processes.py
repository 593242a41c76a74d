"""CPU time of processes and their memory, on Linux.

CPU time is read from each process's own CPU clock: nanoseconds, exact at the moment of reading, and
with the threads that have ended. The ticks of /proc/<pid>/stat are 10 ms, more than a token costs
by a factor of thousands; /proc/<pid>/task/*/schedstat is as fine as the clock and forgets the
threads that have ended.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SAMPLE_S = 0.5
"""How often a running measurement looks for processes that come and go."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_CLOCK_OF_PROCESS = 2  # CPUCLOCK_SCHED of linux/posix-timers.h, with the number of the process

Family = Mapping[str, list[int]]
"""Process ids by the name under which their time is added up."""


def cpu_ns(pid: int) -> int:
    """User and system time of one process, with its threads and without its children.

    Raises:
        OSError: it does not exist any more.
    """
    return time.clock_gettime_ns((~pid << 3) | _CLOCK_OF_PROCESS)


def cpu_s(pid: int) -> float:
    """The same in seconds."""
    return cpu_ns(pid) / 1e9


def resident_bytes(pid: int) -> int:
    """Memory that a process has in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


def children_of(pid: int) -> list[int]:
    """Lists the descendants of a process; none when it is gone."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue
        for child in children:
            found += [int(child), *children_of(int(child))]
    return found


def suite_family(state: Path) -> Family:
    """Every process of a running suite: the supervisor, what it started, and their children.

    PostgreSQL's backends are added to PostgreSQL; an engine's process is beside its worker.
    """
    started = json.loads((state / "processes.json").read_text())["started"]
    found = {"supervisor": [int((state / "supervisor.pid").read_text())]}
    for name, entry in started.items():
        pid = int(entry[0])
        # The seed has done its work and is gone.
        if name == "seed":
            continue
        if name.startswith("worker"):
            found[name] = [pid]
            found[f"{name} engine"] = children_of(pid)
        else:
            found[name] = [pid, *children_of(pid)]
    return found


class Usage:
    """CPU time used between `start` and `stop`, by name.

    A process that ends in between counts up to the last sample before its end, and one that begins
    counts whole.
    """

    def __init__(self, family: Callable[[], Family]) -> None:
        self._family = family
        self._first: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample_on, name="usage", daemon=True)

    def start(self) -> None:
        """Begins."""
        self.sample()
        self._first = dict(self._last)
        self._thread.start()

    def stop(self) -> None:
        """Ends."""
        self._is_over.set()
        self._thread.join()
        self.sample()

    @property
    def seconds(self) -> dict[str, float]:
        """CPU seconds by name."""
        found: dict[str, float] = {}
        for pid, last in self._last.items():
            name = self._names[pid]
            found[name] = found.get(name, 0.0) + (last - self._first.get(pid, 0)) / 1e9
        return found

    def _sample_on(self) -> None:
        while not self._is_over.wait(SAMPLE_S):
            self.sample()

    def sample(self) -> None:
        """Looks now; it happens every `SAMPLE_S` anyway."""
        for name, pids in self._family().items():
            for pid in pids:
                try:
                    self._last[pid] = cpu_ns(pid)
                except OSError:
                    continue
                self._names[pid] = name


@contextmanager
def using(family: Callable[[], Family]) -> Iterator[Usage]:
    """Measures the CPU time of a family for the length of a `with`."""
    usage = Usage(family)
    usage.start()
    try:
        yield usage
    finally:
        usage.stop()
