"""How long money takes to be durable: `--only lag`.

First through the whole suite, from the end that a gateway writes down to the moment at which
another connection to PostgreSQL sees the record: both read the clock of this machine. Then the
money of a gateway in this process, whose billing is away for a while, from billing's first answer
until all that has piled up is durable. The floor is a settlement that is sent by itself, at once.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg

from libs.postgres import cluster
from tests.bench.load import Load
from tests.bench.load import run as run_load
from tests.bench.measure import quantile
from tests.bench.money_rig import Billing, Running, Tenant, Till, billing, prepare, run, till
from tests.bench.report import against, table
from tests.bench.settlement import fsync_ms
from tests.bench.targets import BenchError, Target, suite
from tools.local.place import DATABASE

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

RATES = (20.0, 200.0)
SECONDS = 6.0
"""Of each rate in each repeat."""
TOKENS = 1
CAPACITY = 256
AT_ONCE = 192
"""Arrivals in flight on a machine with other work, where nobody waits for his turn to come."""
SEED = 11
LAG_AIM_S = 0.5
DRAIN_AIM_S = 5.0
AWAY_S = 5.0
PILED_UP = 1000
ALONE = 100
SEEN_TIMEOUT_S = 10.0
DRAIN_TIMEOUT_S = 60.0
_POLL_S = 0.005
_NEW = """
    SELECT number, extract(epoch FROM clock_timestamp() - end_time)::float8 AS lag_s
      FROM billing.usage_record
     WHERE number > $1
     ORDER BY number
"""


def lag(repeats: int, *, is_quick: bool) -> None:
    """Settlement lag through the suite, and the drain after billing was away."""
    seconds = 1.0 if is_quick else SECONDS
    _print_lags(_suite_lags(repeats, seconds))
    away_s, count = (1.0, 100) if is_quick else (AWAY_S, PILED_UP)
    found = Drained()
    with billing() as process:
        run(_drain(process, repeats, found, away_s=away_s, count=count))
    _print_drain(found, away_s, count)


@dataclass(slots=True)
class Lags:
    """What the suite did with one rate of requests.

    Attributes:
        seconds: from the end of each generation until its record was seen.
        fsync_ms: of the same minute.
    """

    seconds: list[float] = field(default_factory=list)
    fsync_ms: list[float] = field(default_factory=list)


def _suite_lags(repeats: int, seconds: float) -> dict[float, Lags]:
    found = {rate: Lags() for rate in RATES}
    with suite(["--engine=sim", f"--capacity={CAPACITY}", "--flat-out"]) as whole:
        assert whole.state is not None
        for repeat in range(repeats):
            for rate, lags in found.items():
                load = Load(
                    kind="arrivals",
                    count=0,
                    tokens=TOKENS,
                    requests=int(rate * seconds),
                    per_s=rate,
                    seed=SEED + repeat,
                    at_once=AT_ONCE,
                )
                lags.fsync_ms.append(fsync_ms(whole.state))
                lags.seconds += run(_seen(whole, whole.state, load))
    return found


async def _seen(whole: Target, state: Path, load: Load) -> list[float]:
    """Runs a load, and watches its records come; returns the seconds that each took.

    Raises:
        BenchError: some did not come.
    """
    found = cluster.place(state)
    dsn = found.dsn(database=DATABASE, password=found.superuser_password())
    connection = await asyncpg.connect(dsn)
    try:
        last = await connection.fetchval("SELECT max(number) FROM billing.usage_record") or 0
        lags: list[float] = []
        loading = asyncio.create_task(asyncio.to_thread(run_load, whole, load))
        while not loading.done():
            last = await _look(connection, last, lags)
        await loading
        for _ in range(int(SEEN_TIMEOUT_S / _POLL_S)):
            # Those in front are of the client's warm-up.
            if len(lags) >= load.at_once + load.requests:
                return lags[-load.requests :]
            last = await _look(connection, last, lags)
    finally:
        await connection.close()
    raise BenchError(f"{load.requests} generations ended, and {len(lags)} records were seen")


async def _look(
    connection: asyncpg.Connection[asyncpg.Record], last: int, lags: list[float]
) -> int:
    """Adds the lag of each new record; returns the last one's number."""
    rows = await connection.fetch(_NEW, last)
    lags += [row["lag_s"] for row in rows]
    await asyncio.sleep(_POLL_S)
    return rows[-1]["number"] if rows else last


@dataclass(slots=True)
class Drained:
    """What happened after billing was away.

    Attributes:
        alone_s: of settlements that were sent by themselves.
        start_s: from the start of billing until its first answer.
        drain_s: from there until everything was durable.
        fsync_ms: of the same minute.
    """

    alone_s: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    drain_s: list[float] = field(default_factory=list)
    fsync_ms: list[float] = field(default_factory=list)


