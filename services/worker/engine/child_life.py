"""How a child process of an engine begins and ends: with its parent, and with a last word.

Runs in the child.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from typing import Final

from services.worker.engine.child_processes import LAST_WORDS

STDERR: Final = 2
_PR_SET_PDEATHSIG: Final = 1
_WRITE_WITHIN_S: Final = 0.5
_WORDS_MAX: Final = 2000


def ignore_signals() -> None:
    """Leaves the end to the parent.

    The terminal's Ctrl-C and a supervisor's SIGTERM may reach the whole group. The parent drains
    then, which needs this process; it ends by the socket.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def die_with_parent(parent_process_id: int) -> bool:
    """Has the kernel end this process with its parent; returns whether the parent is there.

    Args:
        parent_process_id: of the one that is meant; it may have died already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent_process_id


def say_last_words(words: str) -> None:
    """Writes why this process ends, as one line, from any thread; waits half a second at most.

    Args:
        words: for the log of the worker; never text of a prompt or an output.
    """
    line = LAST_WORDS + " ".join(words.split())[:_WORDS_MAX] + "\n"
    # Behind whatever is on this line already.
    data = b"\n" + line.encode("utf-8", "replace")
    try:
        _, writable, _ = select.select([], [STDERR], [], _WRITE_WITHIN_S)
        if writable:
            os.write(STDERR, data)
    except (OSError, ValueError):
        return
