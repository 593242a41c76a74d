"""What the check of the key, the limits and the hold cost a request: `--only admission`.

In this process, with a gateway's own parts, on billing and a PostgreSQL with fsync of this run. The
floor is the same call without them: the check of what is asked for, which nobody is spared. Warm,
everything is at hand; requests arrive as independent callers make them, live a moment and are
charged, so slices are spent and refilled meanwhile. Cold, it is the first request of its account.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from libs.errors import Unavailable
from services.gateway.admission import _Admitted
from tests.bench.admission_outside import outside
from tests.bench.load import PROMPT_TOKENS
from tests.bench.measure import added, arrivals, quantile
from tests.bench.money_rig import (
    OUTPUT_TOKENS,
    Billing,
    Limited,
    Tenant,
    Till,
    billing,
    prepare,
    run,
    till,
)
from tests.bench.report import against, table
from tests.bench.settlement import fsync_ms
from tests.bench.targets import BenchError

Result = TypeVar("Result")

SHARES = (0.5, 0.99, 0.999)
HEADS = [f"p{share * 100:g}" for share in SHARES]
WARM_AIMS_US = (150.0, 500.0)
"""Of the first two shares."""
COLD_AIM_MS = 15.0
PER_S = 600.0
"""Of all three kinds of requests together, which take turns."""
WARM_UP = 1200
REQUESTS = 9000
FIRSTS = 100
"""Accounts that come for the first time, of each kind and in each repeat."""
LIFE_S = 0.05
FIRST = {
    Limited.NOT: "key, hold on a new slice",
    Limited.A_MINUTE: "  and quota a minute",
    Limited.AT_ONCE: "  and places, of many accounts",
}
SEED = 5


@dataclass(slots=True)
class Times:
    """What requests of one kind took.

    Attributes:
        cpu_s: CPU of those that found everything in the process.
        at_hand_s: seconds of the same.
        asked_s: seconds of those that waited for billing.
        refused: those that billing did not answer in time, on a machine with too much to do.
    """

    cpu_s: list[float] = field(default_factory=list)
    at_hand_s: list[float] = field(default_factory=list)
    asked_s: list[float] = field(default_factory=list)
    refused: int = 0


@dataclass(slots=True)
class Watch:
    """Time of this thread since it was made: what other work there is counts in one of the two."""

    _started_s: float = field(default_factory=time.perf_counter)
    _cpu_s: float = field(default_factory=time.thread_time)

    def note(self, times: Times, *, has_waited: bool = False) -> None:
        """Adds what one request took."""
        cpu_s, now_s = time.thread_time() - self._cpu_s, time.perf_counter()
        if has_waited:
            times.asked_s.append(now_s - self._started_s)
        else:
            times.cpu_s.append(cpu_s)
            times.at_hand_s.append(now_s - self._started_s)


class Watched(Generic[Result]):
    """An awaitable that knows whether it had to wait for anything.

    Attributes:
        has_waited: it did.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Result]) -> None:
        self._coroutine = coroutine
        self.has_waited = False

    def __await__(self) -> Generator[Any, Any, Result]:
        inner = self._coroutine.__await__()
        try:
            first = next(inner)
        except StopIteration as done:
            result: Result = done.value
            return result
        self.has_waited = True
        yield first
        return (yield from inner)


@dataclass(slots=True)
class Found:
    """What was measured. Seconds.

    Attributes:
        bare: the same call without key, limits and hold.
        free: with key and hold, of an account without limits.
        limited: with key, limits and hold.
        first: the first request of an account, by what it is limited in.
        nothing: a call to billing that changes nothing.
        fsync_ms: of the same minute.
    """

    bare: Times = field(default_factory=Times)
    free: Times = field(default_factory=Times)
    limited: Times = field(default_factory=Times)
    first: dict[Limited, Times] = field(
        default_factory=lambda: {limited: Times() for limited in Limited}
    )
    nothing: list[float] = field(default_factory=list)
    fsync_ms: list[float] = field(default_factory=list)


def admission(repeats: int, *, is_quick: bool) -> None:
    """Overhead of admission, warm and cold."""
    firsts = 5 if is_quick else FIRSTS
    requests = 300 if is_quick else REQUESTS
    with billing() as process:
        found = run(_measure(process, repeats, requests=requests, firsts=firsts))
    everybody = [found.free.at_hand_s, found.limited.at_hand_s]
    everybody += [times.asked_s for times in found.first.values()]
    if not all(everybody):
        raise BenchError("billing answered no request of one kind in time")
    _print_warm(found)
    _print_cold(found)
    outside(repeats, is_quick=is_quick)


async def _measure(process: Billing, repeats: int, *, requests: int, firsts: int) -> Found:
    """Measures warm and cold in turn.

    Args:
        process: started.
        repeats: how often.
        requests: warm ones of all three kinds, each time.
        firsts: new accounts of each kind, each time.
    """
    warm = (Tenant(number=0), Tenant(number=0, limited=Limited.AT_ONCE))
    fresh = [
        Tenant(number=number, limited=limited)
        for number in range(1, 1 + repeats * firsts)
        for limited in Limited
    ]
    await process.ready()
    await prepare(process, [*warm, *fresh])
    found = Found()
    async with till(process, [*warm, *fresh]) as money:
        # Of the first second little is known yet; it is another case than either of the two.
        await _warm(money, warm, min(WARM_UP, requests), Found(), SEED)
        for repeat in range(repeats):
            money.freshen()
            found.fsync_ms.append(fsync_ms(process.folder))
            await _warm(money, warm, requests, found, SEED + repeat)
            each = len(fresh) // repeats
            part = fresh[repeat * each : (repeat + 1) * each]
            await _cold(money, part, found)
    return found


