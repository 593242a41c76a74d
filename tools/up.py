"""Runs the whole suite on this machine: `make run`.

Starts PostgreSQL, the services and a worker, writes the first data, prints what to paste, and then
keeps everything running until Ctrl-C. `--detach` returns when all is ready.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

from tools.local import guard, supervisor
from tools.local.options import OptionError, Options, parse
from tools.local.place import ROOT

_POLL_S = 0.1
_READY = b"ready"


def say(text: str) -> None:
    """Prints a line now."""
    print(text, flush=True)


def left_behind(options: Options) -> list[str]:
    """Names gateways of an earlier start that are not run now, and have something to settle."""
    journals = options.state.root.glob("gateway-*/journal/*.journal")
    return sorted({file.parent.parent.name for file in journals} - {*options.gateway_names})


async def run_here(options: Options) -> int:
    """Supervises the suite in this process; returns the exit code."""
    descriptor = options.ready_descriptor
    if names := left_behind(options):
        number = names[-1].rpartition("-")[2]
        say(f"{', '.join(names)}: killed with something to settle; GATEWAYS={number} would do that")

    def when_ready() -> None:
        if descriptor is not None:
            os.write(descriptor, _READY)
            os.close(descriptor)

    return await supervisor.Supervisor(options, say, when_ready).run()


def run_detached(options: Options, arguments: Sequence[str]) -> int:
    """Starts a supervisor of its own session, shows what it says until it is ready."""
    path = options.state.logs / "supervisor.log"
    flags = [flag for flag in arguments if flag != "--detach"]
    with path.open("wb") as log:
        path.chmod(0o600)
        ready, descriptor = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.up", *flags, f"--ready-descriptor={descriptor}"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[descriptor],
            start_new_session=True,
        )
    os.close(descriptor)
    with path.open("rb") as shown:
        try:
            is_ready = _follow(ready, shown)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)
            process.wait()
            return 128 + signal.SIGINT
        if is_ready:
            return 0
        code = process.wait()
        _show(shown)
        return code or 1


def _follow(ready: int, shown: IO[bytes]) -> bool:
    """Copies the supervisor's words; True when it says that it is ready, False when it ends."""
    while True:
        readable, _, _ = select.select([ready], [], [], _POLL_S)
        _show(shown)
        if readable:
            return os.read(ready, len(_READY)) == _READY


def _show(shown: IO[bytes]) -> None:
    sys.stdout.write(shown.read().decode("utf-8", "replace"))
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """Runs the suite; returns the exit code."""
    try:
        options = parse(arguments)
        options.state.prepare()
        if options.is_detached:
            # The supervisor takes the lock itself; here it only makes for a quick answer.
            guard.acquire(options.state.supervisor).close()
            return run_detached(options, arguments)
        with guard.acquire(options.state.supervisor):
            return asyncio.run(run_here(options))
    except (OptionError, guard.AlreadyRunning, OSError) as error:
        sys.stderr.write(f"make run: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
