"""Cases of fail-points: what stands still, fails or is slow at one, and deaths while recovering."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Iterator, Sequence

from libs.failpoints import Rule
from tools.chaos.cases.ground import POLL_S, Ground
from tools.chaos.cases.torn import killed_with_a_journal
from tools.conformance.operator import within
from tools.conformance.verdict import expect, expect_equal
from tools.local import credential, orphan
from tools.local.absence import pid_of

GATEWAY_RULES = (
    # Two deaths while it recovers, one after the other.
    *("replay.read=kill@1", "replay.settled=kill@1"),
    *("release.counted=stop@20", "journal.closed=error@2", "settle.answered=error@2"),
    "slice.answered=sleep@1",
)
BILLING_RULES = (
    *("grant.written=error@1", "settle.written=error@2", "settle.committed=sleep@2"),
    *("close.written=stop@1", "close.committed=error@2"),
)
CLIENTS = 6
STOP_S = 1.0
"""How long who stands still does so."""
ACT_S = 60.0
"""Longest time until every rule has acted."""
_HALTED = "T"


async def points_act(ground: Ground) -> None:
    """Every action at a point of the gateway and of billing; death while recovering, twice."""
    is_over = asyncio.Event()
    halts: list[str] = []
    with _armed(ground, "gateway", GATEWAY_RULES), _armed(ground, "billing", BILLING_RULES):
        await killed_with_a_journal(ground, lambda data: data)
        billing = pid_of(ground.state, "billing")
        assert billing is not None
        orphan.kill(billing)
        async with asyncio.TaskGroup() as tasks:
            waking = tasks.create_task(_wake(ground, halts))
            for _ in range(CLIENTS):
                tasks.create_task(ground.keep_asking(20, is_over))

            async def have_acted() -> bool:
                return not _left(ground)

            await within(ACT_S, have_acted)
            # The last one may stand still only now.
            await asyncio.sleep(STOP_S + 4 * POLL_S)
            is_over.set()
            waking.cancel()
    expect(not _left(ground), f"rules that did not act: {', '.join(sorted(_left(ground)))}")
    await ground.served()
    expect_equal(sorted(halts), ["billing", "gateway"], "who stood still at a point")
    rules = (*GATEWAY_RULES, *BILLING_RULES)
    ground.findings.shown.append(f"{len(rules)} fail-points acted: {', '.join(rules)}")


@contextlib.contextmanager
def _armed(ground: Ground, name: str, rules: Sequence[str]) -> Iterator[None]:
    """Has the next lives of a process act at points, each rule once over all of them."""
    marks = ground.state.root / "case-marks"
    marks.mkdir(mode=0o700, exist_ok=True)
    file = ground.state.config / f"{name}.toml"
    before = file.read_text(encoding="utf-8")
    points = json.dumps([str(Rule.parse(rule)) for rule in rules])
    section = f"\n[failpoints]\nallow = true\npoints = {points}\nmarks = {json.dumps(str(marks))}\n"
    credential.write(file, before + section)
    try:
        yield
    finally:
        credential.write(file, before)


def _left(ground: Ground) -> set[str]:
    marks = ground.state.root / "case-marks"
    return {*GATEWAY_RULES, *BILLING_RULES} - {mark.name for mark in marks.iterdir()}


async def _wake(ground: Ground, halts: list[str]) -> None:
    """Has whoever stands still go on after a while; notes who did."""
    while True:
        for name in ("gateway", "billing"):
            pid = pid_of(ground.state, name)
            found = None if pid is None else orphan.find(pid)
            if found is not None and found.state == _HALTED:
                await asyncio.sleep(STOP_S)
                halts.append(name)
                orphan.kill(found.pid, signal.SIGCONT)
        await asyncio.sleep(POLL_S)
