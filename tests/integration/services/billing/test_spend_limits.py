"""Spend limits: what fits into a window is set aside and spent in it, and never more."""

from __future__ import annotations

import asyncio
import contextlib
import random
from datetime import timedelta

import pytest
from maas.billing.v1 import credit_slice_service_pb2 as slice_pb
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import limit_service_pb2 as limit_pb

from libs.errors import MaasError, Reason, ResourceExhausted
from libs.rpc import Peer
from tests.integration.services.billing.audit import audit
from tests.integration.services.billing.limiting import (
    DAY_S,
    acquire,
    alerts,
    at_noon,
    create,
    delete,
    lease_time,
    rate,
    refusal,
    set_lease_time,
    spend,
    update,
    used,
)
from tests.integration.services.billing.world import (
    GATEWAY_TOKEN,
    GRACE_S,
    LEASE_S,
    SERVICES,
    Billing,
    running,
    settlement,
)


async def granted(billing: Billing, slice_id: str, wanted: int, **scope: str) -> int:
    return (await acquire(billing, slice_id, wanted, **scope)).granted_nanos  # type: ignore[arg-type] # texts only


async def settle(
    billing: Billing,
    generation_id: str,
    slice_id: str,
    tokens: int,
    *,
    project: str = "projects/demo",
    end_cause: ledger_pb2.EndCause.ValueType = ledger_pb2.END_CAUSE_COMPLETED,
) -> slice_pb.SettleResponse:
    return await billing.settle(
        settlement(
            generation_id, slice_id=slice_id, tokens=tokens, project=project, end_cause=end_cause
        )
    )


async def test_slice_gets_what_its_windows_have_room_for(billing: Billing) -> None:
    await billing.open_account(1000)
    await create(billing, spend(700), "account")
    await create(billing, spend(300, scope="projects/demo"), "project")
    await create(billing, spend(90, scope="apiKeys/key"), "key")

    assert await granted(billing, "s1", 500, project="projects/demo", api_key="apiKeys/key") == 90
    assert await granted(billing, "s2", 500, project="projects/demo") == 210
    assert await granted(billing, "s3", 500, project="projects/other") == 400
    error = await refusal(acquire(billing, "s4", 5, required=1))

    assert isinstance(error, ResourceExhausted)
    assert error.reason is Reason.SPEND_LIMIT_REACHED
    assert error.metadata["limit"] == "limits/account"
    assert await used(billing, "account") == (0, 700)
    assert await used(billing, "project") == (0, 300)
    assert await used(billing, "key") == (0, 90)
    assert await billing.balance() == (1000, 700, 300)


async def test_refusal_says_when_the_window_ends_and_that_comes_true(billing: Billing) -> None:
    await billing.open_account(1000)
    await create(billing, spend(100))
    await acquire(billing, "s1", 100)
    await settle(billing, "gen_1", "s1", 60)

    error = await refusal(acquire(billing, "s2", 0, required=41))
    assert error.metadata == {
        "limit": "limits/cap",
        "requiredNanos": "41",
        "availableNanos": "0",
        "currency": "USD",
    }
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s <= DAY_S
    await billing.pass_lease_time(error.retry_after_s)
    assert (await acquire(billing, "s2", 0, required=41)).granted_nanos == 41


async def test_more_than_the_whole_amount_is_no_matter_of_waiting(billing: Billing) -> None:
    await billing.open_account(1000)
    await create(billing, spend(100))
    await create(billing, spend(50, window=limit_pb.SPEND_WINDOW_MONTH), "month")

    error = await refusal(acquire(billing, "s1", 0, required=51))

    assert error.reason is Reason.SPEND_LIMIT_REACHED
    assert error.metadata["limit"] == "limits/month"
    assert error.retry_after_s is None


async def test_want_of_credit_is_told_before_a_limit(billing: Billing) -> None:
    await billing.open_account(10)
    await create(billing, spend(100))

    error = await refusal(acquire(billing, "s1", 0, required=11))

    assert error.reason is Reason.INSUFFICIENT_CREDIT


