"""One supervisor for a state directory: a lock that its holder cannot forget to give back."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO


class AlreadyRunning(Exception):
    """Somebody holds the lock. The text says who."""


def acquire(path: Path) -> IO[str]:
    """Takes the lock and writes our process id; the lock lives as long as the file is open.

    Raises:
        AlreadyRunning: a supervisor lives.
    """
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise AlreadyRunning(
            f"the suite of {path.parent} is running already (process {holder(path)}): make stop"
        ) from None
    path.chmod(0o600)
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def holder(path: Path) -> int | None:
    """Process id of who holds the lock; None when nobody does."""
    if not path.exists():
        return None
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read().strip()
            return int(text) if text else 0
    return None
