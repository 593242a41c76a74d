"""Limits: made, changed, deleted, listed, watched."""

from __future__ import annotations

import asyncio

from maas.billing.v1 import limit_service_pb2 as limit_pb

from libs.errors import AlreadyExists, InvalidArgument, NotFound, Reason
from libs.testing.rpc import ALLOWED, outcomes
from tests.integration.services.billing.limiting import (
    create,
    delete,
    rate,
    read,
    refusal,
    spend,
    update,
)
from tests.integration.services.billing.world import GATEWAY_TOKEN, SERVICES, Billing, usd

INTERNAL_METHODS = {"WatchLimits", "TakeQuota", "GiveBackQuota", "HoldPlaces"}


async def test_created_limits_are_read_as_they_were_given(billing: Billing) -> None:
    await billing.open_account()
    made = await create(billing, spend(500, alerts=(80, 50, 80)), "money")
    pace = await create(
        billing, rate(requests=7, input_tokens=100, output_tokens=10**11, concurrent=3), "pace"
    )

    assert made.name == "limits/money"
    assert list(made.spend.alert_percents) == [50, 80]
    assert (await read(billing, "money")).limit == made
    assert (await read(billing, "pace")).limit == pace
    assert pace.rate.output_tokens_per_minute == 10**11
    assert pace.rate.concurrent_generations == 3
    assert (await read(billing, "money")).usage.window_end_time.seconds > 0


async def test_what_a_rate_limit_does_not_say_is_not_limited(billing: Billing) -> None:
    await billing.open_account()

    pace = await create(billing, rate(requests=7))

    assert not pace.rate.HasField("input_tokens_per_minute")
    assert not pace.rate.HasField("concurrent_generations")


async def test_creating_a_limit_again_returns_it_and_other_content_is_refused(
    billing: Billing,
) -> None:
    await billing.open_account()
    first = await create(billing, spend(500))
    billing.clock.advance(60)

    assert await create(billing, spend(500)) == first
    error = await refusal(create(billing, spend(501)))
    assert isinstance(error, AlreadyExists)
    assert error.metadata == {"resource": "limits/cap"}


async def test_limit_of_an_account_that_is_not_there_is_refused(billing: Billing) -> None:
    for account in ("accounts/acme", "accounts/system-revenue"):
        error = await refusal(create(billing, spend(1, account=account, scope=account)))

        assert isinstance(error, NotFound)
        assert error.metadata == {"resource": account}


BAD_LIMITS = [
    (spend(1, account="acme"), "limit.account"),
    (spend(1, account=""), "limit.account"),
    (spend(1, scope=""), "limit.scope"),
    (spend(1, scope="models/tiny"), "limit.scope"),
    (spend(1, scope="projects/a/b"), "limit.scope"),
    (spend(1, scope="accounts/other"), "limit.scope"),
    (spend(-1), "limit.spend.amount.nanos"),
    (spend(1, alerts=(50, 0)), "limit.spend.alert_percents[1]"),
    (spend(1, alerts=(101,)), "limit.spend.alert_percents[0]"),
    (spend(1, alerts=tuple(range(1, 10))), "limit.spend.alert_percents"),
    (spend(1, window=limit_pb.SPEND_WINDOW_UNSPECIFIED), "limit.spend.window"),
    (rate(), "limit.rate"),
    (rate(requests=0), "limit.rate.requests_per_minute"),
    (rate(output_tokens=10**11 + 1), "limit.rate.output_tokens_per_minute"),
    (limit_pb.Limit(account="accounts/acme", scope="accounts/acme"), "limit.spend"),
]


async def test_bad_limits_are_refused_with_their_paths(billing: Billing) -> None:
    await billing.open_account()

    for limit, field in BAD_LIMITS:
        error = await refusal(create(billing, limit))
        assert isinstance(error, InvalidArgument), field
        assert [item.field for item in error.violations] == [field]


async def test_amounts_are_in_the_currency_of_the_ledger(billing: Billing) -> None:
    await billing.open_account()
    limit = spend(1)
    limit.spend.amount.currency_code = "EUR"

    assert (await refusal(create(billing, limit))).reason is Reason.CURRENCY_MISMATCH


async def test_scope_has_seven_limits_at_most(billing: Billing) -> None:
    await billing.open_account()
    for number in range(7):
        await create(billing, rate(requests=number + 1), f"pace-{number}")

    error = await refusal(create(billing, rate(requests=1), "more"))
    await create(billing, spend(1, scope="projects/demo"), "other-scope")
    await delete(billing, "pace-3")
    await create(billing, rate(requests=1), "more")

    assert isinstance(error, InvalidArgument)
    assert error.metadata == {"field": "limit.scope"}


async def test_update_replaces_what_is_allowed_and_nothing_else(billing: Billing) -> None:
    await billing.open_account()
    await create(billing, rate(requests=7, concurrent=3))

    changed = await update(
        billing,
        limit_pb.Limit(name="limits/cap", rate=limit_pb.RateLimit(requests_per_minute=9)),
    )

    assert (changed.account, changed.scope) == ("accounts/acme", "accounts/acme")
    assert changed.rate == limit_pb.RateLimit(requests_per_minute=9)
    assert (await read(billing)).limit == changed


