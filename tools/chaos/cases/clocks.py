"""Cases of a wall clock that jumps in one process; its monotonic clock and the database's do not.

Made by libfaketime, which stands between a process and the C library and reads how far the clock is
off from a file, so that it can jump while the process runs. Leases, the windows of limits and the
expiry of grants are on the database's clock; what a gateway writes down of a generation, and which
price it finds in force, is on its own.
"""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

from libs.clock import SystemClock
from libs.units import Rates
from tools.chaos.audit import End
from tools.chaos.cases.ground import Ground
from tools.conformance.verdict import CannotShow, expect, expect_equal
from tools.local import credential
from tools.local.absence import pid_of

PROCESSES = ("gateway", "billing", "auth", "scheduler", "catalog", "worker-1")
HOUR_S = 3600
STREAMS = 4
TOKENS = 100
NEW_TOKENS = 25
EARLIER = Rates(input_price=0, output_price=1_000_000)
EARLIER_CHARGE = NEW_TOKENS
SEEN_S = 2.5
"""How long a process may take to look at the file again: more than a second, in whole ones."""
_LIBRARY = "vendor/libfaketime/src/libfaketime.so.1"
_TRY = "import time; print(time.time())"


def flags(folder: Path) -> list[str]:
    """Flags of `make run` that give each process a clock of its own; none where that cannot be.

    Args:
        folder: for the files that say how far each clock is off.
    """
    library = _library()
    if library is None:
        return []
    found = []
    for name in PROCESSES:
        set_clock(folder, name, 0)
        for variable, value in _variables(library, folder / name).items():
            found += ["--env", f"{name}:{variable}={value}"]
    return found


def set_clock(folder: Path, name: str, offset_s: int) -> None:
    """Has the wall clock of a process jump to so far off the machine's."""
    credential.write(folder / name, f"{offset_s:+d}\n")


def _variables(library: Path, file: Path) -> dict[str, str]:
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_CACHE_DURATION": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }


def _library() -> Path | None:
    """Finds libfaketime; None where it is not installed, or not for this kind of machine."""
    package = importlib.util.find_spec("libfaketime")
    if package is None or package.origin is None:
        return None
    library = Path(package.origin).parent / _LIBRARY
    return library if library.exists() and _works(library) else None


def _works(library: Path) -> bool:
    before_s = SystemClock().now().timestamp()
    with tempfile.TemporaryDirectory(prefix="maas-clock-") as folder:
        set_clock(Path(folder), "tried", HOUR_S)
        done = subprocess.run(
            [sys.executable, "-S", "-c", _TRY],
            env=_variables(library, Path(folder) / "tried"),
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    return done.returncode == 0 and float(done.stdout) - before_s > HOUR_S / 2


async def clock_jumps(ground: Ground, folder: Path, name: str) -> None:
    """The wall clock of a process jumps ahead, back and home under load: nobody notices."""
    if not (folder / name).exists():
        raise CannotShow("needs libfaketime for this kind of machine")
    pid = pid_of(ground.state, name)
    mapped = await asyncio.to_thread(Path(f"/proc/{pid}/maps").read_text)
    expect("libfaketime" in mapped, f"the clock of {name} is not one that can jump")
    # Else no price was in force an hour ago, for a gateway that believes it is then.
    await ground.price(f"case-{name}", EARLIER, SystemClock().now() - 2 * timedelta(seconds=HOUR_S))
    try:
        offsets_s = (HOUR_S, -HOUR_S, 0)
        charges = [await _jump(ground, folder, name, offset_s) for offset_s in offsets_s]
    finally:
        set_clock(folder, name, 0)
    expect_equal(pid_of(ground.state, name), pid, f"process of {name}")
    is_earlier = [charge == EARLIER_CHARGE for charge in charges]
    expect_equal(is_earlier, [False, name == "gateway", False], "earlier price was paid")
    ground.findings.shown.append(
        f"{6 * STREAMS} streams across jumps of an hour ahead and back ended cleanly"
    )


async def _jump(ground: Ground, folder: Path, name: str, offset_s: int) -> int:
    """Streams before, across and after a jump; what the last one was charged, nanos."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(ground.stream(TOKENS)) for _ in range(STREAMS)]
        await asyncio.sleep(0)
        await ground.begun(STREAMS)
        set_clock(folder, name, offset_s)
        await asyncio.sleep(SEEN_S)
        running += [tasks.create_task(ground.stream(NEW_TOKENS)) for _ in range(STREAMS)]
    attempts = [task.result().attempt for task in running]
    for attempt in attempts:
        expect(attempt.end is End.CLEAN, f"{name} at {offset_s:+d} s: {attempt.cause}")
    return attempts[-1].charge_nanos
