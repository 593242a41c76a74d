"""Features of what is paid with: U2 (ceilings, an empty balance), B-5, B-6."""

from __future__ import annotations

import asyncio

from maas.billing.v1 import ledger_pb2

from libs.errors import Code, Reason
from tools.conformance import money, operator
from tools.conformance.client import Refusal, Tenant
from tools.conformance.money_customer import (
    Customer,
    as_customer,
    customer,
    exact_spec,
    prompt_ids,
)
from tools.conformance.money_meter import admitted, refused
from tools.conformance.trial import Trial
from tools.conformance.verdict import expect, expect_equal

_AFFORDABLE = 3
_RACERS = 24
_EXPIRY_S = 4.0
_PLENTY = 10_000_000_000


async def ceilings_are_kept(trial: Trial) -> None:
    """U2: the request's own ceiling; and streams that share a nearly empty balance."""
    async with as_customer(trial) as inner:
        await money.ceiling_is_kept(inner)
    await _share_the_rest(trial)


async def repeats_are_one(trial: Trial) -> None:
    """B-5: as in group stream, for a customer of the kit's own."""
    async with as_customer(trial) as inner:
        await money.repeats_are_one(inner)


async def _share_the_rest(trial: Trial) -> None:
    """Credit for exactly three: exactly three of 24 are served, and nothing goes below zero."""
    async with customer(trial, 0) as buyer, buyer.callers() as tenants:
        ids = await prompt_ids(tenants[0])
        hold = (await tenants[0].quote(exact_spec(tenants[0], ids, 200))).hold.nanos
        await buyer.post(_AFFORDABLE * hold)
        lowest: list[int] = []
        watching = asyncio.create_task(_watch(buyer, lowest))
        try:
            ends = await asyncio.gather(
                *(_streamed(tenants[n % len(tenants)], ids, n) for n in range(_RACERS))
            )
        finally:
            watching.cancel()
        served = sum(end is None for end in ends)
        reasons = {end.reason for end in ends if end is not None}
        expect_equal(served, _AFFORDABLE, f"of {_RACERS} streams with credit for {_AFFORDABLE}")
        expect_equal(reasons, {Reason.INSUFFICIENT_CREDIT.value}, "why the others were refused")
        expect(min(lowest, default=0) >= 0, f"the balance went down to {min(lowest, default=0)}")
        expect_equal(await buyer.require_sum(), 0, "nanos that are left")
        trial.show(
            f"{_RACERS} streams over {len(tenants)} gateways with credit for {_AFFORDABLE}:"
            f" {served} served, the others INSUFFICIENT_CREDIT, the balance never below zero"
            f" ({len(lowest)} looks)"
        )


async def _watch(buyer: Customer, lowest: list[int]) -> None:
    while True:
        found = await buyer.balance()
        lowest.append(min(found.posted.nanos, found.posted.nanos - found.held.nanos))
        await asyncio.sleep(operator.POLL_S)


async def _streamed(tenant: Tenant, ids: list[int], number: int) -> Refusal | None:
    try:
        await tenant.read(exact_spec(tenant, ids, 200, number + 1))
    except Refusal as refusal:
        return refusal
    return None


async def grants_are_used_in_order(trial: Trial) -> None:
    """B-6: order and expiry of grants, top-ups, adjustments and refunds, all as entries."""
    async with customer(trial, 0) as buyer, buyer.caller() as tenant:
        spec = exact_spec(tenant, await prompt_ids(tenant), 20)
        loop = asyncio.get_running_loop()
        expires_s = loop.time() + _EXPIRY_S
        soon = await buyer.grant(_PLENTY, priority=50, expires_in_s=_EXPIRY_S)
        later = await buyer.grant(1, priority=60, kind=ledger_pb2.GRANT_KIND_TOP_UP)
        expect_equal(list(await buyer.grants()), [soon, later], "grants in order")
        whole = await tenant.generate(spec)
        charge = (await buyer.books.record(whole.generation_id)).charge.nanos
        await buyer.at_rest()
        grants = await buyer.grants()
        expect_equal(grants[soon].remaining.nanos, _PLENTY - charge, "left of the first grant")
        expect_equal(grants[later].remaining.nanos, 1, "left of the second grant")
        expect_equal(await buyer.require_sum(), _PLENTY + 1 - charge, "balance")
        expect(loop.time() < expires_s, "the grant expired before it could be used")
        await asyncio.sleep(expires_s + 1.0 - loop.time())
        refusal = await refused(tenant, spec, "a second after the grant has expired")
        refusal.expect(Code.FAILED_PRECONDITION, Reason.INSUFFICIENT_CREDIT, "an expired grant")
        expect_equal((await buyer.balance()).available.nanos, 1, "available after the expiry")
        trial.show(
            f"of {_PLENTY} nanos that expire in {_EXPIRY_S:g} s {charge} used first, nothing a"
            " second after"
        )
        await _given_back(trial, buyer, tenant, charge)


async def _given_back(trial: Trial, buyer: Customer, tenant: Tenant, charge: int) -> None:
    """Top-up, adjustment and refund: entries that add, and change none that was there."""
    # The expiry is booked when somebody looks, or by the sweeper.
    await buyer.grant(_PLENTY, priority=50, kind=ledger_pb2.GRANT_KIND_TOP_UP)
    before = await buyer.entries()
    expect_equal(await buyer.require_sum(), _PLENTY + 1, "balance after expiry and top-up")
    whole = await admitted(tenant, exact_spec(tenant, await prompt_ids(tenant), 20))
    record = await buyer.books.record(whole.generation_id)
    expect_equal(record.charge.nanos, charge, "charge of the same request")
    half = charge // 2
    await buyer.refund(record.name, half)
    try:
        await buyer.refund(record.name, charge)
    except Refusal as refusal:
        expect(refusal.code is not Code.INTERNAL, f"a refund that is too much: {refusal}")
    else:
        expect(False, "more was refunded than was charged")
    await buyer.refund(record.name)
    await buyer.post(-1)
    after = await buyer.entries()
    expect_equal(after[: len(before)], before, "entries that were there before")
    expect_equal(await buyer.require_sum(), _PLENTY, "balance after refund and adjustment")
    again = await buyer.books.record(whole.generation_id)
    expect_equal(again.charge.nanos, charge, "charge of a refunded record")
    expect_equal(again.refunded.nanos, charge, "refunded")
    kinds = {ledger_pb2.EntryKind.Name(entry.kind)[11:] for entry in after}
    wanted = {"GRANT", "TOP_UP", "USAGE", "EXPIRY", "REFUND", "ADJUSTMENT"}
    expect_equal(kinds, wanted, "kinds of entries")
    trial.show(
        f"{len(after)} entries of {len(wanted)} kinds sum to the balance at every step; a refund"
        " gave back all, more was refused, nothing was deleted"
    )
