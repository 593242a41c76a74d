"""Sums of usage: for any filter and any grouping they are the sums of the records."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from maas.billing.v1 import account_service_pb2 as account_pb
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import price_service_pb2 as price_pb
from maas.billing.v1 import usage_service_pb2 as usage_pb

from libs.errors import DeadlineExceeded, InvalidArgument, NotFound, Reason, ResourceExhausted
from libs.paging import Page
from libs.testing import eventually
from services.billing.store.invoices import LINES
from services.billing.store.opening import COUNTED_PAGE, FIRST_OF_WINDOW
from services.billing.store.reports import AT_ONCE_MAX, WAITING_MAX
from services.billing.store.usage import records_statement, summary_statement
from services.billing.usage import Dimension, Grouping, UsageFilter
from tests.conftest import DatabaseFactory
from tests.integration.services.billing.audit import Connection
from tests.integration.services.billing.world import Billing, Client, settlement, usd

RECORDS = 60
QUESTIONS = 25
DAY_S = 86_400
# Too little for all of them, so that the last are charged in part or not at all.
CREDIT = 4_000
Record = ledger_pb2.UsageRecord
DIMENSIONS: dict[usage_pb.UsageDimension.ValueType, Callable[[Record, str], str]] = {
    usage_pb.USAGE_DIMENSION_DAY: lambda item, _: day_of(item),
    usage_pb.USAGE_DIMENSION_PROJECT: lambda item, _: item.project,
    usage_pb.USAGE_DIMENSION_API_KEY: lambda item, _: item.api_key,
    usage_pb.USAGE_DIMENSION_OFFERING: lambda item, _: item.offering,
    usage_pb.USAGE_DIMENSION_MODEL_VERSION: lambda item, _: item.model_version,
    usage_pb.USAGE_DIMENSION_PRICE: lambda item, _: item.price,
    usage_pb.USAGE_DIMENSION_LABEL: lambda item, key: item.labels.get(key, ""),
    usage_pb.USAGE_DIMENSION_END_CAUSE: lambda item, _: ledger_pb2.EndCause.Name(item.end_cause),
}
END_CAUSES = [value for value in ledger_pb2.EndCause.values() if value]
# What sorts otherwise by parts, by locale or by number than by bytes.
PROJECTS = ["demo", "demo-2", "Demo", "a", "a.b"]
MODELS = ["models/a/versions/2", "models/a-b/versions/1", "models/a/versions/10"]
LABELS = ["", "x", "X", "1:1:", "Ünï\U0001f98a", 'q"\\\n']


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - a failure has to come again


def day_of(record: Record) -> str:
    return record.settle_time.ToDatetime(tzinfo=UTC).date().isoformat()


def time_at(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message


async def open_books(billing: Billing) -> None:
    """An account with credit, and two prices: one nano a token, and three."""
    await billing.open_account(CREDIT)
    await billing.acquire("s1", CREDIT // 2)
    price = ledger_pb2.Price(
        offering="offerings/other",
        input_price_per_million=usd(3_000_000),
        output_price_per_million=usd(3_000_000),
        engine_second_cost=usd(7),
    )
    await billing.admin.peer.call(
        billing.admin.prices.CreatePrice, price_pb.CreatePriceRequest(price_id="dear", price=price)
    )


async def settle_anything(billing: Billing, chance: random.Random) -> None:
    """Settles a few generations that differ in everything."""
    batch = []
    for _ in range(chance.randint(1, 6)):
        wish = settlement(
            f"gen_{chance.getrandbits(60)}",
            slice_id="s1",
            tokens=chance.randint(0, 90),
            price=chance.choice(["prices/nano", "prices/dear"]),
            end_cause=chance.choice(END_CAUSES),
            project=f"projects/{chance.choice(PROJECTS)}",
            end_user=chance.choice(["", "", "u1", "u2"]),
        )
        wish.labels.update({key: chance.choice(LABELS) for key in chance.sample(["k", "l"], 1)})
        wish.api_key = chance.choice(["apiKeys/k1", "apiKeys/k2"])
        wish.offering = chance.choice(["offerings/tiny", "offerings/other"])
        wish.model_version = chance.choice(MODELS)
        wish.usage.input_tokens = chance.randint(0, 50)
        wish.usage.cached_input_tokens = chance.randint(0, wish.usage.input_tokens)
        wish.usage.reasoning_tokens = chance.randint(0, wish.usage.output_tokens)
        wish.engine_time.FromMicroseconds(chance.randint(0, 5_000_000))
        batch.append(wish)
    await billing.settle(*batch)


async def refund(billing: Billing, record: Record, nanos: int, request_id: str) -> None:
    await billing.admin.peer.call(
        billing.admin.accounts.RefundUsage,
        account_pb.RefundUsageRequest(
            usage_record=record.name, amount=usd(nanos), request_id=request_id
        ),
    )


async def all_records(
    caller: Client, wanted: usage_pb.UsageFilter | None = None, page_size: int = 1000
) -> list[Record]:
    """Lists records page by page."""
    found: list[Record] = []
    token = ""
    while True:
        page = await caller.peer.call(
            caller.usage.ListUsageRecords,
            usage_pb.ListUsageRecordsRequest(
                parent="accounts/acme", filter=wanted, page_size=page_size, page_token=token
            ),
        )
        found += page.usage_records
        token = page.next_page_token
        if not token:
            return found


async def summarize(
    caller: Client,
    group_by: Sequence[usage_pb.UsageDimension.ValueType] = (),
    *,
    wanted: usage_pb.UsageFilter | None = None,
    label_key: str = "",
    parent: str = "accounts/acme",
    page_size: int = 1000,
    timeout_s: float | None = None,
) -> list[usage_pb.UsageSummary]:
    """Lists groups page by page."""
    found: list[usage_pb.UsageSummary] = []
    token = ""
    while True:
        page = await caller.peer.call(
            caller.usage.SummarizeUsage,
            usage_pb.SummarizeUsageRequest(
                parent=parent,
                filter=wanted,
                group_by=group_by,
                label_key=label_key,
                page_size=page_size,
                page_token=token,
            ),
            timeout_s=timeout_s,
        )
        found += page.summaries
        token = page.next_page_token
        if not token:
            return found


async def fill(billing: Billing, chance: random.Random, count: int = RECORDS) -> list[Record]:
    """Settles many generations over some days, refunds some, and returns their records."""
    await open_books(billing)
    while len(records := await all_records(billing.admin)) < count:
        await settle_anything(billing, chance)
        billing.advance(chance.choice([0, 1, DAY_S / 3, DAY_S]))
    charged = [record for record in records if record.charge.nanos]
    for number, record in enumerate(chance.sample(charged, 8)):
        await refund(billing, record, chance.randint(1, record.charge.nanos), f"refund-{number}")
    return await all_records(billing.admin)


def any_filter(chance: random.Random, records: Sequence[Record]) -> usage_pb.UsageFilter:
    """Asks for what some record has, or for nothing; often for a span of time."""
    like = chance.choice(records)
    wanted = usage_pb.UsageFilter()
    for field in ("project", "api_key", "offering", "model_version", "end_user"):
        if chance.random() < 0.2:
            setattr(wanted, field, getattr(like, field))
    if chance.random() < 0.3:
        wanted.labels.update(like.labels)
    edges = sorted(chance.choice(records).settle_time.ToNanoseconds() for _ in range(2))
    if chance.random() < 0.5:
        wanted.start_time.FromNanoseconds(edges[0])
    if chance.random() < 0.5:
        # Of the last record itself, or right behind it.
        after_ns = 1000 if edges[0] == edges[1] else chance.choice([0, 1000])
        wanted.end_time.FromNanoseconds(edges[1] + after_ns)
    return wanted


def passes(wanted: usage_pb.UsageFilter, record: Record) -> bool:
    """The filter in plain Python."""
    time = record.settle_time.ToNanoseconds()
    return (
        wanted.project in {"", record.project}
        and wanted.api_key in {"", record.api_key}
        and wanted.offering in {"", record.offering}
        and wanted.model_version in {"", record.model_version}
        and wanted.end_user in {"", record.end_user}
        and all(record.labels.get(key) == value for key, value in wanted.labels.items())
        and (not wanted.HasField("start_time") or time >= wanted.start_time.ToNanoseconds())
        and (not wanted.HasField("end_time") or time < wanted.end_time.ToNanoseconds())
    )


def sums_of(
    records: Sequence[Record],
    group_by: Sequence[usage_pb.UsageDimension.ValueType],
    label_key: str,
    *,
    shows_cost: bool,
) -> list[usage_pb.UsageSummary]:
    """The sums in plain Python. A second of engine costs 7 nanos at prices/dear."""
    groups: dict[tuple[str, ...], usage_pb.UsageSummary] = defaultdict(usage_pb.UsageSummary)
    micros: dict[tuple[str, ...], int] = defaultdict(int)
    if not group_by:
        groups[()].SetInParent()
    for record in records:
        values = tuple(DIMENSIONS[item](record, label_key) for item in group_by)
        found = groups[values]
        found.record_count += 1
        found.usage.input_tokens += record.usage.input_tokens
        found.usage.cached_input_tokens += record.usage.cached_input_tokens
        found.usage.output_tokens += record.usage.output_tokens
        found.usage.reasoning_tokens += record.usage.reasoning_tokens
        found.charge.nanos += record.charge.nanos
        found.refunded.nanos += record.refunded.nanos
        micros[values] += record.engine_time.ToMicroseconds()
        if record.price == "prices/dear":
            found.engine_cost.nanos += -(-record.engine_time.ToMicroseconds() * 7 // 1_000_000)
    for values, found in groups.items():
        found.values.extend(values)
        found.usage.SetInParent()
        found.charge.currency_code = found.refunded.currency_code = "USD"
        found.engine_time.FromMicroseconds(micros[values])
        found.engine_cost.currency_code = "USD"
        if not shows_cost:
            found.ClearField("engine_cost")
    return [
        groups[values] for values in sorted(groups, key=lambda item: [v.encode() for v in item])
    ]


@pytest.mark.parametrize("seed", [1, 2])
async def test_groups_sum_to_the_records_for_any_filter_and_grouping(
    billing: Billing, seed: int
) -> None:
    """Random records and random questions, against plain Python on the list of all records."""
    chance = seeded(seed)
    records = await fill(billing, chance)
    assert any(record.refunded.nanos for record in records)
    assert await billing.connection.fetchval("SELECT sum(shortfall) FROM usage_record") > 0
    assert any(record.engine_time.ToMicroseconds() for record in records)

    for _ in range(QUESTIONS):
        wanted = any_filter(chance, records)
        group_by = chance.sample(list(DIMENSIONS), chance.randint(0, len(DIMENSIONS)))
        label_key = "k" if usage_pb.USAGE_DIMENSION_LABEL in group_by else ""
        caller = chance.choice([billing.admin, billing.tenant])
        page_size = chance.choice([1, 2, 7, 1000])
        let_through = [record for record in records if passes(wanted, record)]
        expected = sums_of(let_through, group_by, label_key, shows_cost=caller is billing.admin)

        listed = await all_records(billing.tenant, wanted, page_size=chance.choice([9, 1000]))
        got = await summarize(
            caller, group_by, wanted=wanted, label_key=label_key, page_size=page_size
        )

        assert listed == let_through
        assert got == expected


async def test_charges_less_refunds_are_the_change_of_the_balance(billing: Billing) -> None:
    await fill(billing, seeded(3), 40)

    (everything,) = await summarize(billing.tenant)

    posted, _, _ = await billing.balance()
    assert posted == CREDIT - everything.charge.nanos + everything.refunded.nanos


async def test_engine_cost_is_for_administrators(billing: Billing) -> None:
    await fill(billing, seeded(4), 20)

    (shown,) = await summarize(billing.admin)
    (hidden,) = await summarize(billing.tenant)

    assert shown.engine_cost.nanos > 0
    assert not hidden.HasField("engine_cost")
    assert hidden.engine_time == shown.engine_time


async def test_usage_of_another_account_stays_hidden(billing: Billing) -> None:
    await open_books(billing)
    await billing.settle(settlement("gen_1", slice_id="s1"))
    await billing.open_account(0, "other")

    with pytest.raises(NotFound):
        await summarize(billing.stranger)
    own = await billing.stranger.peer.call(
        billing.stranger.usage.SummarizeUsage, usage_pb.SummarizeUsageRequest()
    )
    assert [item.record_count for item in own.summaries] == [0]
    with pytest.raises(NotFound):
        await billing.admin.peer.call(
            billing.admin.usage.SummarizeUsage,
            usage_pb.SummarizeUsageRequest(parent="accounts/nobody"),
        )


async def test_longest_values_fit_into_a_page_token(billing: Billing) -> None:
    await open_books(billing)
    label = "\U0001f98a" * 64
    for number in range(2):
        wish = settlement(f"gen_{number}", slice_id="s1", labels={"k": label})
        wish.end_cause = ledger_pb2.END_CAUSE_CLIENT_CANCELLED
        wish.project = f"projects/{'p' * 63}"
        wish.api_key = f"apiKeys/{'k' * 62}{number}"
        wish.offering = f"offerings/{'o' * 63}"
        wish.model_version = f"models/{'m' * 63}/versions/{'v' * 63}"
        await billing.settle(wish)

    found = await summarize(billing.tenant, list(DIMENSIONS), label_key="k", page_size=1)

    assert [item.record_count for item in found] == [1, 1]


DAY_AND_PROJECT = [usage_pb.USAGE_DIMENSION_DAY, usage_pb.USAGE_DIMENSION_PROJECT]
BAD_QUESTIONS = [
    (
        usage_pb.SummarizeUsageRequest(group_by=[usage_pb.USAGE_DIMENSION_UNSPECIFIED]),
        "group_by[0]",
    ),
    (usage_pb.SummarizeUsageRequest(group_by=[*DAY_AND_PROJECT, *DAY_AND_PROJECT]), "group_by[2]"),
    (
        usage_pb.SummarizeUsageRequest(group_by=[usage_pb.UsageDimension.ValueType(99)]),
        "group_by[0]",
    ),
    (usage_pb.SummarizeUsageRequest(group_by=[usage_pb.USAGE_DIMENSION_LABEL]), "label_key"),
    (usage_pb.SummarizeUsageRequest(label_key="k"), "label_key"),
    (
        usage_pb.SummarizeUsageRequest(group_by=[usage_pb.USAGE_DIMENSION_LABEL], label_key="\0"),
        "label_key",
    ),
    (
        usage_pb.SummarizeUsageRequest(filter=usage_pb.UsageFilter(project="demo")),
        "filter.project",
    ),
    (
        usage_pb.SummarizeUsageRequest(filter=usage_pb.UsageFilter(model_version="models/a")),
        "filter.model_version",
    ),
    (
        usage_pb.SummarizeUsageRequest(filter=usage_pb.UsageFilter(end_user="\0")),
        "filter.end_user",
    ),
    (
        usage_pb.SummarizeUsageRequest(filter=usage_pb.UsageFilter(labels={"k": "\0"})),
        "filter.labels[k]",
    ),
    (
        usage_pb.SummarizeUsageRequest(
            filter=usage_pb.UsageFilter(
                start_time=Timestamp(seconds=5), end_time=Timestamp(seconds=5)
            )
        ),
        "filter.end_time",
    ),
    (
        usage_pb.SummarizeUsageRequest(
            filter=usage_pb.UsageFilter(start_time=Timestamp(seconds=2**40))
        ),
        "filter.start_time",
    ),
]


async def test_bad_questions_are_refused_with_their_field(billing: Billing) -> None:
    await billing.open_account()

    for question, path in BAD_QUESTIONS:
        with pytest.raises(InvalidArgument) as caught:
            await billing.tenant.peer.call(billing.tenant.usage.SummarizeUsage, question)
        assert [item.field for item in caught.value.violations] == [path]


# No base64; "no"; one value for two; bad lengths; two values for none.
BAD_TOKENS = [("!", 2), ("bm8", 2), ("MTph", 2), ("OTk5OTph", 2), ("MjA6YQ", 2), ("MTphMTpi", 0)]


async def test_tokens_of_other_pages_are_refused(billing: Billing) -> None:
    await billing.open_account()

    for token, count in BAD_TOKENS:
        with pytest.raises(InvalidArgument) as caught:
            await billing.tenant.peer.call(
                billing.tenant.usage.SummarizeUsage,
                usage_pb.SummarizeUsageRequest(group_by=DAY_AND_PROJECT[:count], page_token=token),
            )
        assert caught.value.reason is Reason.BAD_PAGE_TOKEN, token


async def test_too_much_to_sum_is_said_before_the_deadline(billing: Billing) -> None:
    """A table that is locked stands for one that is too long to read."""
    await billing.open_account()
    async with billing.connection.transaction():
        await billing.connection.execute("LOCK TABLE usage_record")

        with pytest.raises(DeadlineExceeded) as caught:
            await summarize(billing.tenant, timeout_s=0.5)

    assert "narrow filter.start_time" in caught.value.message


async def are_stuck(billing: Billing, count: int) -> None:
    """Waits until that many statements wait for a lock."""

    async def are() -> bool:
        found = await billing.connection.fetchval(
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND database ="
            " (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return bool(found == count)

    await eventually(are)


async def test_reports_leave_room_for_other_accounts_and_for_money(billing: Billing) -> None:
    """A locked table stands for one that takes long to read."""
    await open_books(billing)
    names = ["acme", *(f"account-{number}" for number in range(AT_ONCE_MAX))]
    for name in names[1:]:
        await billing.open_account(0, name)

    def start(name: str) -> asyncio.Future[list[usage_pb.UsageSummary]]:
        return asyncio.ensure_future(summarize(billing.admin, parent=f"accounts/{name}"))

    async def waits_in_vain(name: str) -> None:
        with pytest.raises(ResourceExhausted) as caught:
            await summarize(billing.admin, parent=f"accounts/{name}", timeout_s=0.2)
        assert caught.value.reason is Reason.QUEUE_FULL

    async with billing.connection.transaction():
        await billing.connection.execute("LOCK TABLE refund")
        started = [start(names[0])]
        await are_stuck(billing, 1)
        await waits_in_vain(names[0])
        started += [start(name) for name in names[1:AT_ONCE_MAX]]
        await are_stuck(billing, AT_ONCE_MAX)
        await waits_in_vain(names[AT_ONCE_MAX])
        await billing.settle(settlement("gen_1", slice_id="s1"))
    for report in started:
        await report


async def test_those_who_wait_are_few_and_may_leave(billing: Billing) -> None:
    await open_books(billing)
    async with billing.connection.transaction():
        await billing.connection.execute("LOCK TABLE refund")
        started = [asyncio.ensure_future(summarize(billing.tenant)) for _ in range(WAITING_MAX)]
        await are_stuck(billing, 1)

        # At once: whoever waits would do so for longer.
        async with asyncio.timeout(10.0):
            with pytest.raises(ResourceExhausted) as caught:
                await summarize(billing.tenant, timeout_s=60.0)
        for report in started:
            report.cancel()
        gone = await asyncio.gather(*started, return_exceptions=True)

    assert caught.value.reason is Reason.QUEUE_FULL
    assert all(isinstance(item, asyncio.CancelledError) for item in gone)
    assert [item.record_count for item in await summarize(billing.tenant)] == [0]


async def plan_of(connection: Connection, text: str, arguments: Sequence[object]) -> str:
    rows = await connection.fetch(f"EXPLAIN {text}", *arguments)
    return "\n".join(row[0] for row in rows)


async def test_questions_about_an_account_read_its_own_records_only(
    database: DatabaseFactory,
) -> None:
    """Among a hundred times as many records of others, no plan reads the table through."""
    dsn = await database("billing")
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "billing"})
    try:
        await connection.execute(
            """
            INSERT INTO usage_record (
                generation_id, account_id, number, credit_slice_id, project_id, api_key_id,
                offering_id, model_id, version_id, price_id, input_tokens, output_tokens, amount,
                shortfall, end_cause, start_time, end_time, settle_time
            )
            SELECT 'gen_' || number, 'account-' || number % 100, number, 's', 'p', 'k', 'o', 'm',
                   'v', 'price', 0, 1, 1, 0, 1, at, at, at
              FROM generate_series(1, 30000) AS number,
                   LATERAL (SELECT timestamptz '2026-01-01Z' + number * interval '1 minute' AS at)
            """
        )
        await connection.execute("ANALYZE")
        month = UsageFilter(
            start_time=datetime(2026, 1, 5, tzinfo=UTC), end_time=datetime(2026, 1, 7, tzinfo=UTC)
        )
        by_day = Grouping(dimensions=(Dimension.DAY,))
        page = Page(size=50, after="")
        end = datetime(2026, 1, 5, tzinfo=UTC) + timedelta(days=2)
        sums = summary_statement("account-7", page, month, by_day)
        listed = records_statement("account-7", page, "", month)
        all_listed = records_statement("account-7", page, "", UsageFilter())
        plans = {
            "sums": await plan_of(connection, sums.text, sums.arguments),
            "list of a month": await plan_of(connection, listed.text, listed.arguments),
            "list": await plan_of(connection, all_listed.text, all_listed.arguments),
            "invoice": await plan_of(connection, LINES, ["account-7", [1], [30_001], end]),
            "begin of a limit": await plan_of(connection, FIRST_OF_WINDOW, ["account-7", end]),
            "spent before a limit": await plan_of(
                connection, COUNTED_PAGE, ["account-7", 29_000, 100, "project", "p"]
            ),
        }
    finally:
        await connection.close()

    assert [name for name, plan in plans.items() if "Seq Scan on usage_record" in plan] == []
    assert "usage_record_of_time" in plans["sums"]
    assert "usage_record_of_time" in plans["list of a month"]