async def test_two_hundred_at_once_over_three_gateways_get_exactly_what_there_is(
    billing: Billing,
) -> None:
    """Room for 17 of them in the project's window, for more in the others."""
    await billing.open_account(100_000)
    await create(billing, spend(5000), "account")
    await create(billing, spend(17 * 10 + 9, scope="projects/demo"), "project")
    await create(billing, spend(300, scope="apiKeys/key"), "key")
    peers = [Peer(billing.endpoint, GATEWAY_TOKEN, SERVICES) for _ in range(3)]

    async def one(number: int) -> int:
        response = await peers[number % 3].call(
            billing.gateway.slices.AcquireSlice,
            slice_pb.AcquireSliceRequest(
                slice_id=f"s{number}",
                account="accounts/acme",
                holder=f"gateway-{number % 3}",
                required_nanos=10,
                wanted_nanos=10,
                project="projects/demo",
                api_key="apiKeys/key",
            ),
            timeout_s=20,
        )
        return response.granted_nanos

    async with peers[0], peers[1], peers[2]:
        results = await asyncio.gather(
            *(one(number) for number in range(200)), return_exceptions=True
        )

    assert [result for result in results if isinstance(result, int)] == [10] * 17
    refused = [result for result in results if isinstance(result, MaasError)]
    assert len(refused) == 183
    assert {error.reason for error in refused} == {Reason.SPEND_LIMIT_REACHED}
    for limit_id in ("account", "project", "key"):
        assert await used(billing, limit_id) == (0, 170)
    await audit(billing.connection)


async def test_settlement_turns_what_is_held_into_spent(billing: Billing) -> None:
    await billing.open_account(1000)
    await create(billing, spend(100))
    await create(billing, spend(100, scope="projects/other"), "elsewhere")
    await acquire(billing, "s1", 80)

    await settle(billing, "gen_1", "s1", 30)
    await settle(billing, "gen_1", "s1", 30)
    await settle(billing, "gen_2", "s1", 20, end_cause=ledger_pb2.END_CAUSE_WORKER_LOST)

    assert await used(billing) == (30, 50)
    assert await used(billing, "elsewhere") == (0, 0)
    await billing.close("s1")
    assert await used(billing) == (30, 0)
    assert await granted(billing, "s2", 500) == 70


async def test_repeated_acquire_holds_once(billing: Billing) -> None:
    await billing.open_account(1000)
    await create(billing, spend(100))

    results = await asyncio.gather(*(granted(billing, "s1", 80) for _ in range(8)))

    assert set(results) == {80}
    assert await used(billing) == (0, 80)


async def test_reclaimed_slice_frees_its_window(billing: Billing) -> None:
    await billing.open_account(1000)
    await create(billing, spend(100, window=limit_pb.SPEND_WINDOW_MONTH))
    await at_noon(billing)
    await acquire(billing, "s1", 100)
    await billing.pass_lease_time(LEASE_S)
    await billing.sweep()
    assert await used(billing) == (0, 100)

    await billing.pass_lease_time(GRACE_S)
    await billing.sweep()

    assert await used(billing) == (0, 0)


async def test_slice_ends_with_its_window_and_its_money_is_spent_in_it(billing: Billing) -> None:
    await billing.open_account(1000)
    await create(billing, spend(100))
    await create(billing, spend(500, window=limit_pb.SPEND_WINDOW_MONTH), "month")
    midnight = await at_noon(billing)
    await set_lease_time(billing, midnight - timedelta(seconds=20))
    first = await acquire(billing, "s1", 100)
    again = await acquire(billing, "s1", 100)

    assert 10 < first.lease_duration.ToNanoseconds() / 1e9 <= 20
    assert 10 < again.lease_duration.ToNanoseconds() / 1e9 <= 20
    expire_time = await billing.connection.fetchval("SELECT expire_time FROM credit_slice")
    assert expire_time > midnight
    await set_lease_time(billing, midnight)
    late = await acquire(billing, "s1", 100)
    assert late.lease_duration.ToNanoseconds() == 0
    await settle(billing, "gen_1", "s1", 30)

    # It counts where it was set aside, and today's window is untouched.
    assert await used(billing) == (0, 0)
    assert await used(billing, "month") == (30, 70)
    yesterday = midnight - timedelta(days=1)
    row = await billing.connection.fetchrow(
        "SELECT spent, held FROM spend_window WHERE limit_id = 'cap' AND window_start = $1",
        yesterday,
    )
    assert tuple(row or ()) == (30, 70)
    assert await granted(billing, "s2", 500) == 100


