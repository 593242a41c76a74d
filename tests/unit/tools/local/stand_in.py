"""A supervisor of stand-in children, as a process of its own: it reaps whatever it adopts.

    python stand_in.py FOLDER NAME...       each NAME is a program below

A child is ready once it has written FOLDER/NAME.PID.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from tools.local import orphan
from tools.local.child import Child, Log, Nursery, Spec, StartFailure

_READY = """
import os, pathlib, signal, subprocess, sys, time
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
def ready():
    (folder / f"{name}.{os.getpid()}").touch()
"""
PROGRAMS = {
    "steady": "ready(); time.sleep(600)",
    "polite": """
def leave(*_):
    (folder / "left").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
ready()
time.sleep(600)
""",
    "stubborn": "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(600)",
    "parent": """
program = [sys.executable, "-c", "import time; time.sleep(600)"]
for apart in (False, True):
    child = subprocess.Popen(program, start_new_session=apart)
    (folder / f"grandchild.{child.pid}").touch()
ready()
time.sleep(600)
""",
    "failing": "print('cannot find the thing', flush=True); sys.exit(3)",
    "misconfigured": "(folder / f'try.{os.getpid()}').touch(); sys.exit(os.EX_CONFIG)",
}


def spec(folder: Path, name: str) -> Spec:
    async def is_ready(pid: int) -> bool:
        return (folder / f"{name}.{pid}").exists()

    return Spec(
        name=name,
        argv=(sys.executable, "-c", _READY + PROGRAMS[name], str(folder), name),
        is_ready=is_ready,
        stop_timeout_s=0.5,
        final_exits=(78,),
    )


async def run(folder: Path, names: list[str]) -> int:
    orphan.adopt_descendants()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    nursery = Nursery(orphan.Record(folder / "processes.json"))
    children = [
        Child(spec(folder, name), nursery, Log(folder / f"{name}.log"), print) for name in names
    ]
    async with asyncio.TaskGroup() as tasks:
        for child in children:
            tasks.create_task(child.keep())
        try:
            for child in children:
                await child.first_ready()
            (folder / "all-ready").touch()
            await stop.wait()
        except StartFailure as error:
            sys.stdout.write(f"{error}\n")
            return 1
        finally:
            for child in children:
                await child.stop()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(run(Path(sys.argv[1]), sys.argv[2:])))
