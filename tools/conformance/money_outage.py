"""PostgreSQL is away: what runs goes on, what is new runs from slices at hand, nothing is lost."""

from __future__ import annotations

import asyncio

from libs.errors import Code, Reason
from tools.conformance.client import Refusal, Tenant
from tools.conformance.delivery import SEED
from tools.conformance.frames import Transcript
from tools.conformance.money import new_request_id
from tools.conformance.money_customer import Customer, customer, exact_spec, prompt_ids
from tools.conformance.operator import within
from tools.conformance.trial import Trial
from tools.conformance.verdict import CannotShow, expect, expect_equal

AWAY_S = 30.0
STREAMS = 10
STREAM_TOKENS = (1500, 7500)
"""Of a kit whose tokens take some milliseconds: some streams end meanwhile, some after."""
NEW_TOKENS = 10
PAUSE_S = 0.5
BACK_S = 10.0
"""Longest time until a request is served again, once the database is back."""


async def the_database_may_go(trial: Trial) -> None:
    """PostgreSQL away for 30 s: running streams finish and settle later, nothing is restarted."""
    away = trial.deployment.without_database
    if away is None:
        raise CannotShow("needs a suite of the kit's own, whose database it may take away")
    async with customer(trial) as buyer, buyer.callers() as tenants:
        ids = await prompt_ids(tenants[0])
        asked = _Asked(tenants, ids)
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(_read(tenants[number % len(tenants)], ids, number))
                for number in range(STREAMS)
            ]
            await asked.once()
            expect(not asked.refusals, "a request was refused before the database was away")
            async with away(), asyncio.timeout(AWAY_S + BACK_S):
                await asked.until(asyncio.get_running_loop().time() + AWAY_S)
        ends = [task.result() for task in running]
        finished = [end for end in ends if isinstance(end, Transcript)]
        cut = [str(end) for end in ends if isinstance(end, Refusal)]
        expect(not cut, f"of {STREAMS} streams {len(cut)} did not finish: {cut[:1]}")
        trial.show(f"{STREAMS} of {STREAMS} streams finished over {AWAY_S:g} s without a database")
        _look_at_refusals(trial, asked)
        await _look_at_books(trial, buyer, [*finished, *asked.served])


class _Asked:
    """What is asked for while the database is away.

    Attributes:
        served: from slices at hand.
        refusals: of the rest.
    """

    def __init__(self, tenants: list[Tenant], ids: list[int]) -> None:
        self._tenants = tenants
        self._ids = ids
        self.served: list[Transcript] = []
        self.refusals: list[Refusal] = []

    async def until(self, end_s: float) -> None:
        """Asks all gateways again and again."""
        loop = asyncio.get_running_loop()
        while loop.time() < end_s:
            await self.once()
            await asyncio.sleep(PAUSE_S)

    async def once(self) -> None:
        """Asks each gateway twice: with a request_id, which billing has to look up, and without."""
        keys = ("", new_request_id())
        await asyncio.gather(*(self._ask(tenant, key) for tenant in self._tenants for key in keys))

    async def _ask(self, tenant: Tenant, request_id: str) -> None:
        spec = exact_spec(tenant, self._ids, NEW_TOKENS, SEED)
        try:
            self.served.append(await tenant.read(spec, request_id=request_id))
        except Refusal as refusal:
            self.refusals.append(refusal)


async def _read(tenant: Tenant, ids: list[int], number: int) -> Transcript | Refusal:
    """Reads a long stream as far as it comes."""
    try:
        return await tenant.read(exact_spec(tenant, ids, STREAM_TOKENS[number % 2], number + 1))
    except Refusal as refusal:
        return refusal


def _look_at_refusals(trial: Trial, asked: _Asked) -> None:
    expect(bool(asked.refusals), "every new request was admitted without a database")
    for refusal in asked.refusals:
        refusal.expect(Code.UNAVAILABLE, Reason.SERVICE_UNAVAILABLE, "without a database")
        expect(refusal.retry_s is not None, f"no RetryInfo: {refusal}")
    trial.show(
        f"meanwhile {len(asked.served)} new ones ran from slices at hand, {len(asked.refusals)}"
        " were refused as UNAVAILABLE with RetryInfo"
    )


async def _look_at_books(trial: Trial, buyer: Customer, whole: list[Transcript]) -> None:
    """Everything is settled, once, for what its client got; nothing is held; requests go on."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    async with buyer.caller() as tenant:
        spec = exact_spec(tenant, await prompt_ids(tenant), NEW_TOKENS, SEED)

        async def is_served() -> bool:
            try:
                whole.append(await tenant.read(spec))
            except Refusal:
                return False
            return True

        expect(await within(BACK_S, is_served), f"no request was served within {BACK_S:g} s")
    for transcript in whole:
        assert transcript.finished is not None
        record = await buyer.books.record(transcript.generation_id)
        expect_equal(record.usage.output_tokens, transcript.output_tokens, "tokens of a record")
        expect_equal(record.charge, transcript.finished.charge, "charge of a record")
    expect_equal((await buyer.at_rest()).held.nanos, 0, "nanos that are held")
    violations, _ = await buyer.reconcile()
    expect(not violations, f"the auditor finds {[item.invariant for item in violations]}")
    trial.show(
        f"{loop.time() - start_s:.1f} s after it was back all {len(whole)} were settled, to the"
        " token; nothing is held, the auditor finds nothing"
    )
