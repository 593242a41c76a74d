"""A spend limit knows what was spent and set aside in its window before it was made."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from maas.billing.v1 import account_service_pb2 as account_pb
from maas.billing.v1 import limit_service_pb2 as limit_pb

from libs.errors import Reason
from services.billing.limits import Limit, Scope, ScopeKind, Span, SpendLimit
from services.billing.store.opening import count_spent
from tests.integration.services.billing.audit import count_waiting
from tests.integration.services.billing.limiting import (
    acquire,
    alerts,
    create,
    delete,
    refusal,
    set_all_clocks,
    set_lease_time,
    spend,
    update,
    used,
)
from tests.integration.services.billing.signing import reconcile
from tests.integration.services.billing.world import GRACE_S, LEASE_S, Billing, settlement

MONTH = limit_pb.SPEND_WINDOW_MONTH
# The day that only leap years have, far enough ahead for clocks that only go forward.
NOON = datetime(2048, 2, 29, 12, tzinfo=UTC)


async def charge(
    billing: Billing,
    name: str,
    nanos: int,
    *,
    project: str = "projects/demo",
    slice_id: str = "gone",
) -> None:
    await billing.settle(settlement(name, slice_id=slice_id, tokens=nanos, project=project))


async def all_holds(billing: Billing) -> None:
    """The auditor finds windows to be what slices and records say."""
    violations, _ = await reconcile(billing)
    assert violations == []


async def with_history(billing: Billing) -> None:
    """1000 spent before February, 200 on its first, 30 and 4 since this midnight. It is noon."""
    await billing.open_account(10_000)
    first = NOON.replace(day=1, hour=0)
    await set_all_clocks(billing, first - timedelta(seconds=1))
    await charge(billing, "gen_january", 1000)
    await set_all_clocks(billing, first)
    await charge(billing, "gen_first", 200)
    await set_all_clocks(billing, NOON.replace(hour=0))
    await charge(billing, "gen_midnight", 30)
    await charge(billing, "gen_other", 4, project="projects/other")
    await set_all_clocks(billing, NOON)


async def test_limit_knows_what_was_spent_since_its_window_began(billing: Billing) -> None:
    await with_history(billing)

    await create(billing, spend(100), "day")
    await create(billing, spend(500, window=MONTH), "month")
    await create(billing, spend(100, scope="projects/demo"), "project")
    await create(billing, spend(100, scope="apiKeys/key"), "key")
    await create(billing, spend(100, scope="projects/none"), "none")

    assert await used(billing, "day") == (34, 0)
    assert await used(billing, "month") == (234, 0)
    assert await used(billing, "project") == (30, 0)
    assert await used(billing, "key") == (34, 0)
    assert await used(billing, "none") == (0, 0)
    assert (await acquire(billing, "s1", 500)).granted_nanos == 66
    await all_holds(billing)


async def test_limit_that_is_used_up_when_it_is_made_lets_nothing_in(billing: Billing) -> None:
    await with_history(billing)
    await create(billing, spend(34, alerts=(50, 100)))

    error = await refusal(acquire(billing, "s1", 1, required=1))

    assert error.reason is Reason.SPEND_LIMIT_REACHED
    assert error.metadata["availableNanos"] == "0"
    # No charge comes any more that could tell it.
    assert await alerts(billing) == [("limits/cap", 50, 34), ("limits/cap", 100, 34)]


async def test_refund_gives_no_room_back(billing: Billing) -> None:
    """It is credit of the account: neither a limit that is there nor a later one counts it."""
    await with_history(billing)
    await create(billing, spend(100), "before")
    await billing.admin.peer.call(
        billing.admin.accounts.RefundUsage,
        account_pb.RefundUsageRequest(
            usage_record="accounts/acme/usageRecords/gen_midnight", request_id="sorry"
        ),
    )

    await create(billing, spend(100), "after")

    assert await used(billing, "before") == await used(billing, "after") == (34, 0)


async def test_next_window_of_a_limit_begins_empty(billing: Billing) -> None:
    await with_history(billing)
    await create(billing, spend(100), "day")
    await create(billing, spend(500, window=MONTH), "month")

    await set_all_clocks(billing, NOON.replace(hour=0) + timedelta(days=1))

    assert await used(billing, "day") == (0, 0)
    assert await used(billing, "month") == (0, 0)


async def test_what_runs_when_a_limit_is_made_is_held_in_it(billing: Billing) -> None:
    await with_history(billing)
    await acquire(billing, "s1", 50)
    await charge(billing, "gen_1", 10, slice_id="s1")

    await create(billing, spend(100))

    assert await used(billing) == (44, 40)
    assert (await refusal(acquire(billing, "s2", 17, required=17))).metadata["availableNanos"] == (
        "16"
    )
    await charge(billing, "gen_2", 15, slice_id="s1")
    assert await used(billing) == (59, 25)
    await all_holds(billing)
    await billing.close("s1")
    assert await used(billing) == (59, 0)


async def test_slices_of_a_project_are_held_in_a_second_limit_of_it(billing: Billing) -> None:
    await with_history(billing)
    await create(billing, spend(100, scope="projects/demo"), "day")
    await acquire(billing, "s1", 50, project="projects/demo")
    await acquire(billing, "s2", 50, project="projects/other")
    await acquire(billing, "s3", 50)

    await create(billing, spend(900, scope="projects/demo", window=MONTH), "month")

    assert await used(billing, "month") == (230, 50)
    await charge(billing, "gen_1", 15, slice_id="s1")
    # What another slice pays for the project counts when it is settled.
    await charge(billing, "gen_2", 20, slice_id="s3")
    assert await used(billing, "month") == (265, 35)
    await all_holds(billing)


async def test_limit_with_another_span_counts_the_window_of_that(billing: Billing) -> None:
    await with_history(billing)
    await create(billing, spend(100))
    await acquire(billing, "s1", 60)

    await update(billing, spend(500, window=MONTH, name="limits/cap"))
    assert await used(billing) == (234, 60)
    await charge(billing, "gen_1", 20, slice_id="s1")
    assert await used(billing) == (254, 40)
    await all_holds(billing)
    await update(billing, spend(500, name="limits/cap"))

    assert await used(billing) == (54, 40)
    await all_holds(billing)
    await billing.close("s1")
    assert await used(billing) == (54, 0)


async def test_late_charge_after_a_change_of_the_span_counts_in_what_runs(
    billing: Billing,
) -> None:
    await with_history(billing)
    await create(billing, spend(100))
    await acquire(billing, "s1", 60)
    await billing.close("s1")
    await update(billing, spend(500, window=MONTH, name="limits/cap"))

    await charge(billing, "gen_late", 6, slice_id="s1")

    assert await used(billing) == (240, 0)
    await all_holds(billing)


async def test_deleted_limit_limits_nothing_and_one_of_its_name_tells_nothing_twice(
    billing: Billing,
) -> None:
    await with_history(billing)
    await create(billing, spend(100, alerts=(50, 80)))
    await acquire(billing, "s1", 66)
    await charge(billing, "gen_1", 30, slice_id="s1")
    await delete(billing)
    assert (await acquire(billing, "s2", 500)).granted_nanos == 500
    await billing.close("s1", "s2")

    await create(billing, spend(100, alerts=(50, 80)))

    assert await used(billing) == (64, 0)
    await charge(billing, "gen_2", 20)
    assert await alerts(billing) == [("limits/cap", 50, 64), ("limits/cap", 80, 84)]


async def test_alerts_of_a_day_and_of_a_month_that_begin_together_are_two(
    billing: Billing,
) -> None:
    """Nor has an account those that another one's limit of the name told."""
    await billing.open_account(1000)
    await billing.open_account(1000, "other")
    await set_all_clocks(billing, NOON.replace(day=1))
    await create(billing, spend(100, alerts=(50,)))
    await charge(billing, "gen_1", 60)

    await update(billing, spend(1000, window=MONTH, alerts=(50,), name="limits/cap"))
    await charge(billing, "gen_2", 440)
    await update(billing, spend(1000, alerts=(50,), name="limits/cap"))
    assert await alerts(billing) == [("limits/cap", 50, 60), ("limits/cap", 50, 500)]
    await delete(billing)
    other = "accounts/other"
    await create(billing, spend(100, alerts=(50,), account=other, scope=other))
    await billing.settle(settlement("gen_3", slice_id="gone", tokens=70, account=other))

    found = await billing.stranger.peer.call(
        billing.stranger.limits.ListSpendAlerts, limit_pb.ListSpendAlertsRequest()
    )
    assert [item.spent.nanos for item in found.spend_alerts] == [70]