async def _warm(
    money: Till, tenants: Sequence[Tenant], requests: int, found: Found, seed: int
) -> None:
    """Lets requests of the three kinds arrive in turn."""
    free, limited = (tenant.secret for tenant in tenants)
    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number, moment_s in enumerate(arrivals(requests, PER_S, seed)):
            await asyncio.sleep(started_s + moment_s - time.perf_counter())
            match number % 3:
                case 0:
                    group.create_task(_bare(money, free, found.bare))
                case 1:
                    group.create_task(_life(money, free, found.free))
                case _:
                    group.create_task(_life(money, limited, found.limited))


async def _bare(money: Till, secret: str, times: Times) -> None:
    """The same call without key, limits and hold."""
    asked = money.asked(secret)
    watch = Watch()
    money.admission._checks.check(asked.spec, asked.project)
    watch.note(times)


async def _life(money: Till, secret: str, times: Times) -> None:
    """Admits a request, and ends it a moment later."""
    try:
        admitted = await _admit(money, secret, times)
    except Unavailable:
        times.refused += 1
        return
    if admitted.quota is not None:
        admitted.quota.accepted(PROMPT_TOKENS)
    running = money.opened(money.asked(secret), admitted.hold)
    await asyncio.sleep(LIFE_S)
    if admitted.quota is not None:
        admitted.quota.end(OUTPUT_TOKENS)
    money.ended(running)


async def _admit(money: Till, secret: str, times: Times) -> _Admitted:
    asked = money.asked(secret)
    watch = Watch()
    money.principal(secret)
    watched = Watched(money.admission._hold(asked))
    admitted = await watched
    watch.note(times, has_waited=watched.has_waited)
    return admitted


async def _cold(money: Till, tenants: Sequence[Tenant], found: Found) -> None:
    """Admits the first request of each account, one behind the other."""
    for tenant in tenants:
        secret = tenant.secret
        times = found.first[tenant.limited]
        try:
            admitted = await _admit(money, secret, times)
        except Unavailable:
            times.refused += 1
            continue
        money.gateway._book.release(admitted.hold)
        if admitted.quota is not None:
            admitted.quota.cancel()
        started_s = time.perf_counter()
        await money.gateway._billing.settle([], ["nobody"])
        found.nothing.append(time.perf_counter() - started_s)


def _print_warm(found: Found) -> None:
    rows = [_row("the same call without them", found.bare.cpu_s, found.bare.at_hand_s)]
    for name, times in (("key, hold", found.free), ("key, limits, hold", found.limited)):
        rows.append(_row(name, times.cpu_s, times.at_hand_s))
        over_us = [added(times.cpu_s, found.bare.cpu_s, share) * 1e6 for share in SHARES]
        over_us += [added(times.at_hand_s, found.bare.at_hand_s, share) * 1e6 for share in SHARES]
        rows.append(["  added", *(f"{value:.0f}" for value in over_us)])
        aims = [against(value, aim) for value, aim in zip(over_us, WARM_AIMS_US, strict=False)]
        rows.append(["  aim", *aims, *[""] * (len(over_us) - len(aims))])
    count = len(found.bare.cpu_s)
    table(
        f"Admission, all at hand, us in the gateway's process, {count:,} requests each",
        ["", *(f"CPU {head}" for head in HEADS), *(f"time {head}" for head in HEADS)],
        rows,
    )
    for name, times in (("without limits", found.free), ("with limits", found.limited)):
        everything = [*times.at_hand_s, *times.asked_s]
        waits = f", p50 {quantile(times.asked_s, 0.5) * 1e3:.1f} ms" if times.asked_s else ""
        print(
            f"  {name}: {len(times.asked_s)} of {len(everything)} waited for billing{waits}; "
            f"time of all p99 {quantile(everything, 0.99) * 1e3:.2f} ms"
            f"{_refusals(times)}"
        )


def _print_cold(found: Found) -> None:
    rows = [_row("a call to billing that changes nothing", found.nothing, unit=1e3)]
    for limited, times in found.first.items():
        first_ms = quantile(times.asked_s, 0.99) * 1e3
        rows.append(
            [*_row(FIRST[limited], times.asked_s, unit=1e3), against(first_ms, COLD_AIM_MS)]
        )
    rows[0].append("")
    count = len(found.first[Limited.NOT].asked_s)
    table(
        f"Admission of an account's first request, ms, {count:,} each",
        ["", *HEADS, "aim p99"],
        rows,
    )
    refusals = "".join(_refusals(times) for times in found.first.values())
    print(f"  fsync {quantile(found.fsync_ms, 0.5):.2f} ms{refusals}")


def _refusals(times: Times) -> str:
    """Says that figures leave some requests out, if they do."""
    return f"; {times.refused} were refused: billing was late" if times.refused else ""


def _row(name: str, *columns: Sequence[float], unit: float = 1e6) -> list[str]:
    return [
        name,
        *(f"{quantile(seconds, share) * unit:.1f}" for seconds in columns for share in SHARES),
    ]
