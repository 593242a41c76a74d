"""Ways in which a process is away for a while: halted, killed and not started, or killed anew."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import signal
from collections.abc import AsyncIterator, Iterator

from tools.local import guard, orphan
from tools.local.place import State

POSTGRES = "postgres"
POLL_S = 0.02


class Way(enum.StrEnum):
    """How PostgreSQL is away."""

    HALTED = "halted"
    """Connections stay and nothing answers, as when its machine or its disk hangs."""
    GONE = "gone"
    """Killed, and nobody starts it again."""
    DYING = "dying"
    """Killed again and again, as soon as it is there."""


def pids(state: State) -> dict[str, int]:
    """Process ids by name, as started last."""
    record = json.loads(state.processes.read_text(encoding="utf-8"))
    return {name: int(pid) for name, (pid, _) in record["started"].items() if name != "seed"}


def pid_of(state: State, name: str) -> int | None:
    """Process id of a process of the suite; None while it is not there."""
    record = json.loads(state.processes.read_text(encoding="utf-8"))
    pid, start = record["started"][name]
    found = orphan.find(int(pid))
    is_it = found is not None and found.start == start and found.state != "Z"
    return int(pid) if is_it else None


@contextlib.asynccontextmanager
async def database_away(state: State, way: Way) -> AsyncIterator[None]:
    """Takes PostgreSQL away until the block is left; what brings it back is the supervisor."""
    match way:
        case Way.HALTED:
            halted = _halt(state)
            try:
                yield
            finally:
                for pid, start in halted:
                    _continue(pid, start)
        case Way.GONE:
            with supervisor_halted(state):
                _kill(state)
                yield
        case Way.DYING:
            killing = asyncio.create_task(_kill_for_ever(state), name="kill for ever")
            try:
                yield
            finally:
                killing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await killing


@contextlib.contextmanager
def halted(state: State, name: str) -> Iterator[None]:
    """Has a process stand still until the block is left."""
    pid = pid_of(state, name)
    found = None if pid is None else orphan.find(pid)
    assert found is not None
    orphan.kill(found.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        _continue(found.pid, found.start)


@contextlib.contextmanager
def process_away(state: State, name: str) -> Iterator[None]:
    """Kills a process; it is started again when the block is left."""
    with supervisor_halted(state):
        pid = pid_of(state, name)
        if pid is not None:
            orphan.kill(pid)
        yield


@contextlib.contextmanager
def supervisor_halted(state: State) -> Iterator[None]:
    """Has nothing that dies started again until the block is left."""
    supervisor = guard.holder(state.supervisor)
    assert supervisor is not None
    orphan.kill(supervisor, signal.SIGSTOP)
    try:
        yield
    finally:
        orphan.kill(supervisor, signal.SIGCONT)


def family(state: State) -> list[orphan.Process]:
    """PostgreSQL's first process, which starts all others, and then those."""
    first = pid_of(state, POSTGRES)
    found = [] if first is None else [orphan.find(first)]
    return [
        *(item for item in found if item is not None),
        *(item for item in orphan.all_processes() if item.parent == first),
    ]


def _halt(state: State) -> list[tuple[int, int]]:
    halted: dict[tuple[int, int], None] = {}
    # One may have been started before the first process stood still.
    for _ in range(2):
        for item in family(state):
            orphan.kill(item.pid, signal.SIGSTOP)
            halted[item.pid, item.start] = None
    return list(halted)


def _continue(pid: int, start: int) -> None:
    found = orphan.find(pid)
    # The number may be another process's by now.
    if found is not None and found.start == start:
        orphan.kill(pid, signal.SIGCONT)


def _kill(state: State) -> None:
    for item in family(state):
        orphan.kill(item.pid)


async def _kill_for_ever(state: State) -> None:
    while True:
        _kill(state)
        await asyncio.sleep(POLL_S)
