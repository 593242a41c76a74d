"""Watches the engine inside its child process, from threads that nothing in it can hold up.

TensorRT-LLM computes in processes of its own. When one of them is killed, older versions wait for
it for ever; when something fatal happens they shut down inside the coroutine that hears of it, and
that may hang. So these threads look whether the engine's processes are there, whether the engine
says that it is shut down or unwell, and whether the event loop still turns; and end the process.

    a process of the engine is gone       within about half a second
    the engine calls itself shut down     within a second
    the event loop stands still           after STUCK_S
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.worker.engine.child_life import say_last_words
from services.worker.engine.child_processes import DEAD_STATES, process_ids

STUCK_S: Final = 5.0
"""A loop that has not turned for so long will not turn again."""

TICK_S: Final = 0.25
BEAT_S: Final = 0.5
_LATE_S: Final = 2.0
_EXPLAIN_WITHIN_S: Final = 0.5
_HEALTH_EVERY_S: Final = 0.5
_PROC: Final = Path("/proc")
_PYTHON: Final = "python"

Die = Callable[[str], None]
"""Ends the process; gets why."""


def die(words: str) -> None:
    """Ends this process at once, from any thread: nothing that could hang is asked to stop."""
    say_last_words(words)
    os._exit(1)


@dataclass(frozen=True, slots=True)
class Process:
    """A process, whatever becomes of its number.

    Attributes:
        process_id: of it.
        started: when, in ticks of the kernel.
        name: of its program.
    """

    process_id: int
    started: int
    name: str


def engine_processes(process_id: int) -> frozenset[Process]:
    """Returns the processes that the engine consists of; none where there is no /proc.

    These are the children of this process, and those of launchers among them (MPI's daemons). What
    a Python process has started is left out: helpers of compilers come and go.
    """
    parents = _all_processes()
    found: set[Process] = set()
    waiting = [process_id]
    while waiting:
        parent = waiting.pop()
        for process, its_parent in parents.items():
            if its_parent == parent and process not in found:
                found.add(process)
                if not process.name.startswith(_PYTHON):
                    waiting.append(process.process_id)
    return frozenset(found)


def find_dead(processes: frozenset[Process]) -> Process | None:
    """Returns one that has ended; None while all live."""
    for process in processes:
        try:
            read = _read_stat(process.process_id)
        except OSError:
            # It cannot be looked at, as where there is no file descriptor left: nothing is known.
            continue
        if read is None or read[0] in DEAD_STATES or read[2] != process.started:
            return process
    return None


def _all_processes() -> Mapping[Process, int]:
    """The parent of each process."""
    found: dict[Process, int] = {}
    for number in process_ids():
        read = None
        with contextlib.suppress(OSError):
            read = _read_stat(number)
        if read is not None and read[0] not in DEAD_STATES:
            _, parent, started, name = read
            found[Process(number, started, name)] = parent
    return found


def _read_stat(process_id: int) -> tuple[str, int, int, str] | None:
    """State, parent, start and name of a process; None when it is gone.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        text = (_PROC / str(process_id) / "stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in parentheses and may hold anything.
    before, _, rest = text.rpartition(")")
    fields = rest.split()
    return fields[0], int(fields[1]), int(fields[19]), before.partition("(")[2]


class Monitor:
    """The threads. They end the process, or with it.

    Args:
        engine: LLM; looked at for what its version has.
        end: ends the process.
    """

    def __init__(self, engine: object, end: Die = die) -> None:
        self._engine = engine
        self._die = end
        self._processes: frozenset[Process] = frozenset()
        self._beaten_s: float | None = None
        self._shut_down_s: float | None = None
        self._stopped = threading.Event()

    def start(self, processes: frozenset[Process]) -> None:
        """Begins to watch.

        Args:
            processes: that the engine consists of.
        """
        self._processes = processes
        threading.Thread(target=self._watch, name="monitor", daemon=True).start()
        if callable(getattr(self._engine, "_check_health", None)):
            threading.Thread(target=self._ask, name="health", daemon=True).start()

    def beat(self) -> None:
        """Says that the event loop turns; from the first time on, at least every BEAT_S."""
        self._beaten_s = time.perf_counter()

    def stop(self) -> None:
        """Blames nobody any more: the engine is about to be ended."""
        self._stopped.set()

    def _watch(self) -> None:
        looked_s = time.perf_counter()
        while not self._stopped.wait(TICK_S):
            now_s = time.perf_counter()
            if now_s - looked_s > _LATE_S:
                # This thread did not run either: the machine was suspended, or all of us were.
                self._forgive()
            looked_s = now_s
            why = self.find_fault(now_s)
            if why and not self._stopped.is_set():
                self._die(why)
                return

    def _forgive(self) -> None:
        if self._beaten_s is not None:
            self.beat()

    def find_fault(self, now_s: float) -> str:
        """Returns why the engine cannot go on; empty while it can.

        Args:
            now_s: of time.perf_counter.
        """
        dead = find_dead(self._processes)
        if dead is not None:
            return f"a process of the engine has ended ({dead.name}, process {dead.process_id})"
        if self._beaten_s is not None and now_s - self._beaten_s > STUCK_S:
            return f"the engine's event loop stood still for {STUCK_S:g} s inside TensorRT-LLM"
        if not self._is_shut_down():
            self._shut_down_s = None
        elif self._shut_down_s is None:
            # Whoever has heard of the fault knows more, and ends the process first.
            self._shut_down_s = now_s
        elif now_s - self._shut_down_s > _EXPLAIN_WITHIN_S:
            return "TensorRT-LLM has shut itself down after a fault"
        return ""

    def _is_shut_down(self) -> bool:
        check: object = getattr(getattr(self._engine, "_executor", None), "is_shutdown", None)
        if not callable(check):
            return False
        # What cannot be asked says nothing.
        with contextlib.suppress(Exception):
            return bool(check())
        return False

    def _ask(self) -> None:
        """Asks the engine itself, on a thread of its own: the question may hang."""
        check: object = getattr(self._engine, "_check_health", None)
        while callable(check) and not self._stopped.wait(_HEALTH_EVERY_S):
            is_well = True
            with contextlib.suppress(Exception):
                is_well = bool(check())
            if not is_well and not self._stopped.is_set():
                self._die("TensorRT-LLM says that it is not healthy")
                return