async def _drain(
    process: Billing, repeats: int, found: Drained, *, away_s: float, count: int
) -> None:
    tenant = Tenant(number=0)
    await process.ready()
    await prepare(process, [tenant])
    async with till(process, [tenant]) as money:
        await _alone(money, tenant, found)
        for _ in range(repeats):
            money.freshen()
            found.fsync_ms.append(fsync_ms(process.folder))
            await _away(money, process, tenant, found, away_s=away_s, count=count)
    await _check(process, ALONE + repeats * count)


async def _alone(money: Till, tenant: Tenant, found: Drained) -> None:
    """Settles generations one by one, each as soon as it has ended."""
    for _ in range(ALONE):
        settlement = money.ended(await _opened(money, tenant))
        started_s = time.perf_counter()
        # The settler has it too, and sends it again; whoever comes second changes nothing.
        await money.gateway._billing.settle([settlement], [])
        found.alone_s.append(time.perf_counter() - started_s)


async def _away(
    money: Till,
    process: Billing,
    tenant: Tenant,
    found: Drained,
    *,
    away_s: float,
    count: int,
) -> None:
    """Lets generations end evenly while billing is away, and waits until all are durable."""
    running = [await _opened(money, tenant) for _ in range(count)]
    await _until_settled(money)
    process.kill()
    gone_s = time.perf_counter()
    for number, generation in enumerate(running, 1):
        money.ended(generation)
        await asyncio.sleep(gone_s + number * away_s / count - time.perf_counter())
    if money.gateway._settler.queued != count:
        raise BenchError("something was settled while billing was away")
    started_s = time.perf_counter()
    process.start()
    await process.ready()
    ready_s = time.perf_counter()
    found.start_s.append(ready_s - started_s)
    await _until_settled(money)
    found.drain_s.append(time.perf_counter() - ready_s)


async def _opened(money: Till, tenant: Tenant) -> Running:
    asked = money.asked(tenant.secret)
    admitted = await money.admission._hold(asked)
    return money.opened(asked, admitted.hold)


async def _until_settled(money: Till) -> None:
    """Waits until billing has said of everything that it is durable.

    Raises:
        BenchError: it does not.
    """
    for _ in range(int(DRAIN_TIMEOUT_S / _POLL_S)):
        if not money.gateway._settler.queued:
            return
        await asyncio.sleep(_POLL_S)
    raise BenchError(f"{money.gateway._settler.queued} settlements still wait for billing")


async def _check(process: Billing, count: int) -> None:
    """Sees that each generation has one record.

    Raises:
        BenchError: there are more records, or fewer.
    """
    connection = await asyncpg.connect(process.dsn)
    try:
        records = await connection.fetchval("SELECT count(*) FROM billing.usage_record")
    finally:
        await connection.close()
    if records != count:
        raise BenchError(f"{count} generations have {records} records")


def _print_lags(found: dict[float, Lags]) -> None:
    rows = []
    for rate, lags in found.items():
        last_s = quantile(lags.seconds, 0.99)
        rows.append(
            [
                f"{rate:g} requests/s",
                f"{len(lags.seconds):,}",
                *(f"{quantile(lags.seconds, share) * 1e3:.0f} ms" for share in (0.5, 0.99, 1.0)),
                f"{against(last_s, LAG_AIM_S)}",
                f"{quantile(lags.fsync_ms, 0.5):.2f} ms",
            ]
        )
    table(
        "Settlement lag in the whole suite: from a generation's end until its record is seen",
        ["", "records", "p50", "p99", "max", "aim p99, s", "fsync"],
        rows,
    )


def _print_drain(found: Drained, away_s: float, count: int) -> None:
    alone_ms = [quantile(found.alone_s, share) * 1e3 for share in (0.5, 0.99)]
    drain_s, start_s = quantile(found.drain_s, 0.5), quantile(found.start_s, 0.5)
    aim = against(drain_s, DRAIN_AIM_S)
    table(
        f"{count:,} settlements that wait, after billing was away for {away_s:g} s",
        ["", "s", "aim"],
        [
            ["billing's first answer to the last one durable", f"{drain_s:.2f}", aim],
            ["billing's start to its first answer", f"{start_s:.2f}", ""],
        ],
    )
    print(
        f"  one settlement alone p50 {alone_ms[0]:.1f} ms, p99 {alone_ms[1]:.1f} ms; "
        f"fsync {quantile(found.fsync_ms, 0.5):.2f} ms"
    )
