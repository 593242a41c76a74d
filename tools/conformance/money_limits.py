"""Features of limits: B-3, B-8, B-9, B-11."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

from maas.billing.v1 import limit_service_pb2 as limits

from libs.errors import Code, Reason
from tools.conformance import operator
from tools.conformance.client import Refusal, Tenant
from tools.conformance.money_customer import (
    Customer,
    Spec,
    customer,
    exact_spec,
    prompt_ids,
    usd,
)
from tools.conformance.money_meter import refused
from tools.conformance.trial import Trial
from tools.conformance.verdict import Mismatch, expect, expect_equal

_RACERS = 200
_AFFORDABLE = 10
_CALLS_AT_ONCE = 64
"""On one connection: less than it takes at the same time."""
_RACE_S = 60.0
_SLACK_S = 0.25
_LEFT = 4
"""Requests of a limit, besides the one that runs."""
_DAY_S = 86_401
_REACHED_PERCENT = 85
"""Between two clocks, and for the call itself."""


async def budgets_are_not_overshot(trial: Trial) -> None:
    """B-3: a spend limit for ten, 200 at once over all gateways: exactly ten are served."""
    for name in ("account", "project", "key"):
        async with customer(trial) as buyer:
            scope = {"account": buyer.account, "project": buyer.project, "key": buyer.key.name}
            await _race(trial, buyer, name, scope[name])


async def _race(trial: Trial, buyer: Customer, name: str, scope: str) -> None:
    async with AsyncExitStack() as stack:
        per_gateway = -(-_RACERS // _CALLS_AT_ONCE // len(buyer.endpoints)) + 1
        tenants = [
            await stack.enter_async_context(buyer.caller(endpoint=endpoint))
            for endpoint in buyer.endpoints
            for _ in range(per_gateway)
        ]
        ids = await prompt_ids(tenants[0])
        hold = (await tenants[0].quote(exact_spec(tenants[0], ids, 50))).hold.nanos
        amount = usd(_AFFORDABLE * hold + hold // 2)
        spend = limits.SpendLimit(amount=amount, window=limits.SPEND_WINDOW_DAY)
        limit = await buyer.limit(scope, spend)
        before = (await buyer.at_rest()).posted.nanos
        spent = (await buyer.limit_usage(limit)).spent.nanos
        try:
            async with asyncio.timeout(_RACE_S):
                ends = await asyncio.gather(
                    *(
                        _race_once(tenants[number % len(tenants)], ids, number)
                        for number in range(_RACERS)
                    )
                )
        except TimeoutError:
            raise Mismatch(f"a call was not answered within {_RACE_S:g} s") from None
        counts = Counter(end.reason if end else "served" for end in ends)
        taken = before - (await buyer.at_rest()).posted.nanos
        used = await buyer.limit_usage(limit)
    afford = (amount.nanos - spent) // hold
    wanted = {"served": afford, Reason.SPEND_LIMIT_REACHED.value: _RACERS - afford}
    expect_equal(dict(counts), wanted, f"ends of {_RACERS} calls under a limit on the {name}")
    codes = {end.code for end in ends if end}
    expect_equal(codes, {Code.RESOURCE_EXHAUSTED}, "codes of the refusals")
    named = {end.metadata.get("limit") for end in ends if end}
    expect_equal(named, {limit}, "limits that the refusals name")
    expect_equal(taken, afford * hold, "nanos taken")
    expect_equal(used.spent.nanos, spent + taken, "spent, as the limit says")
    trial.show(
        f"limit on the {name}, {_RACERS} at once over {len(buyer.endpoints)} gateways: exactly"
        f" {afford} served, {counts[Reason.SPEND_LIMIT_REACHED.value]} refused"
    )


async def _race_once(tenant: Tenant, ids: list[int], number: int) -> Refusal | None:
    """Every other call is a stream."""
    spec = exact_spec(tenant, ids, 50, number + 1)
    return await _attempt(tenant, spec, is_stream=bool(number % 2))


async def _attempt(tenant: Tenant, spec: Spec, *, is_stream: bool) -> Refusal | None:
    """One call; None when it was served."""
    try:
        if is_stream:
            await tenant.read(spec)
        else:
            await tenant.generate(spec)
    except Refusal as refusal:
        return refusal
    return None


async def rates_are_kept(trial: Trial) -> None:
    """B-8: requests, tokens and concurrency; unary and stream alike; refusals cost nothing."""
    await _tokens_in_a_minute(trial)
    await _refused_for_concurrency(trial)


async def _tokens_in_a_minute(trial: Trial) -> None:
    async with customer(trial) as buyer, buyer.callers() as tenants:
        ids = await prompt_ids(tenants[0])
        rate = limits.RateLimit(output_tokens_per_minute=100)
        limit = await buyer.limit(buyer.key.name, rate)
        ends = await asyncio.gather(*(_sixty(tenants[n % len(tenants)], ids, n) for n in range(5)))
        served = sum(end is None for end in ends)
        for end in ends:
            if end is not None:
                end.expect(Code.RESOURCE_EXHAUSTED, Reason.RATE_LIMIT_REACHED, "too many tokens")
                expect_equal(end.metadata.get("limit"), limit, "limit of a refusal")
        expect_equal(served, 1, "of 5 calls of 60 tokens, with 100 a minute")
        trial.show(
            f"100 tokens a minute, 5 calls of 60 at once, streams and unary, over {len(tenants)}"
            " gateways: 1 served"
        )


async def _sixty(tenant: Tenant, ids: list[int], number: int) -> Refusal | None:
    """Sixty tokens; every other call is a stream."""
    spec = exact_spec(tenant, ids, 60, number + 1)
    return await _attempt(tenant, spec, is_stream=bool(number % 2))


async def _refused_for_concurrency(trial: Trial) -> None:
    """Five requests a minute, one at a time: refusals for the second do not use up the five."""
    async with customer(trial) as buyer, buyer.caller() as tenant:
        ids = await prompt_ids(tenant)
        rate = limits.RateLimit(requests_per_minute=_LEFT + 1, concurrent_generations=1)
        await buyer.limit(buyer.key.name, rate)
        async with tenant.stream(exact_spec(tenant, ids, 3000)) as reading:
            await reading.until(1)
            for number in range(10):
                end = await _sixty(tenant, ids, number)
                expect(end is not None, "two ran at the same time, where one may")
                assert end is not None
                end.expect(Code.RESOURCE_EXHAUSTED, Reason.RATE_LIMIT_REACHED, "a second one")
                metric = end.metadata.get("metric", "")
                expect("CONCURRENT" in metric, f"refused for {metric}, not for concurrency")
            reading.cancel()
        served, metric = await _until_refused(tenant, ids)
    # One ran; a request flows back every 12 s.
    expect(0 <= served - _LEFT <= 1, f"{served} more requests served, where {_LEFT} were left")
    expect("REQUESTS" in metric, f"then refused for {metric}, not for requests")
    trial.show(
        f"5 requests a minute, one at a time: after 10 refusals for concurrency {served} more"
        " served, the next refused for requests"
    )


async def _until_refused(tenant: Tenant, ids: list[int]) -> tuple[int, str]:
    """Asks one after the other; how many are served until one is refused for requests."""
    served, metric = 0, ""
    spec = exact_spec(tenant, ids, 2)

    async def is_refused() -> bool:
        nonlocal served, metric
        try:
            await tenant.generate(spec)
        except Refusal as refusal:
            refusal.expect(Code.RESOURCE_EXHAUSTED, Reason.RATE_LIMIT_REACHED, "one too many")
            metric = refusal.metadata.get("metric", "")
            # The place of what was just cancelled comes back in a moment.
            return "CONCURRENT" not in metric
        served += 1
        return served > 2 * _LEFT

    await operator.within(operator.REST_S, is_refused)
    return served, metric


async def retry_info_comes_true(trial: Trial) -> None:
    """B-9: who waits as long as the refusal says is served; what never fits says no time."""
    async with customer(trial) as buyer, buyer.caller() as tenant:
        ids = await prompt_ids(tenant)
        waits = []
        # 20 tokens flow back each second; the limit is of another key for each way to ask.
        for number in range(2):
            key = await buyer.new_key()
            rate = limits.RateLimit(output_tokens_per_minute=1200)
            await buyer.limit(key.name, rate)
            async with buyer.caller(key) as limited:
                waits.append(await _come_back(limited, ids, number))
                await _never_fits(limited, exact_spec(limited, ids, 1201))
        trial.show(
            f"refused for {waits[0]:.2f} s (unary) and {waits[1]:.2f} s (stream), then served;"
            " LARGER_THAN_LIMIT without a time"
        )
        await _never(trial, buyer, tenant, ids)


async def _never_fits(tenant: Tenant, spec: Spec) -> None:
    larger = await refused(tenant, spec, "more than a limit ever allows")
    larger.expect(Code.INVALID_ARGUMENT, Reason.LARGER_THAN_LIMIT, "more than a limit ever allows")
    expect(larger.retry_s is None, "what never fits is told to come back")


async def _come_back(tenant: Tenant, ids: list[int], number: int) -> float:
    """Uses the limit up, is refused, waits as told, is served; seconds that it was told."""
    async with tenant.stream(exact_spec(tenant, ids, 1195)) as reading:
        await reading.until(1)
        spec = exact_spec(tenant, ids, 30)
        end = await _attempt(tenant, spec, is_stream=bool(number))
        if end is None:
            raise Mismatch("30 more tokens were served, where 5 were left")
        end.expect(Code.RESOURCE_EXHAUSTED, Reason.RATE_LIMIT_REACHED, "no tokens left")
        if end.retry_s is None:
            raise Mismatch("a refusal for a rate has no RetryInfo")
        expect(0 < end.retry_s <= 1.25 + _SLACK_S, f"told to wait {end.retry_s} s for 25 tokens")
        await asyncio.sleep(end.retry_s)
        again = await _attempt(tenant, spec, is_stream=bool(number))
        if again is not None:
            raise Mismatch(f"refused after the {end.retry_s:g} s that it was told: {again}")
        return end.retry_s


async def _never(trial: Trial, buyer: Customer, tenant: Tenant, ids: list[int]) -> None:
    """A spend limit below the hold says no time; one that is used up says the next window."""
    spec = exact_spec(tenant, ids, 20)
    hold = (await tenant.quote(spec)).hold.nanos
    spend = limits.SpendLimit(amount=usd(hold - 1), window=limits.SPEND_WINDOW_DAY)
    key = await buyer.new_key()
    await buyer.limit(key.name, spend)
    async with buyer.caller(key) as limited:
        end = await refused(limited, spec, "a spend limit below the hold")
    end.expect(Code.RESOURCE_EXHAUSTED, Reason.SPEND_LIMIT_REACHED, "a spend limit")
    expect(end.retry_s is None, "a spend limit that has never room says when to come back")
    key = await buyer.new_key()
    spend = limits.SpendLimit(amount=usd(hold), window=limits.SPEND_WINDOW_DAY)
    await buyer.limit(key.name, spend)
    async with buyer.caller(key) as limited:
        await limited.generate(spec)
        end = await refused(limited, spec, "a spend limit that is used up")
    end.expect(Code.RESOURCE_EXHAUSTED, Reason.SPEND_LIMIT_REACHED, "a spend limit")
    expect(end.retry_s is not None, "a spend limit that is used up does not say until when")
    assert end.retry_s is not None
    expect(0 < end.retry_s <= _DAY_S, f"a day's limit comes back in {end.retry_s:g} s")
    trial.show("a spend limit names the end of its window, or no time where it never fits")


async def alerts_come_once(trial: Trial) -> None:
    """B-11: each threshold gives one event a window, however many requests cross it."""
    async with customer(trial) as buyer, buyer.caller() as tenant:
        ids = await prompt_ids(tenant)
        hold = (await tenant.quote(exact_spec(tenant, ids, 20))).hold.nanos
        spend = limits.SpendLimit(
            amount=usd(20 * hold), window=limits.SPEND_WINDOW_MONTH, alert_percents=[50, 80, 100]
        )
        limit = await buyer.limit(buyer.key.name, spend)

        async def spend_for(count: int) -> None:
            specs = [exact_spec(tenant, ids, 20, number + 1) for number in range(count)]
            answers = await asyncio.gather(*(tenant.generate(spec) for spec in specs))
            for answer in answers:
                await buyer.books.record(answer.generation_id)

        await spend_for(8)
        expect_equal(await buyer.alerts(limit), [], "alerts at 40 percent")
        await spend_for(9)
        alerts = await buyer.alerts(limit)
        expect_equal([alert.percent for alert in alerts], [50, 80], "alerts at 85 percent")
        await spend_for(2)
        expect_equal(await buyer.alerts(limit), alerts, "alerts at 95 percent")
        for alert in alerts:
            share = alert.spent.nanos * 100 / (20 * hold)
            is_between = alert.percent <= share <= _REACHED_PERCENT
            expect(is_between, f"{alert.percent} percent alerted at {share:.1f}")
        trial.show("no alert at 40 %, one for 50 and one for 80 at 85 %, no more at 95 %")
