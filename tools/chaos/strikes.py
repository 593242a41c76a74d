"""Strikes: who is killed or halted, and how long it takes until the work is done again."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter, defaultdict

from tools.chaos.audit import Halt
from tools.chaos.place import Place
from tools.chaos.plan import BACKEND, Means, Round, Strike
from tools.local import orphan

POLL_S = 0.05
RECOVERY_S = 60.0
"""Longest time until a process that was struck does its work again."""


class Striker:
    """Strikes a place.

    Attributes:
        kills: SIGKILLs by target; those of fail-points are not among them.
        stops: SIGSTOPs by target.
        halts: times in which a gateway or a worker stood still.
        recoveries_s: seconds from a kill until the work is done again, by target.
        faults: who did not come back.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._watched: set[str] = set()
        self.kills: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self.halts: list[Halt] = []
        self.recoveries_s: dict[str, list[float]] = defaultdict(list)
        self.faults: list[str] = []

    async def strike(self, round_: Round, tasks: asyncio.TaskGroup) -> None:
        """Does a round without its pause; what takes longer goes on in tasks."""
        for strike in round_.strikes:
            await asyncio.sleep(strike.after_s)
            pid = self._pid(strike)
            if pid is None:
                # It is dead from an earlier round.
                continue
            if strike.means is Means.STOP:
                tasks.create_task(self._halt(strike, pid))
            else:
                self._kill(strike, pid, tasks)

    def kill(self, target: str, tasks: asyncio.TaskGroup) -> None:
        """Kills a process out of turn."""
        strike = Strike(target=target, means=Means.KILL, stop_s=0.0, pick=0, after_s=0.0)
        pid = self._pid(strike)
        if pid is not None:
            self._kill(strike, pid, tasks)

    def _pid(self, strike: Strike) -> int | None:
        if strike.target != BACKEND:
            return self._place.pid(strike.target)
        backends = self._place.backends()
        return backends[strike.pick % len(backends)] if backends else None

    def _kill(self, strike: Strike, pid: int, tasks: asyncio.TaskGroup) -> None:
        orphan.kill(pid)
        self.kills[strike.target] += 1
        if strike.target != BACKEND and strike.target not in self._watched:
            self._watched.add(strike.target)
            tasks.create_task(self._time(strike.target, pid))

    async def _time(self, target: str, killed: int) -> None:
        """Measures until another process does the work; deaths meanwhile prolong it."""
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        while self._place.pid(target) == killed or not await self._place.is_well(target):
            if loop.time() - start_s > RECOVERY_S:
                self.faults.append(f"{target} did not come back within {RECOVERY_S:g} s")
                break
            await asyncio.sleep(POLL_S)
        else:
            self.recoveries_s[target].append(loop.time() - start_s)
        self._watched.discard(target)

    async def _halt(self, strike: Strike, pid: int) -> None:
        start = orphan.find(pid)
        if start is None:
            return
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        try:
            orphan.kill(pid, signal.SIGSTOP)
            self.stops[strike.target] += 1
            await asyncio.sleep(strike.stop_s)
        finally:
            now = orphan.find(pid)
            # The number may be another process's by now.
            if now is not None and now.start == start.start:
                orphan.kill(pid, signal.SIGCONT)
            if strike.target.startswith(("gateway", "worker")):
                self.halts.append(Halt(start_s, loop.time()))