async def test_lowered_limit_tells_at_once_what_it_crossed(billing: Billing) -> None:
    await with_history(billing)
    await create(billing, spend(1000, alerts=(80,)))
    assert await alerts(billing) == []

    await update(billing, spend(40, alerts=(80,), name="limits/cap"))
    await update(billing, spend(35, alerts=(80,), name="limits/cap"))
    await charge(billing, "gen_1", 1)

    assert await alerts(billing) == [("limits/cap", 80, 34)]


async def test_lowered_limit_tells_nothing_of_windows_that_are_over(billing: Billing) -> None:
    await with_history(billing)
    await create(billing, spend(1000, alerts=(80,)))
    await charge(billing, "gen_1", 100)
    await set_all_clocks(billing, NOON + timedelta(days=1))
    await charge(billing, "gen_2", 20)

    await update(billing, spend(25, alerts=(80,), name="limits/cap"))

    assert await alerts(billing) == [("limits/cap", 80, 20)]


async def test_alert_that_the_version_before_told_is_not_told_again(billing: Billing) -> None:
    """It knew no span, and where it counted from was another place."""
    await with_history(billing)
    await create(billing, spend(100, alerts=(50, 80)))
    await billing.connection.execute(
        """
        INSERT INTO spend_alert (
            number, limit_id, account_id, percent, window_start, counted_after, spent, create_time
        )
        VALUES (7, 'cap', 'acme', 50, $1, 3, 50, $1)
        """,
        NOON.replace(hour=0),
    )

    await charge(billing, "gen_1", 60)

    assert await alerts(billing) == [("limits/cap", 50, 50), ("limits/cap", 80, 94)]