async def test_what_runs_beyond_its_window_stays_held_as_long_as_it_is_renewed(
    billing: Billing,
) -> None:
    await billing.open_account(100)
    await create(billing, spend(100))
    midnight = await at_noon(billing)
    await set_lease_time(billing, midnight - timedelta(seconds=20))
    await acquire(billing, "s1", 100)

    # A long generation, across midnight and far beyond the grace.
    for _ in range(20):
        await billing.pass_lease_time(45)
        assert list((await billing.settle(renew=("s1",))).lost_slice_ids) == []
        await billing.sweep()

    assert await billing.balance() == (100, 100, 0), "nobody else got the money meanwhile"
    await settle(billing, "gen_1", "s1", 100)
    assert await billing.balance() == (0, 0, 0)
    row = await billing.connection.fetchrow(
        "SELECT spent, held FROM spend_window WHERE window_start = $1", midnight - timedelta(days=1)
    )
    assert tuple(row or ()) == (100, 0)


async def test_slice_of_the_last_moment_lives_long_enough_to_be_of_use(billing: Billing) -> None:
    await billing.open_account(1000)
    await create(billing, spend(100))
    midnight = await at_noon(billing)
    await set_lease_time(billing, midnight - timedelta(seconds=4))

    acquired = await acquire(billing, "s1", 100)
    await set_lease_time(billing, midnight)
    await settle(billing, "gen_1", "s1", 30)

    assert 4.5 < acquired.lease_duration.ToNanoseconds() / 1e9 <= 5
    assert await used(billing) == (0, 0)


async def test_late_settlement_counts_in_the_window_of_its_slice(billing: Billing) -> None:
    """The slice was closed yesterday: nobody refuses the charge, and yesterday has it."""
    await billing.open_account(1000)
    await create(billing, spend(100))
    midnight = await at_noon(billing)
    await acquire(billing, "s1", 100)
    await billing.close("s1")
    await acquire(billing, "s2", 90)
    await set_lease_time(billing, midnight + timedelta(hours=1))

    await settle(billing, "gen_1", "s1", 30)

    assert await used(billing) == (0, 0)
    spent = await billing.connection.fetchval("SELECT spent FROM spend_window")
    assert spent == 30
    assert await billing.balance() == (970, 90, 880)


async def test_charge_without_a_window_counts_in_the_one_that_runs(billing: Billing) -> None:
    """A slice from before the limit, and one of a gateway that did not know of it yet."""
    await billing.open_account(1000)
    await acquire(billing, "s1", 200)
    await settle(billing, "gen_1", "s1", 10)
    await create(billing, spend(100, scope="projects/demo"))

    await settle(billing, "gen_2", "s1", 30)
    await settle(billing, "gen_3", "s1", 5, project="projects/other")

    assert await used(billing) == (30, 0)
    assert await granted(billing, "s2", 500, project="projects/demo") == 70


async def test_lowered_limit_lets_nothing_new_in_and_keeps_what_is_held(billing: Billing) -> None:
    await billing.open_account(1000)
    await create(billing, spend(100))
    await acquire(billing, "s1", 80)

    await update(billing, spend(50, name="limits/cap"))
    await refusal(acquire(billing, "s2", 1, required=1))
    await settle(billing, "gen_1", "s1", 40)
    await billing.close("s1")

    assert await used(billing) == (40, 0)
    assert await granted(billing, "s3", 100) == 10


