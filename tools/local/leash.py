"""Becomes another program that the kernel stops when the process that started it dies.

    python -I -S leash.py SIGNAL PARENT UID GID PROGRAM [ARGUMENT...]

UID and GID are "-" to stay who we are. The leash is tied after the change of account (which would
undo it) and before the program runs, which inherits it. Elsewhere than on Linux there is no such
leash and the program runs without. A file of its own, and free of imports of ours, because it
costs its start-up time at every start of every process.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Ties the leash and runs the program; returns only when the parent is gone already."""
    signal_number, parent, uid, gid, *program = arguments
    library = ctypes.CDLL(None, use_errno=True)
    if uid != "-":
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    if sys.platform == "linux" and library.prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have died before the leash was tied.
    if os.getppid() == int(parent):
        os.execv(program[0], program)  # noqa: S606 - no shell wanted


if __name__ == "__main__":
    main(sys.argv[1:])
