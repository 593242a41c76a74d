"""Strikes: what is killed, halted or cut off, and how long it takes until work is done again."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter, defaultdict

from tools.chaos import plan
from tools.chaos.audit import Halt
from tools.chaos.network import LASTING, Jam, Trouble
from tools.chaos.place import Place
from tools.chaos.plan import BACKEND, Means, Round, Strike
from tools.local import orphan

POLL_S = 0.05
_STARTS_A_DEATH = 4
RECOVERY_S = 60.0
"""Longest time from the latest start of a process that was struck until it does its work again."""


class Striker:
    """Strikes a place.

    Attributes:
        kills: SIGKILLs by target; those of fail-points are not among them.
        halted: targets that stand still just now.
        stops: SIGSTOPs by target.
        long_stops: of them, those that outlast a lease and its grace.
        jams: troubles of the network, by both ends of the link and what.
        halts: times in which tokens piled up.
        recoveries_s: seconds from a kill until the work is done again, by target.
        faults: who did not come back.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._watched: set[str] = set()
        self.kills: Counter[str] = Counter()
        self.halted: set[str] = set()
        self.stops: Counter[str] = Counter()
        self.long_stops: Counter[str] = Counter()
        self.jams: Counter[tuple[str, Trouble]] = Counter()
        self.halts: list[Halt] = []
        self.recoveries_s: dict[str, list[float]] = defaultdict(list)
        self.faults: list[str] = []

    async def strike(self, round_: Round, tasks: asyncio.TaskGroup) -> None:
        """Does a round without its pause; what takes longer goes on in tasks."""
        for jam in round_.jams:
            self._jam(jam)
        for strike in round_.strikes:
            await asyncio.sleep(strike.after_s)
            pid = self._pid(strike)
            if pid is None or strike.target in self.halted or self._is_spared(strike):
                # It is dead, stands still, or is starting, from an earlier round.
                continue
            if strike.means is Means.STOP:
                tasks.create_task(self._halt(strike, pid))
            else:
                self._kill(strike, pid, tasks)

    def _is_spared(self, strike: Strike) -> bool:
        """Whether a process is left to start: now and then one dies while it does."""
        return strike.target in self._watched and strike.pick % _STARTS_A_DEATH != 0

    def kill(self, target: str, tasks: asyncio.TaskGroup) -> None:
        """Kills a process out of turn."""
        strike = Strike(target=target, means=Means.KILL, stop_s=0.0, pick=0, after_s=0.0)
        pid = self._pid(strike)
        if pid is not None:
            self._kill(strike, pid, tasks)

    def _jam(self, jam: Jam) -> None:
        self._place.jam(jam)
        source, _, target = jam.link.partition(">")
        self.jams[f"{_kind(source)} - {_kind(target)}", jam.trouble] += 1
        if jam.trouble in LASTING and target.startswith(("gateway", "worker")):
            now_s = asyncio.get_running_loop().time()
            is_away = source == "clients"
            gateway = target if is_away else ""
            self.halts.append(Halt(now_s, now_s + jam.seconds, gateway, is_away))

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
        start_s = latest_s = loop.time()
        latest = killed
        while latest == killed or not await self._place.is_well(target):
            if loop.time() - latest_s > RECOVERY_S:
                self.faults.append(f"{target} did not come back within {RECOVERY_S:g} s")
                break
            await asyncio.sleep(POLL_S)
            pid = self._place.pid(target)
            if pid not in {None, latest}:
                # It has died once more: the time that it has begins anew.
                latest, latest_s = pid, loop.time()
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
            self.halted.add(strike.target)
            self.stops[strike.target] += 1
            self.long_stops[strike.target] += strike.stop_s > plan.LEASE_S + plan.GRACE_S
            await asyncio.sleep(strike.stop_s)
        finally:
            self.halted.discard(strike.target)
            now = orphan.find(pid)
            # The number may be another process's by now.
            if now is not None and now.start == start.start:
                orphan.kill(pid, signal.SIGCONT)
            if strike.target.startswith(("gateway", "worker")):
                gateway = strike.target if strike.target.startswith("gateway") else ""
                self.halts.append(Halt(start_s, loop.time(), gateway))


def _kind(name: str) -> str:
    """What a process is one of: "gateway-2" is one of the gateways."""
    kind = name.partition("-")[0]
    return f"{kind}s" if kind in {"gateway", "worker"} else kind
