"""The process that stands for rank 0: nothing but a process that can be killed."""

from __future__ import annotations

import os
import signal
import subprocess

# Ends when its standard input ends: when it is told to, or when who started it has died.
_SLEEPER = ["cat"]
_END_WITHIN_S = 5.0


class RankProcess:
    """One child process.

    Attributes:
        pid: of the process.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(_SLEEPER, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.pid = self._process.pid

    def is_alive(self) -> bool:
        """Whether it runs. A dead one is left unreaped, as nobody reaps it there either."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            return os.waitid(os.P_PID, self.pid, options) is None
        except ChildProcessError:
            return False

    def kill(self) -> None:
        """Kills it, as the OOM killer does."""
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