async def test_slice_whose_lease_ran_out_is_held_until_the_grace_is_over(billing: Billing) -> None:
    await with_history(billing)
    await acquire(billing, "s1", 50)
    await billing.pass_lease_time(LEASE_S + 1)
    await billing.sweep()

    await create(billing, spend(100))

    assert await used(billing) == (34, 50)
    await billing.pass_lease_time(GRACE_S + 1)
    await billing.sweep()
    assert await used(billing) == (34, 0)
    await all_holds(billing)


async def test_limit_that_may_tell_alerts_waits_for_who_numbers_them(billing: Billing) -> None:
    """Numbers are given under the lock of the head, whichever account they are of."""
    await with_history(billing)
    await create(billing, spend(1000, alerts=(80,)), "changed")
    settling = await asyncpg.connect(billing.dsn, server_settings={"search_path": "billing"})
    async with settling.transaction():
        await settling.execute("SELECT FROM ledger_head FOR UPDATE")
        beginning = [
            asyncio.create_task(create(billing, spend(34, alerts=(50,)), "new")),
            asyncio.create_task(update(billing, spend(34, alerts=(50,), name="limits/changed"))),
        ]
        while await count_waiting(billing.connection) < len(beginning):
            assert not any(task.done() for task in beginning)
        await settling.execute(
            "INSERT INTO spend_alert VALUES (1, 'theirs', 'other', 50, now(), 0, 1, now(), 'day')"
        )
    await settling.close()
    await asyncio.gather(*beginning)

    assert sorted(await alerts(billing)) == [("limits/changed", 50, 34), ("limits/new", 50, 34)]


async def test_nothing_is_lost_or_doubled_by_charges_of_the_same_moment(billing: Billing) -> None:
    """Limits begin while charges are settled: each ends with the sum of all."""
    await with_history(billing)

    async def settle_some(first: int) -> None:
        for number in range(first, first + 15):
            await charge(billing, f"gen_{number}", number)

    async def begin(limit_id: str, scope: str) -> None:
        for number in range(4):
            limit = spend(10_000 + number, scope=scope)
            await create(billing, limit, limit_id)
            limit.name = f"limits/{limit_id}"
            limit.spend.window = MONTH
            await update(billing, limit)
            limit.spend.window = limit_pb.SPEND_WINDOW_DAY
            await update(billing, limit)
            if number < 3:
                await delete(billing, limit_id)

    await asyncio.gather(
        settle_some(0),
        settle_some(100),
        settle_some(200),
        begin("account", "accounts/acme"),
        begin("project", "projects/demo"),
    )

    total = sum(sum(range(first, first + 15)) for first in (0, 100, 200))
    assert await used(billing, "account") == (34 + total, 0)
    assert await used(billing, "project") == (30 + total, 0)
    await all_holds(billing)


@pytest.mark.parametrize("size", [1, 2, 100])
async def test_count_in_pages_is_gone_on_with_under_the_lock(billing: Billing, size: int) -> None:
    await with_history(billing)
    limit = Limit(
        limit_id="cap",
        account_id="acme",
        scope=Scope(ScopeKind.PROJECT, "demo"),
        kind=SpendLimit(amount=1, span=Span.MONTH),
        create_time=NOON,
    )
    async with billing.database.transaction() as connection:
        ahead = await count_spent(connection, limit, size=size)
    await charge(billing, "gen_1", 5)
    async with billing.database.transaction() as connection:
        found = await count_spent(connection, limit, ahead, size=size)
    assert (ahead.spent, found.spent) == (230, 235)
    assert ahead.counted_after == found.counted_after == 1

    # In the window after it nothing of that is left.
    await set_lease_time(billing, NOON + timedelta(days=2))
    async with billing.database.transaction() as connection:
        fresh = await count_spent(connection, limit, ahead, size=size)
    assert (fresh.spent, fresh.counted_after) == (0, found.last)


async def test_records_of_a_replica_with_a_slow_clock_are_counted(billing: Billing) -> None:
    """The first record of the window by time is not the first by number."""
    await billing.open_account(1000)
    midnight = NOON.replace(hour=0)
    await set_all_clocks(billing, midnight + timedelta(seconds=20))
    await charge(billing, "gen_1", 5)
    billing.advance(-15)
    await charge(billing, "gen_2", 7)
    billing.advance(-10)
    await charge(billing, "gen_3", 9)
    await set_all_clocks(billing, NOON)

    await create(billing, spend(100))

    # A charge of the last moment of yesterday that stands behind those of today counts with them.
    assert await used(billing) == (21, 0)
    await all_holds(billing)
