"""Cases of a full disk, made by the kernel.

Either one process may write no file beyond where it is now, or all of a suite is on a small disk of
its own, which is filled to the last byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from tools.chaos.audit import End
from tools.chaos.cases.database import require_repeatable
from tools.chaos.cases.ground import STEP_S, Ground
from tools.conformance.verdict import expect, expect_equal
from tools.local.absence import POSTGRES, pid_of, pids
from tools.local.place import State

STREAMS = 8
FULL_S = 2.0
LONG_TOKENS = 400
FILLED_S = 0.2
NO_SPACE = "No space left on device"
BACK_S = 5.0
"""Longest time until requests are served once there is space again."""

Full = Callable[[Ground], AbstractAsyncContextManager[None]]
"""A time in which there is no space."""


@contextlib.contextmanager
def full_disk(state: State) -> Iterator[None]:
    """Has the kernel refuse the gateway whatever makes its journal longer, its log too.

    What is refused is what a full disk refuses; the code is EFBIG, where that has ENOSPC.
    """
    pid = pid_of(state, "gateway")
    assert pid is not None
    most = max(file.stat().st_size for file in state.journal.glob("*.journal"))
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


async def journal_is_full(ground: Ground) -> None:
    """What cannot be counted is not sent; new requests fail typed; space brings all back."""
    await _nothing_is_journaled(ground, _limited)


@asynccontextmanager
async def _limited(ground: Ground) -> AsyncIterator[None]:
    with full_disk(ground.state):
        yield


async def machine_is_full(ground: Ground) -> None:
    """The same with all on one disk: journal, logs and database."""
    await _nothing_is_journaled(ground, _filled)
    ground.findings.shown.append("on a disk without a free byte")


async def _nothing_is_journaled(ground: Ground, full: Full) -> None:
    before = pids(ground.state)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(ground.stream(LONG_TOKENS)) for _ in range(STREAMS)]
        await asyncio.sleep(0)
        await ground.begun(STREAMS)
        async with full(ground):
            cut = [await task for task in running]
            refused = [await ground.stream(5) for _ in range(4)]
            refused += [await ground.stream(5, is_keyed=False) for _ in range(4)]
            await asyncio.sleep(FULL_S)
    for answer in cut:
        expect_equal(answer.attempt.end, End.CUT, "end of a stream whose counts cannot be kept")
    for answer in (*cut, *refused):
        expect(answer.refusal is not None, "a request was served without a journal")
        if answer.refusal is not None:
            require_repeatable(answer.refusal, "a request without a journal")
    ground.findings.shown.append(
        f"{len(cut)} streams were cut and {len(refused)} new ones refused as UNAVAILABLE"
    )
    await ground.served(BACK_S)
    expect_equal(pids(ground.state), before, "processes that nobody started again")


async def database_is_full(ground: Ground) -> None:
    """PostgreSQL has no space, the journal has: streams go on and settle when there is space."""
    is_over = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(ground.stream(LONG_TOKENS)) for _ in range(STREAMS)]
        await asyncio.sleep(0)
        await ground.begun(STREAMS)
        async with _filled(ground):
            asking = [
                tasks.create_task(ground.keep_asking(20, is_over, is_keyed=bool(number % 2)))
                for number in range(STREAMS)
            ]
            await asyncio.sleep(LONG_TOKENS * STEP_S)
        is_over.set()
    for task in running:
        expect(task.result().attempt.end is End.CLEAN, f"a stream: {task.result().attempt.cause}")
    asked = [answer for task in asking for answer in task.result()]
    for answer in asked:
        if answer.refusal is not None:
            require_repeatable(answer.refusal, "a request while the database has no space")
    expect(NO_SPACE in ground.log_of(POSTGRES), "PostgreSQL has not met the end of its disk")
    served = sum(answer.refusal is None for answer in asked)
    ground.findings.shown.append(
        f"{STREAMS} of {STREAMS} streams finished; of {len(asked)} new ones {served} were served,"
        " the others refused as UNAVAILABLE"
    )
    await ground.served(BACK_S)


@asynccontextmanager
async def _filled(_: Ground) -> AsyncIterator[None]:
    """Fills the small disk that temporary files are on, and what becomes free of it meanwhile."""
    ballast = Path(tempfile.gettempdir()) / "ballast"
    filling = asyncio.create_task(_fill(ballast), name="fill")
    try:
        await asyncio.sleep(FILLED_S)
        yield
    finally:
        filling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await filling
        ballast.unlink()


async def _fill(ballast: Path) -> None:
    while True:
        for piece in (bytes(1 << 20), bytes(1 << 12)):
            with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
                while file.write(piece):
                    pass
        await asyncio.sleep(FILLED_S)