async def test_each_percentage_is_told_once_in_each_window(billing: Billing) -> None:
    await billing.open_account(10_000)
    await create(billing, spend(200, alerts=(50, 80, 100)))
    midnight = await at_noon(billing)
    await acquire(billing, "s1", 200)
    await settle(billing, "gen_1", "s1", 99)
    assert await alerts(billing) == []

    await settle(billing, "gen_2", "s1", 1)
    await settle(billing, "gen_3", "s1", 70)
    await settle(billing, "gen_4", "s1", 30)
    assert [(percent, spent) for _, percent, spent in await alerts(billing)] == [
        (50, 100),
        (80, 170),
        (100, 200),
    ]
    await set_lease_time(billing, midnight + timedelta(hours=12))
    await acquire(billing, "s2", 200)
    await settle(billing, "gen_5", "s2", 120)

    assert [(percent, spent) for _, percent, spent in (await alerts(billing))[3:]] == [(50, 120)]


async def test_three_replicas_tell_each_percentage_once(billing: Billing) -> None:
    """Charges cross it on all of them at once, while the limit goes up and down."""
    await billing.open_account(10_000)
    await create(billing, spend(1000, alerts=(10, 50, 100)))
    await acquire(billing, "s1", 1000)
    async with running(billing.dsn) as second, running(billing.dsn) as third:
        replicas = [billing, second, third]

        async def charge(number: int) -> None:
            await settle(replicas[number % 3], f"gen_{number}", "s1", 25)

        async def change(number: int) -> None:
            lowered = spend(1000 - number % 2, alerts=(10, 50, 100), name="limits/cap")
            await update(replicas[number % 3], lowered)

        await asyncio.gather(
            *(charge(number) for number in range(40)), *(change(number) for number in range(12))
        )

    told = await alerts(billing)
    assert sorted(percent for _, percent, _ in told) == [10, 50, 100]
    assert [spent for _, _, spent in told] == sorted(spent for _, _, spent in told)


async def test_pages_of_alerts_go_on_behind_the_last_one(billing: Billing) -> None:
    await billing.open_account(1000)
    await create(billing, spend(100, alerts=(10, 20, 30)))
    await acquire(billing, "s1", 100)
    await settle(billing, "gen_1", "s1", 20)

    async def page(token: str) -> limit_pb.ListSpendAlertsResponse:
        return await billing.admin.peer.call(
            billing.admin.limits.ListSpendAlerts,
            limit_pb.ListSpendAlertsRequest(page_size=1, page_token=token),
        )

    first = await page("")
    last = await page(first.next_page_token)
    await settle(billing, "gen_2", "s1", 10)
    more = await page(first.next_page_token)

    assert [item.percent for item in first.spend_alerts] == [10]
    assert last.next_page_token == ""
    assert [item.percent for item in more.spend_alerts] == [20]
    third = await page(more.next_page_token)
    assert [(item.percent, item.spent.nanos) for item in third.spend_alerts] == [(30, 30)]
    theirs = await billing.stranger.peer.call(
        billing.stranger.limits.ListSpendAlerts, limit_pb.ListSpendAlertsRequest()
    )
    assert list(theirs.spend_alerts) == []


async def test_account_without_spend_limits_pays_nothing_for_them(billing: Billing) -> None:
    """The mark at the account says whether anybody has to look."""
    await billing.open_account(1000)
    marks = "SELECT has_spend_limits FROM balance WHERE account_id = 'acme'"
    await create(billing, rate(requests=5), "pace")
    assert not await billing.connection.fetchval(marks)
    await create(billing, spend(100))
    await create(billing, spend(100, scope="projects/demo"), "second")
    await delete(billing)
    assert await billing.connection.fetchval(marks)
    await delete(billing, "second")
    assert not await billing.connection.fetchval(marks)
    assert await granted(billing, "s1", 900) == 900
    assert await billing.connection.fetchval("SELECT count(*) FROM slice_window") == 0