async def test_kind_never_changes(billing: Billing) -> None:
    await billing.open_account()
    await create(billing, rate(requests=7))

    kind = await refusal(update(billing, spend(1, name="limits/cap")))
    name = await refusal(update(billing, rate(requests=1, name="cap")))

    assert kind.metadata == {"field": "limit.spend"}
    assert name.metadata == {"field": "limit.name"}


async def test_scope_and_account_never_change(billing: Billing) -> None:
    await billing.open_account()
    await billing.open_account(account_id="other")
    await create(billing, spend(5, scope="projects/demo"))

    scope = await refusal(update(billing, spend(5, scope="projects/x", name="limits/cap")))
    account = await refusal(
        update(
            billing,
            spend(5, account="accounts/other", scope="projects/demo", name="limits/cap"),
        )
    )

    assert scope.metadata == {"field": "limit.scope"}
    assert account.metadata == {"field": "limit.account"}


async def test_deleted_limit_is_gone_and_its_name_is_free(billing: Billing) -> None:
    await billing.open_account()
    await create(billing, spend(5))
    await delete(billing)
    await delete(billing)

    for call in (
        read(billing),
        update(billing, spend(6, name="limits/cap")),
        delete(billing, "never-there"),
    ):
        assert isinstance(await refusal(call), NotFound)
    assert (await create(billing, rate(requests=1))).rate.requests_per_minute == 1


async def test_tenants_see_the_limits_of_their_organization_only(billing: Billing) -> None:
    await billing.open_account()
    await billing.open_account(account_id="other")
    await create(billing, spend(1, scope="projects/demo"), "mine")
    await create(billing, spend(1, account="accounts/other", scope="apiKeys/k"), "theirs")

    async def listed(client: object, parent: str = "") -> list[str]:
        caller = billing.admin if client == "admin" else billing.tenant
        response = await caller.peer.call(
            caller.limits.ListLimits, limit_pb.ListLimitsRequest(parent=parent)
        )
        return [limit.name for limit in response.limits]

    assert await listed("tenant") == ["limits/mine"]
    assert await listed("admin") == ["limits/mine", "limits/theirs"]
    assert await listed("admin", "accounts/other") == ["limits/theirs"]
    assert isinstance(await refusal(listed("tenant", "accounts/other")), NotFound)
    assert isinstance(await refusal(read(billing, "theirs")), NotFound)


async def test_pages_of_limits_skip_none(billing: Billing) -> None:
    await billing.open_account()
    for number in range(5):
        await create(billing, spend(1, scope=f"projects/p{number}"), f"l{number}")

    names: list[str] = []
    token = ""
    for _ in range(3):
        response = await billing.tenant.peer.call(
            billing.tenant.limits.ListLimits,
            limit_pb.ListLimitsRequest(page_size=2, page_token=token),
        )
        names += [limit.name for limit in response.limits]
        token = response.next_page_token

    assert names == [f"limits/l{number}" for number in range(5)]
    assert token == ""


async def test_watch_lists_all_then_tells_every_change(billing: Billing) -> None:
    await billing.open_account()
    await create(billing, spend(1), "first")
    watch = billing.gateway.limits.WatchLimits

    async with (
        asyncio.timeout(10),
        billing.gateway.peer.stream(watch, limit_pb.WatchLimitsRequest()) as stream,
    ):
        snapshot = await stream.read()
        assert isinstance(snapshot, limit_pb.WatchLimitsResponse)
        assert snapshot.snapshot_complete
        assert [limit.name for limit in snapshot.limits] == ["limits/first"]
        await create(billing, rate(requests=1), "second")
        await update(billing, spend(2, name="limits/first"))
        await delete(billing, "second")
        seen: list[tuple[str, int, bool]] = []
        while len(seen) < 2 or not seen[-1][2]:
            response = await stream.read()
            assert isinstance(response, limit_pb.WatchLimitsResponse)
            seen += [(item.name, item.spend.amount.nanos, item.deleted) for item in response.limits]

    assert ("limits/first", 2, False) in seen
    assert seen[-1] == ("limits/second", 0, True)


async def test_only_gateways_reach_what_is_for_gateways(billing: Billing) -> None:
    limits = [service for service in SERVICES if service.name in {"LimitService", "QuotaService"}]

    def refused(got: dict[str, str]) -> set[str]:
        return {name for name, outcome in got.items() if outcome != ALLOWED}

    found = {}
    for name, credential in {"gateway": GATEWAY_TOKEN, "nobody": None}.items():
        got = await outcomes(billing.endpoint, limits, credential)
        found[name] = refused({method.name: outcome for method, outcome in got.items()})

    every = {method.name for service in limits for method in service.methods}
    assert found["nobody"] == every
    assert found["gateway"] == every - INTERNAL_METHODS


async def test_tenants_cannot_make_limits(billing: Billing) -> None:
    async def make() -> None:
        await billing.tenant.peer.call(
            billing.tenant.limits.CreateLimit,
            limit_pb.CreateLimitRequest(limit_id="x", limit=spend(1)),
        )

    assert (await refusal(make())).reason is Reason.PERMISSION_DENIED


async def test_limit_of_nothing_is_allowed(billing: Billing) -> None:
    await billing.open_account()

    assert (await create(billing, spend(0))).spend.amount == usd(0)
