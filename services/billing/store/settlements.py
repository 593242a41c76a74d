"""Settlements and the usage records that they leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg
import structlog

from libs.errors import FieldRule, InvalidArgument, Violation, not_found
from libs.paging import Page
from libs.postgres import Connection, Database
from libs.units import Nanos
from services.billing import metrics
from services.billing.division import Division, amount_of, divide
from services.billing.domain import (
    Balance,
    EndCause,
    Settlement,
    UsageRecord,
    account_name,
)
from services.billing.store.ledger import (
    advance_head,
    change_balances,
    insert_entries,
    lock_balances,
    lock_head,
    number_after,
)
from services.billing.store.prices import find_prices
from services.billing.store.slices import consume, read_slices, renew

log = structlog.get_logger(__name__)

_VIOLATIONS_MAX = 16
_RECORD = """
    SELECT generation_id, account_id, number, credit_slice_id, project_id, api_key_id, offering_id,
           model_id, version_id, price_id, input_tokens, output_tokens, amount, shortfall,
           end_cause, start_time, end_time, settle_time, request_id, request_sha256,
           cached_input_tokens, reasoning_tokens, labels, end_user
      FROM usage_record
"""
# Says what the partial index says, or the planner could not use it for a request_id to come.
FIND_CHARGED = f"""
    {_RECORD}
     WHERE project_id = $1
       AND request_id = $2
       AND request_id <> ''
       AND end_cause = ANY($3::smallint[])
     ORDER BY number
     LIMIT 1
"""
_CHARGED = [cause.value for cause in EndCause if cause.is_charged]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What a batch did.

    Attributes:
        new_count: settlements that were new.
        lost_slice_ids: slices that can no longer be spent from.
    """

    new_count: int
    lost_slice_ids: list[str]


class SettlementStore:
    """Settlements. Every method may be repeated; all raise Unavailable."""

    def __init__(self, database: Database, *, lease_s: float) -> None:
        self._database = database
        self._lease = timedelta(seconds=lease_s)
        # Batches wait for the head of the ledger anyway. Waiting here costs no connection, so
        # that slices can be acquired meanwhile.
        self._turn = asyncio.Lock()

    async def settle(
        self, settlements: Sequence[Settlement], slice_ids: Collection[str], now: datetime
    ) -> Settled:
        """Settles a batch and renews the leases of slices. Locks head and balances.

        What was settled before is left as it is: the first settlement of a generation counts.

        Args:
            settlements: in the order of the request, repeats included.
            slice_ids: slices to renew; those of the settlements are renewed too.
            now: time of records and entries.

        Raises:
            InvalidArgument: settlements name prices or accounts that are not there. Nothing of
                the batch is settled; repeating it without them will be.
        """
        named = {*slice_ids, *(item.slice_id for item in settlements)}
        amounts = await self._price(settlements)
        division = Division()
        async with self._turn, self._database.transaction() as connection:
            if settlements:
                division = await self._settle_new(connection, settlements, amounts, named, now)
            else:
                await lock_balances(connection, [], named)
            leased = await renew(connection, named, self._lease)
        _report(settlements, division)
        return Settled(new_count=len(division.records), lost_slice_ids=sorted(named - leased))

    async def _price(self, settlements: Sequence[Settlement]) -> list[Nanos]:
        prices = await find_prices(self._database, {item.price_id for item in settlements})
        unknown = [
            (index, "price", f"prices/{item.price_id}")
            for index, item in enumerate(settlements)
            if item.price_id not in prices
        ]
        _refuse(unknown)
        return [amount_of(item, prices[item.price_id]) for item in settlements]

    async def _settle_new(
        self,
        connection: Connection,
        settlements: Sequence[Settlement],
        amounts: Sequence[Nanos],
        slice_ids: Collection[str],
        now: datetime,
    ) -> Division:
        head = await lock_head(connection)
        # Whoever settles holds the head, so what is not there now stays away until the commit;
        # the primary key would refuse it all the same.
        settled = await _settled_ids(connection, [item.generation_id for item in settlements])
        balances = await lock_balances(
            connection, {item.account_id for item in settlements}, slice_ids
        )
        _check_accounts(settlements, balances)
        new: list[tuple[Settlement, Nanos]] = []
        for item, amount in zip(settlements, amounts, strict=True):
            if item.generation_id not in settled:
                settled.add(item.generation_id)
                new.append((item, amount))
        slices = await read_slices(connection, {item.slice_id for item, _ in new})
        division = divide(new, balances=balances, slices=slices, head=head, now=now)
        await _write(connection, division)
        return division

    async def find_charged(self, project_id: str, request_id: str) -> UsageRecord | None:
        """Reads the first record of a request that was charged; None when there is none.

        Args:
            project_id: who asked.
            request_id: the idempotency key, not empty.
        """
        row = await self._database.fetch_row(FIND_CHARGED, project_id, request_id, _CHARGED)
        return None if row is None else _record_from_row(row)

    async def list_records(
        self, account_id: str, page: Page, *, generation_id: str
    ) -> list[UsageRecord]:
        """Reads `page.read_size` records of an account by number.

        Args:
            account_id: whose.
            page: which.
            generation_id: only the record of this generation, when not empty.

        Raises:
            NotFound: there is no such account.
            InvalidArgument: BAD_PAGE_TOKEN.
        """
        after = number_after(page)
        async with self._database.transaction() as connection:
            if not await connection.fetchval(
                "SELECT EXISTS (SELECT FROM account WHERE account_id = $1)", account_id
            ):
                raise not_found(account_name(account_id))
            if generation_id:
                rows = await connection.fetch(
                    f"{_RECORD} WHERE account_id = $1 AND generation_id = $2",
                    account_id,
                    generation_id,
                )
            else:
                rows = await connection.fetch(
                    f"{_RECORD} WHERE account_id = $1 AND number > $2 ORDER BY number LIMIT $3",
                    account_id,
                    after,
                    page.read_size,
                )
        return [_record_from_row(row) for row in rows]