@pytest.mark.parametrize("nanos", [2**63 - 1, 0])
async def test_largest_and_smallest_limits(billing: Billing, nanos: int) -> None:
    await billing.open_account(1000)
    await create(billing, spend(nanos, alerts=(1, 100)))

    assert await granted(billing, "s1", 500) == min(nanos, 500)
    await settle(billing, "gen_1", "s1", 0)

    assert await alerts(billing) == []


async def test_month_ends_with_its_last_day(billing: Billing) -> None:
    await billing.open_account(1000)
    await create(billing, spend(100, window=limit_pb.SPEND_WINDOW_MONTH))
    noon_of_the_first = await at_noon(billing) - timedelta(hours=12)

    error = await refusal(acquire(billing, "s1", 0, required=101))
    assert error.retry_after_s is None
    await acquire(billing, "s2", 100)
    error = await refusal(acquire(billing, "s3", 0, required=1))

    end = await lease_time(billing) + timedelta(seconds=error.retry_after_s or 0)
    next_month = (noon_of_the_first + timedelta(days=40)).replace(day=1, hour=0)
    assert abs(end - next_month) < timedelta(seconds=20)


async def test_limits_that_change_while_money_moves_stay_exact(billing: Billing) -> None:
    """Made, changed and deleted under acquires, settlements and closes: audited at the end."""
    await billing.open_account(100_000)
    await create(billing, spend(5000), "stays")

    async def change() -> None:
        for number in range(6):
            await create(billing, spend(400 + number, scope="projects/demo"), "moves")
            await update(billing, spend(300, scope="projects/demo", name="limits/moves"))
            await delete(billing, "moves")

    async def use(number: int) -> None:
        slice_id = f"s{number}"
        with contextlib.suppress(ResourceExhausted):
            await acquire(billing, slice_id, 100, required=20, project="projects/demo")
            await settle(billing, f"gen_{number}", slice_id, 15)
            await billing.close(slice_id)

    await asyncio.gather(change(), *(use(number) for number in range(40)))

    spent, held = await used(billing, "stays")
    assert spent > 0
    assert held == 0


@pytest.mark.parametrize("seed", [1, 2])
async def test_random_histories_leave_every_window_exact(billing: Billing, seed: int) -> None:
    """Audited at its end; and no window ever gets more than its limit had at its highest."""
    chance = random.Random(seed)  # noqa: S311 - not a secret
    await billing.open_account(100_000)
    await at_noon(billing)
    await create(billing, spend(2000, alerts=(50, 100)), "day")
    await create(billing, spend(900, scope="projects/demo"), "project")
    await create(billing, spend(9000, window=limit_pb.SPEND_WINDOW_MONTH), "month")
    slices: list[tuple[str, int]] = []
    for number in range(120):
        match chance.choice(["acquire", "acquire", "settle", "settle", "settle", "close", "wait"]):
            case "acquire":
                project = chance.choice(["projects/demo", "projects/other"])
                # Refused when there is no room.
                with contextlib.suppress(ResourceExhausted):
                    count = await granted(billing, f"s{number}", 300, project=project)
                    slices.append((f"s{number} {project}", count))
            case "settle" if slices:
                place = chance.randrange(len(slices))
                (named, left), tokens = slices[place], chance.randrange(100)
                slice_id, project = named.split()
                await settle(billing, f"gen_{number}", slice_id, min(tokens, left), project=project)
                slices[place] = (named, left - min(tokens, left))
            case "close" if slices:
                named, _ = slices.pop(chance.randrange(len(slices)))
                await billing.close(named.split()[0])
            case _:
                await billing.pass_lease_time(chance.choice([10, 50, GRACE_S, DAY_S / 3]))
                await billing.sweep()
    await audit(billing.connection)

    over = await billing.connection.fetch(
        """
        SELECT limit_id, window_start
          FROM spend_window
          JOIN usage_limit USING (limit_id)
         WHERE spent + held > amount
        """
    )
    spent = await billing.connection.fetchval("SELECT sum(spent) FROM spend_window")
    assert over == []
    assert spent > 0
