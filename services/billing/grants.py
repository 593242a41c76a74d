"""Grants: credit that is given once and used up in an order, and what expires of it.

Pure: no gRPC, no SQL, no clock. Amounts are nanos of USD.

Of every account, the remaining parts of its grants sum to what is posted, or to zero while that is
negative: so new money fills what an account owes first, and only the rest of it can be used up.
What was booked as bad debt is not owed; nobody pays it later.

What slices hold is of those grants that charges would use up first. When a grant expires, what of
it is held stays for the slices that were there at that moment, and the rest is taken back at once.
As they close, the rest of what they held is taken back, too; what they spend is a charge as any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import MAXYEAR, UTC, datetime

from libs.errors import InvalidArgument, Reason
from services.billing.domain import Balance, Entry, GrantKind, account_name

PRIORITY_DEFAULT = 50
PRIORITY_MAX = 100
# Grants of entries are named by them; no other grant may be.
ENTRY_PREFIX = "entry-"
_NEVER = datetime(MAXYEAR, 12, 31, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Credit of an account.

    Attributes:
        account_id: whose.
        grant_id: last part of its name, unique for the account.
        number: of the entry that gave it.
        kind: whether somebody paid for it.
        amount: what was given; positive.
        remaining: what charges have left of it.
        priority: 0 to 100; the lowest is used up first.
        expire_time: on the clock of leases; None when it does not expire.
        create_time: when it was given.
        description: for people.
    """

    account_id: str
    grant_id: str
    number: int
    kind: GrantKind
    amount: int
    remaining: int
    priority: int
    expire_time: datetime | None
    create_time: datetime
    description: str

    @property
    def name(self) -> str:
        """Resource name."""
        return f"{account_name(self.account_id)}/grants/{self.grant_id}"

    @property
    def order(self) -> tuple[int, datetime, int]:
        """Sorts grants by when they are used up."""
        return (self.priority, self.expire_time or _NEVER, self.number)

    def is_repeat_of(self, stored: Grant) -> bool:
        """Tells whether creating this again asks for what is stored."""
        mine = dataclasses.replace(
            self,
            number=stored.number,
            remaining=stored.remaining,
            create_time=stored.create_time,
        )
        return mine == stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Refund:
    """An operator's wish to give a charge back.

    Attributes:
        account_id: who paid.
        generation_id: for what.
        amount: nanos, positive; None for all that was not given back.
        request_id: unique for the account.
        description: for people.
    """

    account_id: str
    generation_id: str
    amount: int | None
    request_id: str
    description: str

    @property
    def record_name(self) -> str:
        """Resource name of the usage record."""
        return f"{account_name(self.account_id)}/usageRecords/{self.generation_id}"


def request_id_reused(request_id: str) -> InvalidArgument:
    """Makes the error for a request_id that was used for something else."""
    return InvalidArgument(
        "request_id: was used with other content",
        reason=Reason.REQUEST_ID_REUSED,
        metadata={"requestId": request_id},
    )


def grant_of_entry(number: int) -> str:
    """Returns the id of the grant that an entry makes, which has none of its own."""
    return f"{ENTRY_PREFIX}{number}"


def grant_by_entry(entry: Entry) -> Grant:
    """Makes the grant of an entry that gives something and names no grant of its own."""
    return Grant(
        account_id=entry.account_id,
        grant_id=grant_of_entry(entry.number),
        number=entry.number,
        kind=GrantKind.GIFT,
        amount=entry.amount,
        remaining=entry.amount,
        priority=PRIORITY_DEFAULT,
        expire_time=None,
        create_time=entry.create_time,
        description=entry.description,
    )


def remaining_of(posted: int, amount: int) -> int:
    """Returns what a new grant has left once it has filled what the account owes.

    Args:
        posted: of the account before.
        amount: of the grant.
    """
    return max(0, posted + amount) - max(0, posted)


def expired_parts(
    balance: Balance,
    live: Iterable[Grant],
    *,
    now: datetime,
    held_since: Callable[[datetime], int],
) -> list[tuple[Grant, int]]:
    """Tells what of which grants can be taken back.

    Args:
        balance: of the account.
        live: its grants with something left.
        now: on the clock of leases.
        held_since: what is left of the account's slices that were acquired before a time.

    Returns:
        Grants and positive amounts, which never take the balance below what is held and the limit.
    """
    spare = max(0, balance.posted - balance.held + balance.credit_limit)
    before = 0
    parts: list[tuple[Grant, int]] = []
    for grant in sorted(live, key=lambda item: item.order):
        kept = grant.remaining
        if grant.expire_time is not None and grant.expire_time <= now:
            kept = min(kept, max(0, held_since(grant.expire_time) - before))
            part = min(grant.remaining - kept, spare)
            kept = grant.remaining - part
            spare -= part
            if part:
                parts.append((grant, part))
        before += kept
    return parts


def next_expiry(live: Sequence[Grant]) -> datetime | None:
    """Returns when the first of the grants expires; None when none does."""
    return min((grant.expire_time for grant in live if grant.expire_time), default=None)
