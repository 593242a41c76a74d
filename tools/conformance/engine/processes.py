"""Finds an engine's processes, where the system has /proc."""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc")
_ENDED = ("Z", "X")


def child_of(parent: int, module: str) -> int | None:
    """The child of a process that runs a module of ours; None when there is none to be found.

    Args:
        parent: process id.
        module: as `python -m` takes it.
    """
    for process_id, its_parent in _parents().items():
        if its_parent == parent and module in _words(process_id):
            return process_id
    return None


def descendants_of(process_id: int) -> list[int]:
    """All that a process has started, and what that has started."""
    parents = _parents()
    found = [process_id]
    for ancestor in found:
        found += [number for number, parent in parents.items() if parent == ancestor]
    return found[1:]


def is_alive(process_id: int) -> bool:
    """Whether a process runs, or could: one that nobody has waited for yet has ended, too."""
    state = _state_and_parent(process_id)
    return state is not None and state[0] not in _ENDED


def _parents() -> dict[int, int]:
    """The parent of each process."""
    found = {}
    for folder in _PROC.glob("[0-9]*"):
        state = _state_and_parent(int(folder.name))
        if state is not None:
            found[int(folder.name)] = state[1]
    return found


def _state_and_parent(process_id: int) -> tuple[str, int] | None:
    try:
        status = (_PROC / str(process_id) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold anything; behind it come the state and the parent.
    state, parent = status.rpartition(")")[2].split()[:2]
    return state, int(parent)


def _words(process_id: int) -> list[str]:
    try:
        line = (_PROC / str(process_id) / "cmdline").read_bytes()
    except OSError:
        return []
    return line.decode("utf-8", "replace").split("\0")
