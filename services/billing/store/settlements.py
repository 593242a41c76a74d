"""Settlements and the usage records that they leave."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from libs import failpoints
from libs.errors import FieldRule, InvalidArgument, Violation
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
    charge,
    insert_entries,
    lock_balances,
    lock_head,
)
from services.billing.store.prices import find_prices
from services.billing.store.receipts import CheckReceipts, insert_receipts, keep_nothing
from services.billing.store.records import RECORD, insert_records, record_from_row
from services.billing.store.slice_rows import read_slices, renew
from services.billing.store.spend import NoSpendWindows, SpendWindows

log = structlog.get_logger(__name__)

_VIOLATIONS_MAX = 16
# What a repeat may not contradict; as Settlement.counts.
_COUNTS = """
    SELECT generation_id, account_id, price_id, input_tokens, output_tokens, cached_input_tokens,
           reasoning_tokens, end_cause, is_background
      FROM usage_record
     WHERE generation_id = ANY($1::text[])
"""
# Says what the partial index says, or the planner could not use it for a request_id to come.
FIND_CHARGED = f"""
    {RECORD}
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

    def __init__(
        self,
        database: Database,
        *,
        lease_s: float,
        check_receipts: CheckReceipts = keep_nothing,
        spend: SpendWindows | None = None,
    ) -> None:
        self._database = database
        self._spend = spend or NoSpendWindows()
        self._check_receipts = check_receipts
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
        receipts = await self._check_receipts(settlements, amounts)
        division = Division()
        async with self._turn, self._database.transaction() as connection:
            if settlements:
                division = await self._settle_new(connection, settlements, amounts, named, now)
                await insert_receipts(connection, division.records, receipts)
                failpoints.hit(failpoints.Point.SETTLE_WRITTEN)
            else:
                await lock_balances(connection, [], named)
            leased = await renew(connection, named, self._lease, division.consumed)
        if settlements:
            failpoints.hit(failpoints.Point.SETTLE_COMMITTED)
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
        rates = {price_id: price.rates for price_id, price in prices.items()}
        return [amount_of(item, rates[item.price_id]) for item in settlements]

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
        counts = await _read_counts(connection, [item.generation_id for item in settlements])
        balances = await lock_balances(
            connection, {item.account_id for item in settlements}, slice_ids
        )
        _check_accounts(settlements, balances)
        new: list[tuple[Settlement, Nanos]] = []
        contradicting: list[Settlement] = []
        for item, amount in zip(settlements, amounts, strict=True):
            first = counts.get(item.generation_id)
            if first is None:
                counts[item.generation_id] = item.counts
                new.append((item, amount))
            elif first != item.counts:
                contradicting.append(item)
        slices = await read_slices(connection, {item.slice_id for item, _ in new})
        division = divide(new, balances=balances, slices=slices, head=head, now=now)
        division.contradicting = contradicting
        await _write(connection, division)
        limited = {name for name, item in balances.items() if item.has_spend_limits}
        if limited:
            await self._tell_limits(connection, division, limited)
        return division

    async def _tell_limits(
        self, connection: Connection, division: Division, limited: Collection[str]
    ) -> None:
        """Tells spend limits what was charged to accounts that have some."""
        records = [item for item in division.records if item.settlement.account_id in limited]
        slice_ids = {item.settlement.slice_id for item in records}
        consumed = {
            slice_id: taken
            for slice_id, taken in division.consumed.items()
            if slice_id in slice_ids
        }
        if records:
            await self._spend.settle(connection, records, consumed)

    async def find_charged(self, project_id: str, request_id: str) -> UsageRecord | None:
        """Reads the first record of a request that was charged; None when there is none.

        Args:
            project_id: who asked.
            request_id: the idempotency key, not empty.
        """
        row = await self._database.fetch_row(FIND_CHARGED, project_id, request_id, _CHARGED)
        return None if row is None else record_from_row(row)


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


async def _read_counts(
    connection: Connection, generation_ids: list[str]
) -> dict[str, tuple[object, ...]]:
    """Reads what was settled before, as `Settlement.counts`, by generation."""
    rows = await connection.fetch(_COUNTS, generation_ids)
    return {row["generation_id"]: tuple(row.values())[1:] for row in rows}


async def _write(connection: Connection, division: Division) -> None:
    if not division.records:
        return
    await insert_records(connection, division.records)
    if division.entries:
        await insert_entries(connection, division.entries)
        await charge(
            connection,
            posted={account_id: -taken for account_id, taken in division.posted_taken.items()},
            held={account_id: -taken for account_id, taken in division.held_taken.items()},
        )
    await advance_head(connection, entries=len(division.entries), records=len(division.records))


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
    for item in division.contradicting:
        metrics.SETTLEMENTS_CONTRADICTED.inc()
        log.warning(
            "settled again with other counts",
            generation_id=item.generation_id,
            slice=item.slice_id,
            account=account_name(item.account_id),
        )
