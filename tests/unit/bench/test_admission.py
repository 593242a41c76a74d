"""tests/bench/admission.py and money_rig.py: who waited, and whose key it is."""

from __future__ import annotations

import asyncio

import pytest

from libs.auth import KeyTable
from tests.bench.admission import Times, Watch, Watched
from tests.bench.money_rig import Limited, Tenant


async def at_hand() -> str:
    return "hold"


async def test_what_is_at_hand_is_not_waited_for() -> None:
    watched = Watched(at_hand())

    assert await watched == "hold"
    assert not watched.has_waited


async def test_a_wait_is_noticed_and_its_result_is_passed_on() -> None:
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def asking() -> str:
        await asyncio.sleep(0)
        return await answer

    watched = Watched(asking())
    asyncio.get_running_loop().call_soon(answer.set_result, "slice")

    assert await watched == "slice"
    assert watched.has_waited


@pytest.mark.parametrize("waits", [False, True])
async def test_a_refusal_is_passed_on(*, waits: bool) -> None:
    async def refused() -> str:
        if waits:
            await asyncio.sleep(0)
        raise LookupError

    with pytest.raises(LookupError):
        await Watched(refused())


def test_who_waited_does_not_count_among_what_was_at_hand() -> None:
    times = Times()

    Watch().note(times)
    Watch().note(times, has_waited=True)
    Watch().note(times)

    assert [len(times.cpu_s), len(times.at_hand_s), len(times.asked_s)] == [2, 2, 1]
    assert min(*times.cpu_s, *times.at_hand_s, *times.asked_s) >= 0


def test_tenants_of_all_kinds_have_accounts_and_keys_of_their_own() -> None:
    tenants = [Tenant(number=number, limited=limited) for number in range(3) for limited in Limited]
    keys = KeyTable()
    keys.apply(tenant.record() for tenant in tenants)
    keys.touch(0.0)

    payers = [keys.authenticate(tenant.secret, 0.0).organization for tenant in tenants]

    assert payers == [tenant.organization for tenant in tenants]
    assert len(set(payers)) == 9
