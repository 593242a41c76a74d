"""All cases, by the suite that they share, and how they are run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from libs.errors import MaasError
from tools.chaos.cases.clocks import PROCESSES, clock_jumps
from tools.chaos.cases.database import postgres_away
from tools.chaos.cases.disk import database_is_full, journal_is_full, machine_is_full
from tools.chaos.cases.ground import Ground, at
from tools.chaos.cases.points import points_act
from tools.chaos.cases.torn import flipped_bit, lost_end, torn_end
from tools.conformance.client import Refusal
from tools.conformance.verdict import CannotShow, Findings, Kind, Mismatch, Verdict
from tools.local.absence import Way
from tools.local.place import State

CASE_S = 180.0
"""Longest time of one case."""
LEASE_S = 4.0
QUICK_SETTINGS = (
    f"billing.lease_duration={LEASE_S:g}s",
    "billing.grace=3s",
    "billing.sweep_interval=1s",
)
"""Of a suite on which leases end soon."""
AWAY_S = 30.0
PATIENT_LEASE_S = 60.0
"""The default."""
SEEDS = range(2, 5)


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that goes wrong.

    Attributes:
        name: for people.
        show: does it, and looks at what clients see.
        is_cheap: a part of `make test`.
    """

    name: str
    show: Callable[[Ground], Awaitable[None]]
    is_cheap: bool = False

    async def judge(self, ground: Ground) -> Verdict:
        """Shows the case and audits every token; whatever happens becomes a verdict."""
        ground.findings = Findings()
        try:
            async with asyncio.timeout(CASE_S):
                await self.show(ground)
                await ground.settled()
                ground.findings.shown.append(await ground.audit())
        except CannotShow as reason:
            return Verdict(Kind.SKIP, self.name, str(reason))
        except TimeoutError:
            return Verdict(Kind.FAIL, self.name, f"no end after {CASE_S:g} s")
        except (Mismatch, Refusal, MaasError) as fault:
            return Verdict(Kind.FAIL, self.name, str(fault))
        except ExceptionGroup as faults:
            # Of clients that ran together.
            known, defects = faults.split((Mismatch, Refusal, MaasError))
            if defects is not None:
                raise
            assert known is not None
            return Verdict(Kind.FAIL, self.name, str(known.exceptions))
        return ground.findings.verdict(self.name)


QUICK = (
    Case(
        "postgres-halted",
        partial(postgres_away, way=Way.HALTED, away_s=8.0, lease_s=LEASE_S),
        is_cheap=True,
    ),
    Case("postgres-gone", partial(postgres_away, way=Way.GONE, away_s=3.0, lease_s=LEASE_S)),
    Case("postgres-dying", partial(postgres_away, way=Way.DYING, away_s=8.0, lease_s=LEASE_S)),
    Case("journal-full", journal_is_full, is_cheap=True),
    Case("journal-torn", partial(torn_end, seed=1), is_cheap=True),
    Case("journal-flipped", partial(flipped_bit, seed=1), is_cheap=True),
    *(Case(f"journal-torn-{seed}", partial(torn_end, seed=seed)) for seed in SEEDS),
    *(Case(f"journal-flipped-{seed}", partial(flipped_bit, seed=seed)) for seed in SEEDS),
    Case("journal-lost", lost_end, is_cheap=True),
    Case("points", points_act, is_cheap=True),
)
MACHINE_FULL = Case("machine-full", machine_is_full)
DATABASE_FULL = Case("database-full", database_is_full)
SMALL_DISK = (MACHINE_FULL, DATABASE_FULL)
PATIENT = tuple(
    Case(
        f"postgres-{way.value}-{AWAY_S:g}s",
        partial(postgres_away, way=way, away_s=AWAY_S, lease_s=PATIENT_LEASE_S),
    )
    for way in Way
)


async def run(state: State, cases: Iterable[Case], say: Callable[[str], None]) -> list[Verdict]:
    """Shows cases on a suite, one after the other; each audits what all before it have left.

    Args:
        state: of the suite.
        cases: in order.
        say: takes each line as it is known.
    """
    verdicts = []
    async with at(state) as ground:
        for case in cases:
            verdict = await case.judge(ground)
            say(verdict.line)
            verdicts.append(verdict)
    return verdicts


def clock_cases(folder: Path) -> list[Case]:
    """Cases of clocks that are set by files in a folder."""
    return [
        Case(f"clock-{name}", partial(clock_jumps, folder=folder, name=name)) for name in PROCESSES
    ]
