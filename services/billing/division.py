"""How settlements divide among slices, accounts and bad debt, and the entries that follow.

Pure: no gRPC, no SQL, no clock. Amounts are nanos of USD.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from libs.units import Nanos, Rates
from services.billing.domain import (
    BAD_DEBT,
    REVENUE,
    Balance,
    Entry,
    EntryKind,
    Settlement,
    Slice,
    UsageRecord,
)


def amount_of(settlement: Settlement, rates: Rates) -> Nanos:
    """Prices a settlement; zero when its end is not charged."""
    if not settlement.end_cause.is_charged:
        return Nanos(0)
    return rates.charge(
        input_tokens=settlement.input_tokens,
        output_tokens=settlement.output_tokens,
        cached_input_tokens=settlement.cached_input_tokens,
        reasoning_tokens=settlement.reasoning_tokens,
        is_background=settlement.is_background,
    )


@dataclass(frozen=True, slots=True)
class Head:
    """How far ledger and usage are written."""

    entry_count: int
    record_count: int


@dataclass(slots=True)
class Division:
    """What a batch of settlements changes.

    Attributes:
        records: new usage records.
        entries: new ledger entries; they sum to zero.
        posted_taken: for each account, how much its posted falls.
        held_taken: for each account, how much its held falls.
        consumed: for each slice, how much was taken from it.
        late: records that their slice could not pay as a whole.
        contradicting: repeats that say something else than the first did, which counts.
    """

    records: list[UsageRecord] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    posted_taken: dict[str, int] = field(default_factory=dict)
    held_taken: dict[str, int] = field(default_factory=dict)
    consumed: dict[str, int] = field(default_factory=dict)
    late: list[UsageRecord] = field(default_factory=list)
    contradicting: list[Settlement] = field(default_factory=list)

    def take(self, account_id: str, slice_id: str, *, from_slice: int, from_available: int) -> None:
        """Takes money of one settlement."""
        posted = self.posted_taken.get(account_id, 0)
        self.posted_taken[account_id] = posted + from_slice + from_available
        if from_slice:
            self.held_taken[account_id] = self.held_taken.get(account_id, 0) + from_slice
            self.consumed[slice_id] = self.consumed.get(slice_id, 0) + from_slice


def divide(
    settlements: Iterable[tuple[Settlement, Nanos]],
    *,
    balances: Mapping[str, Balance],
    slices: Mapping[str, Slice],
    head: Head,
    now: datetime,
) -> Division:
    """Divides settlements among slices, accounts and bad debt.

    Each is paid from its slice. What the slice lacks, because it was closed, reclaimed, never
    there or of another account, is taken from what the account has available; what that lacks too
    is booked as bad debt, so that the floor holds and the entries sum to zero.

    Args:
        settlements: with their amounts; none was settled before, and each only once.
        balances: of all their accounts, locked.
        slices: of all their slices that there are.
        head: how far the ledger is written, locked.
        now: time of records and entries.
    """
    division = Division()
    remaining = {item.slice_id: item.remaining for item in slices.values()}
    available = {item.account_id: item.available for item in balances.values()}
    for settlement, amount in settlements:
        account_id = settlement.account_id
        slice_id = settlement.slice_id
        found = slices.get(slice_id)
        from_slice = 0
        if found is not None and found.account_id == account_id:
            from_slice = min(amount, remaining[slice_id])
            remaining[slice_id] -= from_slice
        from_available = min(amount - from_slice, available[account_id])
        available[account_id] -= from_available
        division.take(account_id, slice_id, from_slice=from_slice, from_available=from_available)
        record = UsageRecord(
            settlement=settlement,
            number=head.record_count + len(division.records) + 1,
            amount=amount,
            shortfall=Nanos(amount - from_slice - from_available),
            settle_time=now,
        )
        division.records.append(record)
        if from_slice < amount:
            division.late.append(record)
        division.entries.extend(entries_of(record, head.entry_count + len(division.entries) + 1))
    return division


def entries_of(record: UsageRecord, number: int) -> list[Entry]:
    """Lists the entries of a charge; they sum to zero. None when nothing is charged.

    Args:
        record: what was charged.
        number: of the first entry.
    """
    sides = [
        (record.settlement.account_id, -record.charge),
        (BAD_DEBT, -record.shortfall),
        (REVENUE, int(record.amount)),
    ]
    return movement(
        [(account_id, amount) for account_id, amount in sides if amount],
        number=number,
        kind=EntryKind.USAGE,
        source=record.settlement.generation_id,
        description="",
        now=record.settle_time,
    )


def movement(
    sides: Sequence[tuple[str, int]],
    *,
    number: int,
    kind: EntryKind,
    source: str,
    description: str,
    now: datetime,
    grant_id: str | None = None,
) -> list[Entry]:
    """Lists the entries of one movement of money.

    Args:
        sides: accounts and amounts, which sum to zero.
        number: of the first entry.
        kind: why money moves.
        source: what caused it.
        description: for people.
        now: when it is posted.
        grant_id: that the first account's entry gives or takes back.
    """
    assert sum([amount for _, amount in sides]) == 0
    return [
        Entry(
            number + index,
            account_id,
            number,
            amount,
            kind,
            source,
            description,
            now,
            None if index else grant_id,
        )
        for index, (account_id, amount) in enumerate(sides)
    ]
