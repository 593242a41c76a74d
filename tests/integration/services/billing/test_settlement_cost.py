"""What a batch of settlements reads and writes does not grow with what is there already."""

from __future__ import annotations

from services.billing.store.ledger import CHANGE_POSTED, GRANTS_READ
from tests.integration.services.billing.limiting import acquire, create, spend, used
from tests.integration.services.billing.test_grants import give, limit_credit, listed
from tests.integration.services.billing.test_grants import spend as charge
from tests.integration.services.billing.world import Billing, settlement

NANOS = 10


async def give_many(billing: Billing, count: int) -> list[tuple[str, int]]:
    """Gives grants of 10 nanos, the last first in the order; returns them as they are used up."""
    await billing.open_account()
    for number in range(count):
        await give(billing, f"g-{number}", NANOS, priority=count - number)
    return [(f"g-{number}", NANOS) for number in reversed(range(count))]


async def test_charges_use_up_many_grants_in_their_order(billing: Billing) -> None:
    left = await give_many(billing, 2 * GRANTS_READ + 5)
    assert await listed(billing) == left

    # A part of the first grant, then its rest and a part of the second.
    await charge(billing, "a", 4)
    assert await listed(billing) == [(left[0][0], 6), *left[1:]]
    await charge(billing, "b", 7)
    assert await listed(billing) == [(left[1][0], 9), *left[2:]]

    # Down to as many as are read at once, and on.
    await charge(billing, "c", NANOS * (GRANTS_READ + 4) - 1)
    assert await listed(billing) == left[-GRANTS_READ:]
    await charge(billing, "d", NANOS + 1)
    assert await listed(billing) == [(left[-GRANTS_READ + 1][0], 9), *left[-GRANTS_READ + 2 :]]


async def test_a_charge_of_more_grants_than_are_read_at_once_uses_them_all_up(
    billing: Billing,
) -> None:
    left = await give_many(billing, 3 * GRANTS_READ)

    await charge(billing, "a", NANOS * (2 * GRANTS_READ + 1) + 3)
    assert await listed(billing) == [(left[2 * GRANTS_READ + 1][0], 7), *left[-GRANTS_READ + 2 :]]


async def test_a_charge_below_zero_leaves_nothing_of_many_grants(billing: Billing) -> None:
    await give_many(billing, 2 * GRANTS_READ)
    await limit_credit(billing, 100)

    await charge(billing, "a", NANOS * 2 * GRANTS_READ + 60)
    assert await listed(billing) == []
    assert await billing.balance() == (-60, 0, 40)
    await give(billing, "late", 100)
    assert await listed(billing) == [("late", 40)]


async def test_many_grants_that_expire_are_taken_once(billing: Billing) -> None:
    await billing.open_account(1)
    for number in range(GRANTS_READ + 2):
        await give(billing, f"g-{number}", NANOS, life_s=60 if number < 2 else 9000)
    await billing.pass_lease_time(600)

    await billing.sweep()

    assert await billing.balance() == (1 + NANOS * GRANTS_READ, 0, 1 + NANOS * GRANTS_READ)
    assert len(await listed(billing)) == GRANTS_READ + 1


async def test_the_first_grants_are_found_without_reading_the_others(billing: Billing) -> None:
    await give_many(billing, 2)
    await billing.connection.execute(
        f"""
        SET plan_cache_mode = force_generic_plan;
        SET enable_seqscan = off;
        SET enable_bitmapscan = off;
        PREPARE change_posted (text[], bigint[], bigint[], bigint) AS {CHANGE_POSTED};
        """
    )
    rows = await billing.connection.fetch(
        "EXPLAIN (COSTS OFF) EXECUTE change_posted ('{acme}', '{-5}', '{0}', 16)"
    )

    plan = [row[0].strip() for row in rows]
    limit = plan.index("->  Limit")
    assert plan[limit + 1] == "->  Index Scan using credit_grant_in_order on credit_grant"


async def test_a_batch_changes_each_window_of_a_spend_limit_once(billing: Billing) -> None:
    """Each further change of a row in one transaction bloats its page and its index."""
    await billing.open_account(1000)
    await create(billing, spend(500), "account")
    await create(billing, spend(300, scope="projects/demo"), "project")
    for slice_id in ("s1", "s2"):
        await acquire(billing, slice_id, 100, project="projects/demo")
    await billing.connection.execute(
        """
        CREATE TABLE change (limit_id text NOT NULL);
        CREATE FUNCTION note_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO change VALUES (NEW.limit_id);
            RETURN NEW;
        END
        $$;
        CREATE TRIGGER note BEFORE UPDATE ON spend_window
            FOR EACH ROW EXECUTE FUNCTION note_change();
        """
    )

    await billing.settle(
        settlement("gen_1", slice_id="s1", tokens=30),
        settlement("gen_2", slice_id="s2", tokens=20),
        settlement("gen_3", slice_id="s1", tokens=5),
    )

    rows = await billing.connection.fetch("SELECT limit_id FROM change ORDER BY limit_id")
    assert [row["limit_id"] for row in rows] == ["account", "project"]
    assert await used(billing, "account") == (55, 145)
    assert await used(billing, "project") == (55, 145)
