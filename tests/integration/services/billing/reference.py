"""The ledger as a page of plain Python: what the real one is compared with.

One settlement after the other, no batches, no locks. A token of the prompt costs two nanos, one
that the prefix cache had half a nano, a token of the output one, of reasoning three, a request
three; requests in the background a quarter less.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

LEASE_S = 1000
GRACE_S = 2000


# Nanos per million tokens.
INPUT_PRICE = 2_000_000
CACHED_INPUT_PRICE = 500_000
OUTPUT_PRICE = 1_000_000
REASONING_PRICE = 3_000_000
REQUEST_PRICE = 3
DISCOUNT_PERCENT = 25
PRIORITY = 50


def cost(counts: tuple[int, int, int, int], *, background: bool) -> int:
    """What a generation costs: fresh and cached input, output and reasoning.

    Two lines of input that cost more than one are one.
    """
    fresh, cached, output, reasoning = counts
    paid = Fraction(3, 4) if background else Fraction(1)
    whole = ceil(2 * (fresh + cached) * paid)
    parts = ceil(2 * fresh * paid) + ceil(Fraction(cached, 2) * paid)
    written = ceil(output * paid) + ceil(3 * reasoning * paid)
    dearest = ceil((3 if reasoning else 1) * (output + reasoning) * paid)
    return min(whole, parts) + min(written, dearest) + ceil(3 * paid)


class Refused(Exception):
    """The reason with which a call fails."""


@dataclass
class Slice:
    account: str | None
    granted: int = 0
    consumed: int = 0
    state: str = "open"
    expires_at: float = 0
    acquired_at: float = 0

    @property
    def rest(self) -> int:
        return self.granted - self.consumed if self.state in {"open", "expired"} else 0


@dataclass
class Grant:
    remaining: int
    priority: int
    expires_at: float
    number: int

    @property
    def order(self) -> tuple[int, float, int]:
        return (self.priority, self.expires_at, self.number)


@dataclass
class Money:
    """What a call that is refused leaves as it was."""

    posted: dict[str, int] = field(default_factory=dict)
    grants: dict[str, list[Grant]] = field(default_factory=dict)


@dataclass
class Reference:
    """Accounts, grants, slices and charges. Times are in seconds."""

    now: float = 0
    lease_s: float = LEASE_S
    grace_s: float = GRACE_S
    money: Money = field(default_factory=Money)
    limits: dict[str, int] = field(default_factory=dict)
    slices: dict[str, Slice] = field(default_factory=dict)
    charges: dict[str, tuple[str, int]] = field(default_factory=dict)
    refunded: dict[str, int] = field(default_factory=dict)
    revenue: int = 0
    bad_debt: int = 0
    numbers: int = 0

    def open(self, account: str) -> None:
        self.money.posted[account] = 0
        self.money.grants[account] = []
        self.limits[account] = 0

    def held(self, account: str) -> int:
        return sum(item.rest for item in self.slices.values() if item.account == account)

    def available(self, account: str) -> int:
        return max(0, self.money.posted[account] - self.held(account) + self.limits[account])

    def live(self, account: str) -> list[Grant]:
        """In the order in which they are used up."""
        found = [grant for grant in self.money.grants[account] if grant.remaining]
        return sorted(found, key=lambda grant: grant.order)

    def is_leased(self, slice_id: str) -> bool:
        found = self.slices.get(slice_id)
        return found is not None and found.state == "open" and found.expires_at > self.now

    @contextmanager
    def refusable(self) -> Iterator[None]:
        before = copy.deepcopy(self.money)
        try:
            yield
        except Refused:
            self.money = before
            raise

    def give(
        self, account: str, amount: int, priority: int = PRIORITY, expires_at: float = float("inf")
    ) -> None:
        with self.refusable():
            self.expire(account)
            owed = max(0, -self.money.posted[account])
            self.numbers += 1
            self.money.grants[account].append(
                Grant(max(0, amount - owed), priority, expires_at, self.numbers)
            )
            self.money.posted[account] += amount

    def take(self, account: str, amount: int) -> None:
        self.money.posted[account] -= amount
        excess = sum(grant.remaining for grant in self.live(account))
        excess -= max(0, self.money.posted[account])
        for grant in self.live(account):
            part = min(grant.remaining, excess)
            grant.remaining -= part
            excess -= part

    def post(self, account: str, amount: int) -> None:
        if amount > 0:
            self.give(account, amount)
            return
        with self.refusable():
            self.expire(account)
            if self.available(account) + amount < 0:
                raise Refused("INSUFFICIENT_CREDIT")
            self.take(account, -amount)

    def expire(self, account: str) -> None:
        """What slices from before hold stays theirs; they hold what is used up first."""
        before = 0
        for grant in self.live(account):
            if grant.expires_at <= self.now:
                held = sum(
                    item.rest
                    for item in self.slices.values()
                    if item.account == account and item.acquired_at < grant.expires_at
                )
                kept = min(grant.remaining, max(0, held - before))
                self.money.posted[account] -= grant.remaining - kept
                grant.remaining = kept
            before += grant.remaining

    def acquire(self, slice_id: str, account: str, required: int, wanted: int) -> int:
        with self.refusable():
            self.expire(account)
            found = self.slices.get(slice_id)
            if found is not None:
                if not self.is_leased(slice_id):
                    raise Refused("SLICE_NOT_OPEN")
                if found.account != account:
                    raise Refused("RESOURCE_EXISTS")
                found.expires_at = self.now + self.lease_s
                return found.granted
            available = self.available(account)
            if available < required:
                raise Refused("INSUFFICIENT_CREDIT")
            granted = min(max(required, wanted), available)
            self.slices[slice_id] = Slice(
                account, granted, expires_at=self.now + self.lease_s, acquired_at=self.now
            )
            return granted

    def settle(self, generation: str, slice_id: str, account: str, amount: int) -> bool:
        """Tells whether it is new."""
        if generation in self.charges:
            return False
        found = self.slices.get(slice_id)
        from_slice = 0
        if found is not None and found.account == account:
            from_slice = min(amount, found.rest)
        from_account = min(amount - from_slice, self.available(account))
        if found is not None:
            found.consumed += from_slice
        self.take(account, from_slice + from_account)
        self.charges[generation] = (account, from_slice + from_account)
        self.revenue += amount
        self.bad_debt -= amount - from_slice - from_account
        return True

    def refund(self, generation: str, account: str, amount: int | None) -> None:
        if generation not in self.charges or self.charges[generation][0] != account:
            raise Refused("RESOURCE_NOT_FOUND")
        left = self.charges[generation][1] - self.refunded.get(generation, 0)
        if left == 0:
            raise Refused("WRONG_STATE")
        if amount is None:
            amount = left
        if amount > left:
            raise Refused("INVALID_FIELD")
        self.give(account, amount)
        self.refunded[generation] = self.refunded.get(generation, 0) + amount
        self.revenue -= amount

    def renew(self, slice_ids: set[str]) -> list[str]:
        """Returns those that are lost."""
        for slice_id in slice_ids:
            if self.is_leased(slice_id):
                self.slices[slice_id].expires_at = self.now + self.lease_s
        return sorted(item for item in slice_ids if not self.is_leased(item))

    def close(self, slice_ids: list[str]) -> None:
        for slice_id in slice_ids:
            found = self.slices.setdefault(slice_id, Slice(None))
            if found.state in {"open", "expired"}:
                found.state = "closed"

    def sweep(self) -> None:
        for item in self.slices.values():
            if item.state == "open" and item.expires_at <= self.now:
                item.state = "expired"
            if item.state == "expired" and item.expires_at + self.grace_s <= self.now:
                item.state = "reclaimed"
        for account in self.money.posted:
            self.expire(account)
