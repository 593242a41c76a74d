"""Cases of a database that is away: what runs goes on, what is new fails typed, nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from libs.errors import Code, Reason
from tools.chaos.audit import End
from tools.chaos.cases.ground import STEP_S, Answer, Ground
from tools.conformance.client import Refusal
from tools.conformance.verdict import expect, expect_equal
from tools.local.absence import POSTGRES, Way, database_away, pids

STREAMS = 10
ASKERS = 4
"""Who ask all the time: half of them with a request_id, which billing has to look up."""
WARM_S = 1.0
"""From the first request until the database goes: slices are at hand then."""
AFTER_S = 3.0
"""How much longer streams go on than the database is away."""
BACK_S = 10.0
"""Longest time until all is settled once the database is back."""


async def postgres_away(ground: Ground, way: Way, away_s: float, lease_s: float) -> None:
    """Takes PostgreSQL away under load.

    Args:
        ground: the suite.
        way: how it is away.
        away_s: seconds.
        lease_s: of slices, seconds; above `away_s` slices at hand may last.
    """
    loop = asyncio.get_running_loop()
    before = pids(ground.state)
    tokens = round((WARM_S + away_s + AFTER_S) / STEP_S)
    is_over = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(ground.stream(tokens)) for _ in range(STREAMS)]
        asking = [
            tasks.create_task(ground.keep_asking(10, is_over, is_keyed=bool(number % 2)))
            for number in range(ASKERS)
        ]
        await asyncio.sleep(WARM_S)
        async with database_away(ground.state, way):
            gone_s = loop.time()
            await asyncio.sleep(away_s)
        back_s = loop.time()
        is_over.set()
    ends = [task.result() for task in running]
    cut = [str(answer.refusal) for answer in ends if answer.attempt.end is not End.CLEAN]
    expect(not cut, f"{len(cut)} of {STREAMS} running streams did not finish: {cut[:1]}")
    ground.findings.shown.append(f"{STREAMS} of {STREAMS} running streams finished")
    answers = [answer for task in asking for answer in task.result()]
    _look_at_new(ground, answers, gone_s, back_s, lease_s)
    took_s = await ground.settled(BACK_S)
    ground.findings.shown.append(f"all settled {took_s:.1f} s after the last end")
    after = pids(ground.state)
    del before[POSTGRES], after[POSTGRES]
    expect_equal(after, before, "processes that nobody started again")


def _look_at_new(
    ground: Ground, answers: Sequence[Answer], gone_s: float, back_s: float, lease_s: float
) -> None:
    """Looks at what was asked for meanwhile."""
    asked = [
        item for item in answers if item.attempt.end_s > gone_s and item.attempt.start_s < back_s
    ]
    refused = [item.refusal for item in asked if item.refusal is not None]
    for refusal in refused:
        require_repeatable(refusal, "a new request without the database")
    expect(bool(refused), f"all of {len(asked)} new requests were admitted without the database")
    ran = [item for item in asked if item.refusal is None and item.attempt.end_s < back_s]
    late = [item for item in ran if item.attempt.start_s > gone_s + lease_s]
    expect(not late, f"{len(late)} new requests were admitted when every lease was over")
    ground.findings.shown.append(
        f"of {len(asked)} new requests {len(ran)} ran from slices at hand, {len(refused)} were"
        " refused as UNAVAILABLE with RetryInfo"
    )


def require_repeatable(refusal: Refusal, what: str) -> None:
    """States that a refusal is typed, and says when to repeat."""
    refusal.expect(Code.UNAVAILABLE, Reason.SERVICE_UNAVAILABLE, what)
    expect(refusal.retry_s is not None, f"{what}: no RetryInfo: {refusal}")
