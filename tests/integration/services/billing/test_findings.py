"""Each invariant, broken by hand in SQL, is found and named; nothing else is.

One ledger with some of everything is built by the services; each test breaks it and mends it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import asyncpg
import pytest
import pytest_asyncio
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import limit_service_pb2 as limit_pb

from libs import postgres
from libs.config import PostgresSection
from libs.units import Rates
from services.billing.grants import Refund
from services.billing.invariants import INVARIANTS
from services.billing.receipts import fault_of
from services.billing.store.audit import (
    CHECKS,
    AuditResult,
    AuditStore,
    AuditWish,
    Checkpoint,
    Finding,
)
from services.billing.store.findings import Scope
from services.billing.store.invoices import InvoiceStore
from services.billing.store.refunds import RefundStore
from services.billing.store.reports import Reports
from tests.conftest import PostgresCluster
from tests.integration.services.billing.signing import running_signed, signed
from tests.integration.services.billing.world import GRACE_S, Billing, settlement, usd

if TYPE_CHECKING:
    from tests.integration.services.billing.audit import Connection

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOW = datetime(2026, 1, 1, tzinfo=UTC)
UNGUARD = """
    CREATE SCHEMA kept;
    ALTER TABLE usage_record DROP CONSTRAINT usage_record_pkey;
    DO $$
    DECLARE found record;
    BEGIN
        FOR found IN
            SELECT conrelid::regclass AS name, conname
              FROM pg_constraint
             WHERE contype = 'c'
               AND connamespace = 'billing'::regnamespace
        LOOP
            EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', found.name, found.conname);
        END LOOP;
    END
    $$
