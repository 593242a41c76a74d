"""Stops the suite of a state directory and waits until it is gone: `make stop`."""

from __future__ import annotations

import argparse
import signal
import sys
import time

from tools.local import guard, orphan
from tools.local.options import state_argument
from tools.local.place import State

_POLL_S = 0.05
_WAITS_S = ((signal.SIGTERM, 60.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0))
"""What is sent, and how long each gets; the second SIGTERM means at once."""


def stop(state: State) -> bool:
    """Stops the supervisor; False when it could not be stopped. Repeating changes nothing."""
    for number, wait_s in _WAITS_S:
        pid = guard.holder(state.supervisor)
        if pid is None:
            return True
        if pid:
            orphan.kill(pid, number)
        if _wait_gone(state, wait_s):
            return True
    return False


def _wait_gone(state: State, wait_s: float) -> bool:
    for _ in range(int(wait_s / _POLL_S)):
        if guard.holder(state.supervisor) is None:
            return True
        time.sleep(_POLL_S)
    return False


def main() -> int:
    """Stops the suite; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make stop", description=__doc__)
    state_argument(parser)
    state = State(parser.parse_args().state.resolve())
    if guard.holder(state.supervisor) is None:
        print("not running")
        return 0
    if not stop(state):
        sys.stderr.write("make stop: the supervisor does not end\n")
        return 1
    print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
