"""The real SQL against the reference, by random histories: settlements late, twice, out of order,
on slices that are closed, expired, reclaimed, foreign or unknown; grants that expire while slices
hold them, accounts below zero, refunds."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeVar

import asyncpg
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from typing_extensions import override

from libs import postgres
from libs.config import PostgresSection
from libs.errors import MaasError
from libs.testing import FakeClock
from services.billing.domain import (
    Account,
    EndCause,
    EntryKind,
    GrantKind,
    Posting,
    Price,
    Settlement,
)
from services.billing.grants import Grant, Refund
from services.billing.store import (
    AccountStore,
    GrantStore,
    PriceStore,
    RefundStore,
    SettlementStore,
    SliceStore,
    SliceWish,
)
from tests.conftest import PostgresCluster
from tests.integration.services.billing.audit import Connection, audit
from tests.integration.services.billing.reference import (
    CACHED_INPUT_PRICE,
    DISCOUNT_PERCENT,
    GRACE_S,
    INPUT_PRICE,
    LEASE_S,
    OUTPUT_PRICE,
    REASONING_PRICE,
    REQUEST_PRICE,
    Reference,
    Refused,
    cost,
)

Result = TypeVar("Result")
Wish = tuple[str, str, str, tuple[int, int, int, int], bool, EndCause]

# Weighted so that most settlements meet a slice of their account with something left.
ACCOUNTS = st.sampled_from(["a", "a", "a", "b"])
SLICES = st.sampled_from(["s0", "s1", "s2", "s3"])
GENERATIONS = st.sampled_from([f"g{number}" for number in range(60)])
# Fresh and cached tokens of the prompt, tokens of the output, of reasoning.
COUNTS = st.tuples(st.integers(0, 6), st.integers(0, 21), st.integers(0, 40), st.integers(0, 5))
CAUSES = st.sampled_from([EndCause.COMPLETED, EndCause.STALLED, EndCause.WORKER_LOST])
SETTLEMENTS = st.tuples(GENERATIONS, SLICES, ACCOUNTS, COUNTS, st.booleans(), CAUSES)
# Neither a lease nor a lease with its grace is a multiple: no history stands on an edge. Nor does
# the life of a grant.
STEP_S = 400
LIVES_S = st.sampled_from([None, 150, 550, 950])

assert LEASE_S % STEP_S
assert (LEASE_S + GRACE_S) % STEP_S


class Real:
    """The stores on a real database, driven from code that is not asynchronous."""

    def __init__(self, runner: asyncio.Runner, dsn: str) -> None:
        self.runner = runner
        self.now = FakeClock().now()
        self.histories = itertools.count(1)
        config = PostgresSection(dsn=dsn, connections_max=2)
        self.database = self.run(postgres.connect(config, schema="billing"))
        self.connection: Connection = self.run(
            asyncpg.connect(dsn, server_settings={"search_path": "billing"})
        )
        self.accounts = AccountStore(self.database)
        self.slices = SliceStore(self.database, lease_s=LEASE_S, grace_s=GRACE_S)
        self.settlements = SettlementStore(self.database, lease_s=LEASE_S)
        self.grants = GrantStore(self.database)
        self.refunds = RefundStore(self.database)
        price = Price(
            price_id="nano",
            offering_id="tiny",
            input_price=INPUT_PRICE,
            output_price=OUTPUT_PRICE,
            cached_input_price=CACHED_INPUT_PRICE,
            reasoning_price=REASONING_PRICE,
            request_price=REQUEST_PRICE,
            background_discount_percent=DISCOUNT_PERCENT,
            effective_time=self.now,
            create_time=self.now,
        )
        self.run(PriceStore(self.database).create_price(price))

    def run(self, call: Awaitable[Result]) -> Result:
        async def wait() -> Result:
            return await call

        return self.runner.run(wait())

    def stop(self) -> None:
        self.run(self.connection.close())
        self.run(self.database.__aexit__(None, None, None))


class Histories(RuleBasedStateMachine):
    """Does the same to both, and compares."""

    real: Real

    def __init__(self) -> None:
        super().__init__()
        self.reference = Reference()
        # Histories share a database: each has names of its own.
        self.prefix = f"h{next(self.real.histories)}-"
        self.requests = itertools.count(1)
        run = self.real.run
        self.system = {
            name: run(self.real.accounts.get_balance(f"system-{name}")).posted
            for name in ("revenue", "bad-debt")
        }

    def both(self, real: Awaitable[object], reference: Callable[[], object]) -> None:
        """Expects the same result, or the same reason of a refusal."""
        got: object
        want: object
        try:
            got = self.real.run(real)
        except MaasError as error:
            got = error.reason.value
        try:
            want = reference()
        except Refused as refused:
            want = str(refused)
        assert got == want

    def mine(self, name: str) -> str:
        return self.prefix + name

    @initialize(credit=st.integers(0, 600))
    def open_accounts(self, credit: int) -> None:
        for name in ("a", "b"):
            account = Account(
                account_id=self.mine(name), display_name="", create_time=self.real.now
            )
            self.real.run(self.real.accounts.create_account(account))
            self.reference.open(name)
        self.post("a", credit + 1)

    @rule(name=ACCOUNTS, amount=st.integers(-100, 200).filter(bool))
    def post(self, name: str, amount: int) -> None:
        posting = Posting(
            account_id=self.mine(name),
            amount=amount,
            kind=EntryKind.ADJUSTMENT,
            request_id=str(next(self.requests)),
            description="",
        )

        async def real() -> None:
            await self.real.accounts.post_entry(posting, self.real.now)

        self.both(real(), lambda: self.reference.post(name, amount))

    @rule(
        name=ACCOUNTS,
        amount=st.integers(1, 150),
        priority=st.sampled_from([10, 50, 50]),
        life_s=LIVES_S,
    )
    def give(self, name: str, amount: int, priority: int, life_s: int | None) -> None:
        async def real() -> None:
            expire_time = None
            if life_s is not None:
                now = await self.real.connection.fetchval("SELECT lease_now()")
                expire_time = now + timedelta(seconds=life_s)
            grant = Grant(
                account_id=self.mine(name),
                grant_id=f"g{next(self.requests)}",
                number=0,
                kind=GrantKind.GIFT,
                amount=amount,
                remaining=amount,
                priority=priority,
                expire_time=expire_time,
                create_time=self.real.now,
                description="",
            )
            await self.real.grants.create_grant(grant, self.real.now)

        expires_at = float("inf") if life_s is None else self.reference.now + life_s
        self.both(real(), lambda: self.reference.give(name, amount, priority, expires_at))

    @rule(name=ACCOUNTS, limit=st.sampled_from([0, 0, 40, 120]))
    def set_credit_limit(self, name: str, limit: int) -> None:
        self.real.run(self.real.accounts.set_credit_limit(self.mine(name), limit))
        self.reference.limits[name] = limit

    @rule(generation=GENERATIONS, name=ACCOUNTS, amount=st.none() | st.integers(1, 60))
    def refund(self, generation: str, name: str, amount: int | None) -> None:
        self.refund_of(generation, name, amount)

    @precondition(lambda self: any(charge for _, charge in self.reference.charges.values()))
    @rule(data=st.data(), amount=st.none() | st.integers(1, 60))
    def refund_a_charge(self, data: st.DataObject, amount: int | None) -> None:
        charged = [name for name, (_, charge) in self.reference.charges.items() if charge]
        generation = data.draw(st.sampled_from(charged))
        self.refund_of(generation, self.reference.charges[generation][0], amount)

    def refund_of(self, generation: str, name: str, amount: int | None) -> None:
        wish = Refund(
            account_id=self.mine(name),
            generation_id=self.mine(generation),
            amount=amount,
            request_id=str(next(self.requests)),
            description="",
        )

        async def real() -> None:
            await self.real.refunds.refund(wish, self.real.now)

        self.both(real(), lambda: self.reference.refund(generation, name, amount))

    @rule(slice_id=SLICES, name=ACCOUNTS, required=st.integers(0, 60), wanted=st.integers(10, 90))
    def acquire(self, slice_id: str, name: str, required: int, wanted: int) -> None:
        async def real() -> int:
            wish = SliceWish(
                slice_id=self.mine(slice_id),
                account_id=self.mine(name),
                holder="gateway",
                required=required,
                wanted=wanted,
            )
            acquired = await self.real.slices.acquire(wish, self.real.now)
            return acquired.granted

        self.both(real(), lambda: self.reference.acquire(slice_id, name, required, wanted))

    @rule(batch=st.lists(SETTLEMENTS, max_size=6), renewed=st.sets(SLICES, max_size=3))
    def settle(self, batch: list[Wish], renewed: set[str]) -> None:
        named = renewed | {slice_id for _, slice_id, _, _, _, _ in batch}

        async def real() -> tuple[int, list[str]]:
            settled = await self.real.settlements.settle(
                [self.settlement(*item) for item in batch],
                {self.mine(slice_id) for slice_id in renewed},
                self.real.now,
            )
            lost = [slice_id.removeprefix(self.prefix) for slice_id in settled.lost_slice_ids]
            return settled.new_count, lost

        def reference() -> tuple[int, list[str]]:
            new = [
                self.reference.settle(
                    generation,
                    slice_id,
                    name,
                    cost(counts, background=background) if cause.is_charged else 0,
                )
                for generation, slice_id, name, counts, background, cause in batch
            ]
            return sum(new), self.reference.renew(named)

        self.both(real(), reference)

    def settlement(
        self,
        generation: str,
        slice_id: str,
        name: str,
        counts: tuple[int, int, int, int],
        background: bool,  # noqa: FBT001 - a part of what is drawn
        cause: EndCause,
    ) -> Settlement:
        fresh, cached, output, reasoning = counts
        return Settlement(
            generation_id=self.mine(generation),
            slice_id=self.mine(slice_id),
            account_id=self.mine(name),
            project_id="demo",
            api_key_id="key",
            offering_id="tiny",
            model_id="tiny",
            version_id="1",
            price_id="nano",
            input_tokens=fresh + cached,
            cached_input_tokens=cached,
            output_tokens=output + reasoning,
            reasoning_tokens=reasoning,
            is_background=background,
            end_cause=cause,
            start_time=self.real.now,
            end_time=self.real.now,
        )

    @rule(slice_ids=st.lists(SLICES, min_size=1, max_size=3))
    def close(self, slice_ids: list[str]) -> None:
        real = self.real.slices.close(map(self.mine, slice_ids), holder="gateway")
        self.both(real, lambda: self.reference.close(slice_ids))

    @rule(steps=st.integers(1, 4))
    def pass_time(self, steps: int) -> None:
        """Lease time only; the sweeper comes when it comes."""
        self.reference.now += steps * STEP_S
        self.real.run(
            self.real.connection.execute(
                "UPDATE lease_clock SET shift = shift + make_interval(secs => $1)",
                float(steps * STEP_S),
            )
        )

    @rule()
    def sweep(self) -> None:
        async def real() -> None:
            await self.real.slices.sweep()
            await self.real.grants.sweep(self.real.now)

        self.both(real(), self.reference.sweep)

    @invariant()
    def agrees(self) -> None:
        self.real.run(self.compare())

    async def compare(self) -> None:
        rows = await self.real.connection.fetch(
            """
            SELECT account_id AS name, '' AS state, posted AS first, held AS second
              FROM balance
             WHERE starts_with(account_id, $1)
             UNION ALL
            SELECT credit_slice_id, state, granted, consumed
              FROM credit_slice
             WHERE starts_with(credit_slice_id, $1)
            """,
            self.prefix,
        )
        want = {
            self.mine(name): ("", posted, self.reference.held(name))
            for name, posted in self.reference.money.posted.items()
        } | {
            self.mine(slice_id): (item.state, item.granted, item.consumed)
            for slice_id, item in self.reference.slices.items()
        }
        assert {row["name"]: (row["state"], row["first"], row["second"]) for row in rows} == want
        grants = await self.real.connection.fetch(
            """
            SELECT account_id, priority, remaining
              FROM credit_grant
             WHERE starts_with(account_id, $1)
               AND is_live
             ORDER BY account_id, priority, expire_time NULLS LAST, number
            """,
            self.prefix,
        )
        assert [tuple(row.values()) for row in grants] == [
            (self.mine(name), grant.priority, grant.remaining)
            for name in sorted(self.reference.money.grants)
            for grant in self.reference.live(name)
        ]

    @override
    def teardown(self) -> None:
        run = self.real.run
        for name, want in (
            ("revenue", self.reference.revenue),
            ("bad-debt", self.reference.bad_debt),
        ):
            posted = run(self.real.accounts.get_balance(f"system-{name}")).posted
            assert posted - self.system[name] == want
        run(audit(self.real.connection))


def test_ledger_does_what_the_reference_does(postgres_cluster: PostgresCluster) -> None:
    with asyncio.Runner() as runner:
        real = Real(runner, runner.run(postgres_cluster.create("billing")))

        class Machine(Histories):
            pass

        Machine.real = real
        try:
            run_state_machine_as_test(
                Machine,
                settings=settings(
                    max_examples=50,
                    stateful_step_count=30,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            real.stop()
