"""Group money of the conformance kit, as `make conformance GROUP=money` shows it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.system.liar import Lie, lying
from tests.system.money_lies import LIES
from tools.conformance import local
from tools.conformance.deployment import Deployment
from tools.conformance.features import MONEY, judge
from tools.conformance.verdict import Kind, Verdict

ALONE = ("B-13", "B-4", "U1", "U6")
"""Features that kill processes, alter the ledger or count what engines do."""
ELSEWHERE = ("B-5", "U2", "B-10", "postgres")
"""Group stream shows most of B-5 and U2; B-10 mostly waits for workers to come back, and postgres
for a database that is away for half a minute: test_fault_cases.py has a shorter one."""
LIARS_AT_ONCE = 12


@pytest.fixture(scope="module")
def place() -> Iterator[Deployment]:
    with local.own_suite(gateways=3) as found:
        yield found


async def _show(feature: str, place: Deployment) -> Verdict:
    return await judge(feature, MONEY[feature], place)


async def test_money_group_passes_on_a_suite_of_its_own(place: Deployment) -> None:
    # Each has a customer of its own: most may run at the same time.
    together = [name for name in MONEY if name not in {*ALONE, *ELSEWHERE}]

    verdicts = list(await asyncio.gather(*(_show(name, place) for name in together)))
    verdicts += [await _show(name, place) for name in ALONE]

    lines = "\n".join(verdict.line for verdict in verdicts)
    assert {verdict.kind for verdict in verdicts} == {Kind.PASS}, lines


async def test_every_lie_about_money_is_seen(place: Deployment) -> None:
    turns = asyncio.Semaphore(LIARS_AT_ONCE)

    async def look(lie: Lie) -> str:
        async with turns, lying(place, lie) as told:
            verdict = await _show(lie.feature, told)
        is_seen = verdict.kind is Kind.FAIL and lie.seen_as in verdict.text
        return "" if is_seen else f"{lie.name}: {verdict.line}"

    unseen = await asyncio.gather(*(look(lie) for lie in LIES))

    assert [line for line in unseen if line] == []


def test_every_feature_that_needs_no_kill_has_its_lies() -> None:
    assert {lie.feature for lie in LIES} == set(MONEY) - {"B-5", "B-10", "U1", "postgres"}