def _refuse(bad: list[tuple[int, str, str]]) -> None:
    """Refuses a batch for settlements that name what is not there: index, field, name."""
    if not bad:
        return
    violations = [
        Violation(f"settlements[{index}].{field}", FieldRule.CONFLICTING, f"{name} is not there")
        for index, field, name in bad[:_VIOLATIONS_MAX]
    ]
    first = violations[0]
    raise InvalidArgument(
        f"{first.field}: {first.description}",
        metadata={"field": first.field},
        violations=violations,
    )


def _check_accounts(settlements: Sequence[Settlement], balances: dict[str, Balance]) -> None:
    _refuse(
        [
            (index, "account", account_name(item.account_id))
            for index, item in enumerate(settlements)
            if item.account_id not in balances
        ]
    )


async def _settled_ids(connection: Connection, generation_ids: list[str]) -> set[str]:
    rows = await connection.fetch(
        "SELECT generation_id FROM usage_record WHERE generation_id = ANY($1::text[])",
        generation_ids,
    )
    return {row["generation_id"] for row in rows}


async def _write(connection: Connection, division: Division) -> None:
    if not division.records:
        return
    await _insert_records(connection, division.records)
    if division.entries:
        await insert_entries(connection, division.entries)
        await consume(connection, division.consumed)
        await change_balances(
            connection,
            posted={account_id: -taken for account_id, taken in division.posted_taken.items()},
            held={account_id: -taken for account_id, taken in division.held_taken.items()},
        )
    await advance_head(connection, entries=len(division.entries), records=len(division.records))


async def _insert_records(connection: Connection, records: Sequence[UsageRecord]) -> None:
    told = [record.settlement for record in records]
    await connection.execute(
        """
        INSERT INTO usage_record (
            generation_id, account_id, number, credit_slice_id, project_id, api_key_id,
            offering_id, model_id, version_id, price_id, input_tokens, output_tokens, amount,
            shortfall, end_cause, start_time, end_time, settle_time, request_id, request_sha256,
            cached_input_tokens, reasoning_tokens, labels, end_user
        )
        SELECT *
          FROM unnest(
                   $1::text[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::text[],
                   $7::text[], $8::text[], $9::text[], $10::text[], $11::bigint[], $12::bigint[],
                   $13::bigint[], $14::bigint[], $15::smallint[], $16::timestamptz[],
                   $17::timestamptz[], $18::timestamptz[], $19::text[], $20::bytea[], $21::bigint[],
                   $22::bigint[], $23::jsonb[], $24::text[]
               )
        """,
        [item.generation_id for item in told],
        [item.account_id for item in told],
        [record.number for record in records],
        [item.slice_id for item in told],
        [item.project_id for item in told],
        [item.api_key_id for item in told],
        [item.offering_id for item in told],
        [item.model_id for item in told],
        [item.version_id for item in told],
        [item.price_id for item in told],
        [item.input_tokens for item in told],
        [item.output_tokens for item in told],
        [record.amount for record in records],
        [record.shortfall for record in records],
        [item.end_cause.value for item in told],
        [item.start_time for item in told],
        [item.end_time for item in told],
        [record.settle_time for record in records],
        [item.request_id for item in told],
        [item.request_sha256 for item in told],
        [item.cached_input_tokens for item in told],
        [item.reasoning_tokens for item in told],
        [_labels_text(item.labels) for item in told],
        [item.end_user for item in told],
    )


def _labels_text(labels: Mapping[str, str]) -> str:
    # Most requests have none.
    return json.dumps(dict(labels)) if labels else "{}"


def _report(settlements: Sequence[Settlement], division: Division) -> None:
    metrics.SETTLEMENTS.labels("new").inc(len(division.records))
    metrics.SETTLEMENTS.labels("repeated").inc(len(settlements) - len(division.records))
    for record in division.late:
        metrics.SETTLEMENTS_LATE.inc()
        metrics.BAD_DEBT.inc(record.shortfall)
        log.warning(
            "settled without its slice",
            generation_id=record.settlement.generation_id,
            slice=record.settlement.slice_id,
            account=account_name(record.settlement.account_id),
            amount_nanos=record.amount,
            shortfall_nanos=record.shortfall,
        )


def _record_from_row(row: asyncpg.Record) -> UsageRecord:
    return UsageRecord(
        settlement=Settlement(
            generation_id=row["generation_id"],
            slice_id=row["credit_slice_id"],
            account_id=row["account_id"],
            project_id=row["project_id"],
            api_key_id=row["api_key_id"],
            offering_id=row["offering_id"],
            model_id=row["model_id"],
            version_id=row["version_id"],
            price_id=row["price_id"],
            input_tokens=row["input_tokens"],
            output_tokens=row["output_tokens"],
            end_cause=EndCause(row["end_cause"]),
            start_time=row["start_time"],
            end_time=row["end_time"],
            request_id=row["request_id"],
            request_sha256=row["request_sha256"],
            cached_input_tokens=row["cached_input_tokens"],
            reasoning_tokens=row["reasoning_tokens"],
            labels=json.loads(row["labels"]),
            end_user=row["end_user"],
        ),
        number=row["number"],
        amount=row["amount"],
        shortfall=row["shortfall"],
        settle_time=row["settle_time"],
    )