"""

ACME = "accounts/acme"
GEN_1 = f"{ACME}/usageRecords/gen_1"
GEN_3 = f"{ACME}/usageRecords/gen_3"
GEN_5 = f"{ACME}/usageRecords/gen_5"
INVOICE = f"{ACME}/invoices/INV-000001"
LIMIT = "limits/monthly"


async def build(billing: Billing) -> None:
    """Grants, slices, charges, a debt, a free end, a refund, an invoice, a limit, receipts."""
    await billing.open_account(1000)
    await billing.open_account(5, account_id="poor")
    spend = limit_pb.SpendLimit(amount=usd(10_000), window=limit_pb.SPEND_WINDOW_MONTH)
    await billing.admin.peer.call(
        billing.admin.limits.CreateLimit,
        limit_pb.CreateLimitRequest(
            limit_id="monthly", limit=limit_pb.Limit(account=ACME, scope=ACME, spend=spend)
        ),
    )
    await billing.acquire("s1", 500)
    await billing.acquire("s2", 20)
    await billing.close("s2")
    lost = ledger_pb2.END_CAUSE_WORKER_LOST
    await billing.settle(
        signed(settlement("gen_1", slice_id="s1", tokens=7)),
        signed(settlement("gen_2", slice_id="s1", tokens=5, end_cause=lost), 0),
        signed(settlement("gen_3", slice_id="s1", tokens=8, request_id="order")),
        # On no slice at all: five of nine nanos are there.
        signed(settlement("gen_4", slice_id="none", tokens=9, account="accounts/poor")),
    )
    refund = Refund(
        account_id="acme", generation_id="gen_1", amount=3, request_id="oops", description=""
    )
    await RefundStore(billing.database).refund(refund, NOW)
    invoices = InvoiceStore(billing.database, Reports(billing.database), delay_s=0.0)
    await invoices.issue("acme", date(2026, 1, 1), NOW, timeout_s=5.0)
    await billing.settle(settlement("gen_5", slice_id="s1", tokens=1))


@dataclasses.dataclass(slots=True)
class Ledger:
    """A ledger that a test may break.

    Attributes:
        connection: of the superuser, for whom no trigger fires.
        store: who looks.
        tables: all there are.
    """

    connection: Connection
    store: AuditStore
    tables: list[str]

    async def broken(self, wish: AuditWish | None = None) -> set[tuple[str, str]]:
        """Invariant and resource of all that is found."""
        return {(item.invariant_id, item.resource) for item in (await self.found(wish))[0]}

    async def found(self, wish: AuditWish | None = None) -> tuple[list[Finding], AuditResult]:
        """What an audit finds, and its result."""
        findings: list[Finding] = []
        async for item in self.store.audit(wish or AuditWish()):
            match item:
                case Finding():
                    findings.append(item)
                case AuditResult():
                    return findings, item
        raise AssertionError("no result")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def built(
    postgres_cluster: PostgresCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Ledger]:
    """The ledger, with what keeps a hand from breaking it taken away, and a copy of its rows."""
    dsn = await postgres_cluster.create("billing")
    async with running_signed(dsn, tmp_path_factory.mktemp("keys")) as world:
        await build(world)
    connection = await asyncpg.connect(
        postgres_cluster.superuser_dsn(urlsplit(dsn).path[1:]),
        # No trigger fires.
        server_settings={"search_path": "billing", "session_replication_role": "replica"},
    )
    await connection.execute(UNGUARD)
    rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'billing'")
    # The auditor's own table numbers its rows itself.
    tables = sorted({row["tablename"] for row in rows} - {"audit_checkpoint", "migration"})
    for name in tables:
        await connection.execute(f"CREATE TABLE kept.{name} AS TABLE billing.{name}")
    config = PostgresSection(dsn=dsn, connections_max=1)
    async with await postgres.connect(config, schema="billing") as database:
        store = AuditStore(database, overdue_s=GRACE_S, fault_of=fault_of)
        yield Ledger(connection=connection, store=store, tables=tables)
    await connection.close()
    await postgres_cluster.drop(dsn)


@pytest_asyncio.fixture(loop_scope="module")
async def ledger(built: Ledger) -> AsyncIterator[Ledger]:
    """The ledger, to be broken: it is mended afterwards."""
    yield built
    mending = [
        statement
        for name in built.tables
        for statement in (
            f"DELETE FROM billing.{name}",  # noqa: S608 - its own tables
            f"INSERT INTO billing.{name} TABLE kept.{name}",
        )
    ]
    await built.connection.execute(";".join(mending))


async def test_nothing_is_found_where_all_is_well(ledger: Ledger) -> None:
    findings, result = await ledger.found()

    assert findings == []
    assert result.violation_count == 0
    # Five records; two grants, four charges and a refund, of two entries and one of three.
    assert (result.record_count, result.entry_count) == (5, 15)
    assert result.end == Checkpoint(record_count=5, entry_count=15)
    assert set(result.counts) == {(check.invariant_id, check.scope) for check in CHECKS}


async def test_every_invariant_has_a_check() -> None:
    ids = [invariant.invariant_id for invariant in INVARIANTS]

    assert ids == [f"I{number}" for number in range(1, 13)]
    assert {check.invariant_id for check in CHECKS} == set(ids)


BREACHES = {
    "an entry of a charge": (
        "UPDATE ledger_entry SET amount = amount + 1 WHERE source = 'gen_1' AND amount > 0",
        {("I1", "MOVEMENT"), ("I7", GEN_1)},
    ),
    "an entry is gone": (
        "DELETE FROM ledger_entry WHERE source = 'oops' AND amount < 0",
        {("I1", "ledger"), ("I1", "REFUND")},
    ),
    "the head of the ledger": (
        "UPDATE ledger_head SET entry_count = entry_count + 1, record_count = record_count + 1",
        {("I1", "ledger"), ("I5", "ledger")},
    ),
    "a balance": (
        "UPDATE balance SET posted = posted + 1 WHERE account_id = 'acme'",
        {("I2", ACME)},
    ),
    "a balance is gone": (
        "DELETE FROM balance WHERE account_id = 'poor' OR posted = 0",
        # All of it was charged, so its entries sum to zero and nothing is missing.
        set(),
    ),
    "a balance of the ledger's own": (
        "INSERT INTO balance (account_id) VALUES ('system-revenue')",
        {("I2", "accounts/system-revenue")},
    ),
    "what a grant has left": (
        "UPDATE credit_grant SET remaining = remaining - 1 WHERE account_id = 'acme' AND is_live",
        {("I2", ACME)},
    ),
    "what a grant gave": (
        "UPDATE credit_grant SET amount = amount + 1 WHERE kind = 'gift' AND account_id = 'poor'",
        {("I2", "GRANT")},
    ),
    "a grant is gone": (
        "DELETE FROM credit_grant WHERE account_id = 'poor'",
        {("I2", "ENTRY OF POOR")},
    ),
    "what is held": (
        "UPDATE balance SET held = held + 1 WHERE account_id = 'acme'",
        {("I3", ACME)},
    ),
    "what a slice has consumed": (
        "UPDATE credit_slice SET consumed = consumed + 1 WHERE credit_slice_id = 's1'",
        {("I3", ACME), ("I3", LIMIT)},
    ),
    "what no sum holds": (
        """
        UPDATE credit_slice
           SET granted = 9223372036854775807, consumed = -5
         WHERE credit_slice_id = 's1'
        """,
        {("I3", "ledger"), ("I6", "creditSlices/s1")},
    ),
    "what a window has set aside": ("UPDATE spend_window SET held = held + 1", {("I3", LIMIT)}),
    "a limit that nobody is told of": (
        "UPDATE balance SET has_spend_limits = false",
        {("I3", ACME)},
    ),
    "a floor": ("UPDATE balance SET floor = 5 WHERE account_id = 'acme'", {("I4", ACME)}),
    "more is held than there is": (
        "UPDATE balance SET held = 2000 WHERE account_id = 'acme'",
        {("I3", ACME), ("I4", ACME)},
    ),
    "a record is gone": (
        "DELETE FROM usage_record WHERE generation_id = 'gen_2'",
        {("I5", "ledger"), ("I8", "ledger"), ("I12", INVOICE)},
    ),
    "a charged record is gone": (
        "DELETE FROM usage_record WHERE generation_id = 'gen_5'",
        {("I5", "ledger"), ("I7", "CHARGE OF GEN_5"), ("I7", "REVENUE OF GEN_5"), ("I12", LIMIT)},
    ),
    "a generation has two records": (
        """
        INSERT INTO usage_record
        SELECT (jsonb_populate_record(r, '{"number": 6}')).*
          FROM usage_record AS r
         WHERE generation_id = 'gen_2'
        """,
        {("I5", "ledger"), ("I5", f"{ACME}/usageRecords/gen_2")},
    ),
    "a record is invoiced twice": (
        """
        INSERT INTO invoice
        SELECT account_id, 2, month + '1 month'::interval, state, lines, refunds, total,
               record_count, records, refund_numbers, issue_time, void_time
          FROM invoice;
        UPDATE invoice_head SET invoice_count = 2
        """,
        {("I5", f"{ACME}/invoices/INV-000002")},
    ),
    "an ended slice": (
        "UPDATE credit_slice SET consumed = granted + 1 WHERE credit_slice_id = 's2'",
        {("I6", "creditSlices/s2")},
    ),
    "a refund": (
        "UPDATE refund SET amount = 8",
        {("I6", GEN_1), ("I7", "REFUND"), ("I12", INVOICE)},
    ),
    "a refund is gone": ("DELETE FROM refund", {("I7", "REFUND"), ("I12", INVOICE)}),
    "a refund of nothing": (
        "UPDATE refund SET generation_id = 'gen_4'",
        {("I7", f"{ACME}/usageRecords/gen_4")},
    ),
    "whose charge it is": (
        "UPDATE ledger_entry SET source = 'gen_9' WHERE source = 'gen_5'",
        {("I7", GEN_5), ("I7", "CHARGE OF GEN_5"), ("I7", "REVENUE OF GEN_5")},
    ),
    "a shortfall": (
        "UPDATE usage_record SET shortfall = 3 WHERE generation_id = 'gen_4'",
        {("I7", "accounts/poor/usageRecords/gen_4")},
    ),
    "the content of a receipt": (
        """
        UPDATE receipt
           SET content = set_byte(content, 9, get_byte(content, 9) # 1)
         WHERE record_number = 3
        """,
        {("I8", GEN_3)},
    ),
    "the signature of a receipt": (
        """
        UPDATE receipt
           SET signature = set_byte(signature, 0, get_byte(signature, 0) # 1)
         WHERE record_number = 3
        """,
        {("I8", GEN_3)},
    ),
    "the receipt of another record": (
        """
        UPDATE receipt AS a
           SET content = b.content, signature = b.signature
          FROM receipt AS b
         WHERE a.record_number = 1
           AND b.record_number = 3
        """,
        {("I8", GEN_1)},
    ),
    "what a receipt is about": (
        "UPDATE usage_record SET request_id = 'another' WHERE generation_id = 'gen_3'",
        {("I8", GEN_3)},
    ),
    "a key of receipts is gone": (
        "DELETE FROM receipt_key",
        {("I8", name) for name in (GEN_1, GEN_3, f"{ACME}/usageRecords/gen_2")}
        | {("I8", "accounts/poor/usageRecords/gen_4")},
    ),
    "a key of receipts": (
        "UPDATE receipt_key SET public_key = 'short'",
        {("I8", name) for name in (GEN_1, GEN_3, f"{ACME}/usageRecords/gen_2")}
        | {("I8", "accounts/poor/usageRecords/gen_4")},
    ),
    "a part is more than its whole": (
        "UPDATE usage_record SET reasoning_tokens = 2 WHERE generation_id = 'gen_5'",
        {("I9", GEN_5)},
    ),
    "a count": (
        "UPDATE usage_record SET output_tokens = 2 WHERE generation_id = 'gen_5'",
        {("I10", GEN_5)},
    ),
    "a count that was invoiced and signed": (
        "UPDATE usage_record SET output_tokens = 9 WHERE generation_id = 'gen_3'",
        {("I8", GEN_3), ("I10", GEN_3), ("I12", INVOICE)},
    ),
    "a price": (
        "UPDATE price SET output_price = 2000000",
        {("I10", name) for name in (GEN_1, GEN_3, GEN_5, "accounts/poor/usageRecords/gen_4")},
    ),
    "a price is gone": (
        "UPDATE usage_record SET price_id = 'gone' WHERE generation_id = 'gen_5'",
        {("I10", GEN_5)},
    ),
    "an end that is not charged": (
        "UPDATE usage_record SET end_cause = 12 WHERE generation_id = 'gen_5'",
        {("I10", GEN_5)},
    ),
    "an end that is none": (
        "UPDATE usage_record SET end_cause = 6 WHERE generation_id = 'gen_5'",
        {("I10", GEN_5)},
    ),
    "a slice that nobody sweeps": (
        """
        UPDATE credit_slice
           SET expire_time = now() - '1 day'::interval, state = 'expired'
         WHERE credit_slice_id = 's1'
        """,
        {("I11", "creditSlices/s1")},
    ),
    "what a window has spent": ("UPDATE spend_window SET spent = spent + 1", {("I12", LIMIT)}),
    "the total of an invoice": ("UPDATE invoice SET total = total + 1", {("I12", INVOICE)}),
    "a line of an invoice": (
        "UPDATE invoice SET lines = jsonb_set(lines, '{0,output_tokens}', '1')",
        {("I12", INVOICE)},
    ),
    "an invoice is gone": ("DELETE FROM invoice", {("I12", ACME)}),
}


async def names_of(ledger: Ledger) -> dict[str, str]:
    """What stands for names that have numbers of entries in them."""
    rows = await ledger.connection.fetch(
        "SELECT number, account_id, source, kind, grant_id FROM ledger_entry ORDER BY number"
    )

    def entry(account_id: str, source: str) -> str:
        (number,) = [
            row["number"]
            for row in rows
            if row["account_id"] == account_id
            and (row["source"] == source or (not source and row["kind"] == "grant"))
        ]
        return f"accounts/{account_id}/ledgerEntries/{number}"

    (grant_id,) = [
        row["grant_id"] for row in rows if row["account_id"] == "poor" and row["grant_id"]
    ]
    return {
        "MOVEMENT": entry("acme", "gen_1"),
        "REFUND": entry("acme", "oops"),
        "GRANT": f"accounts/poor/grants/{grant_id}",
        "ENTRY OF POOR": entry("poor", ""),
        "CHARGE OF GEN_5": entry("acme", "gen_5"),
        "REVENUE OF GEN_5": entry("system-revenue", "gen_5"),
    }


@pytest.mark.parametrize(("statement", "want"), BREACHES.values(), ids=BREACHES.keys())
async def test_a_breach_is_found_and_named(
    ledger: Ledger, statement: str, want: set[tuple[str, str]]
) -> None:
    names = await names_of(ledger)

    await ledger.connection.execute(statement)

    assert await ledger.broken() == {(ident, names.get(name, name)) for ident, name in want}


async def test_every_invariant_is_broken_once() -> None:
    broken = {ident for _, want in BREACHES.values() for ident, _ in want}

    assert broken == {invariant.invariant_id for invariant in INVARIANTS}


async def test_amounts_are_computed_as_the_ledger_computes_them(ledger: Ledger) -> None:
    chance = random.Random(7)  # noqa: S311 - no secret
    prices = [0, 1, 999_999, 1_000_000, 1_234_567, 10**15]
    values: list[tuple[object, ...]] = []
    for number in range(1, 401):
        input_price, output_price = chance.choice(prices), chance.choice(prices)
        rates = Rates(
            input_price=input_price,
            output_price=output_price,
            cached_input_price=chance.choice([None, 0, input_price // 3, input_price]),
            reasoning_price=chance.choice([None, *prices]),
            request_price=chance.choice([0, 1, 7, 10**15]),
            background_discount_percent=chance.choice([0, 1, 33, 50, 99, 100]),
        )
        input_tokens, output_tokens = (
            chance.choice([0, 1, 2, 17, 123_457, 2**32]) for _ in range(2)
        )
        counts = {
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "cached_input_tokens": chance.randint(0, input_tokens),
            "reasoning_tokens": chance.randint(0, output_tokens),
        }
        is_background = chance.random() < 0.5
        amount = rates.charge(**counts, is_background=is_background)
        values.append(
            (number, *dataclasses.astuple(rates), *counts.values(), is_background, amount)
        )
    await ledger.connection.execute("DELETE FROM usage_record; DELETE FROM price")
    await ledger.connection.executemany(
        """
        WITH p AS (
            INSERT INTO price (
                price_id, offering_id, effective_time, create_time, revision, input_price,
                output_price, cached_input_price, reasoning_price, request_price,
                background_discount_percent
            )
            VALUES ('p' || $1::bigint, 'tiny', now(), now(), $1, $2, $3, $4, $5, $6, $7)
        )
        INSERT INTO usage_record
        SELECT (jsonb_populate_record(r, jsonb_build_object(
                   'generation_id', 'g' || $1, 'number', $1, 'price_id', 'p' || $1,
                   'input_tokens', $8::bigint, 'output_tokens', $9::bigint,
                   'cached_input_tokens', $10::bigint, 'reasoning_tokens', $11::bigint,
                   'is_background', $12::boolean, 'amount', $13::bigint))).*
          FROM kept.usage_record AS r
         WHERE generation_id = 'gen_5'
        """,
        values,
    )
    wish = AuditWish(scopes=frozenset({Scope.WINDOW}))

    assert "I10" not in {ident for ident, _ in await ledger.broken(wish)}

    # A nano more or less is seen, in each of them.
    await ledger.connection.execute("UPDATE usage_record SET amount = amount + 1 - number % 2 * 2")
    _, result = await ledger.found(wish)
    assert result.counts["I10", Scope.WINDOW] == 400


async def test_what_is_behind_a_record_is_looked_at_and_the_sums_of_all(ledger: Ledger) -> None:
    start = Checkpoint(record_count=4, entry_count=13)
    assert await ledger.broken(AuditWish(start=start)) == set()
    await ledger.connection.execute(
        "UPDATE ledger_entry SET amount = amount + 1 WHERE source = 'gen_3' AND amount > 0"
    )

    # The movement is before the window; that all entries do not sum to zero is seen at any time.
    findings, result = await ledger.found(AuditWish(start=start))

    assert {(item.invariant_id, item.resource) for item in findings} == {("I1", "ledger")}
    assert (result.record_count, result.entry_count) == (1, 2)
    assert await ledger.broken() == {("I1", await first_entry_of(ledger, "gen_3")), ("I7", GEN_3)}


async def first_entry_of(ledger: Ledger, source: str) -> str:
    number = await ledger.connection.fetchval(
        "SELECT min(number) FROM ledger_entry WHERE source = $1", source
    )
    return f"{ACME}/ledgerEntries/{number}"


async def test_an_account_is_looked_at_alone(ledger: Ledger) -> None:
    await ledger.connection.execute(
        """
        UPDATE usage_record SET request_id = 'x' WHERE generation_id IN ('gen_3', 'gen_4');
        UPDATE balance SET posted = posted + 1
        """
    )

    poor = await ledger.broken(AuditWish(account_id="poor"))

    assert poor == {("I2", "accounts/poor"), ("I8", "accounts/poor/usageRecords/gen_4")}
    _, result = await ledger.found(AuditWish(account_id="poor"))
    assert (result.record_count, result.entry_count) == (1, 2)


async def test_no_more_is_told_than_was_asked_for_and_all_is_counted(ledger: Ledger) -> None:
    await ledger.connection.execute("UPDATE price SET output_price = 2000000")
    await ledger.connection.execute("DELETE FROM receipt_key")

    findings, result = await ledger.found(AuditWish(findings_max=3))

    assert [item.invariant_id for item in findings] == ["I10"] * 3
    assert result.violation_count == 8


async def test_receipts_are_verified_in_parts(ledger: Ledger) -> None:
    await ledger.connection.execute("DELETE FROM receipt_key")

    parts = [
        await ledger.broken(AuditWish(receipt_share=(index, 3), receipts_after=4))
        for index in range(3)
    ]

    assert [len(part) for part in parts] == [1, 2, 1]
    assert set().union(*parts) == await ledger.broken()
    new = AuditWish(receipt_share=(0, 3), receipts_after=2)
    assert await ledger.broken(new) == {
        ("I8", GEN_3),
        ("I8", "accounts/poor/usageRecords/gen_4"),
    }
