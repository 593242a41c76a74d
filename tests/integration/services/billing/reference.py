"""The ledger as a page of plain Python: what the real one is compared with.

One settlement after the other, no batches, no locks. A token of the prompt costs two nanos, one
that the prefix cache had half a nano, a token of the output one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LEASE_S = 1000
GRACE_S = 2000


# Nanos per million tokens.
INPUT_PRICE = 2_000_000
CACHED_INPUT_PRICE = 500_000
OUTPUT_PRICE = 1_000_000


def cost(fresh: int, cached: int, output: int) -> int:
    """What a generation costs; half nanos are rounded up."""
    return 2 * fresh + (cached + 1) // 2 + output


class Refused(Exception):
    """The reason with which a call fails."""


@dataclass
class Slice:
    account: str | None
    granted: int = 0
    consumed: int = 0
    state: str = "open"
    expires_at: int = 0

    @property
    def rest(self) -> int:
        return self.granted - self.consumed if self.state in {"open", "expired"} else 0


@dataclass
class Reference:
    """Accounts, slices and charges."""

    now: int = 0
    posted: dict[str, int] = field(default_factory=dict)
    slices: dict[str, Slice] = field(default_factory=dict)
    charges: dict[str, int] = field(default_factory=dict)
    revenue: int = 0
    bad_debt: int = 0

    def held(self, account: str) -> int:
        return sum(item.rest for item in self.slices.values() if item.account == account)

    def available(self, account: str) -> int:
        return self.posted[account] - self.held(account)

    def is_leased(self, slice_id: str) -> bool:
        found = self.slices.get(slice_id)
        return found is not None and found.state == "open" and found.expires_at > self.now

    def post(self, account: str, amount: int) -> None:
        if self.available(account) + amount < 0:
            raise Refused("INSUFFICIENT_CREDIT")
        self.posted[account] += amount

    def acquire(self, slice_id: str, account: str, required: int, wanted: int) -> int:
        found = self.slices.get(slice_id)
        if found is not None:
            if not self.is_leased(slice_id):
                raise Refused("SLICE_NOT_OPEN")
            if found.account != account:
                raise Refused("RESOURCE_EXISTS")
            found.expires_at = self.now + LEASE_S
            return found.granted
        available = self.available(account)
        if available < required:
            raise Refused("INSUFFICIENT_CREDIT")
        granted = min(max(required, wanted), available)
        self.slices[slice_id] = Slice(account, granted, expires_at=self.now + LEASE_S)
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
        self.posted[account] -= from_slice + from_account
        self.charges[generation] = from_slice + from_account
        self.revenue += amount
        self.bad_debt -= amount - from_slice - from_account
        return True

    def renew(self, slice_ids: set[str]) -> list[str]:
        """Returns those that are lost."""
        for slice_id in slice_ids:
            if self.is_leased(slice_id):
                self.slices[slice_id].expires_at = self.now + LEASE_S
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
            if item.state == "expired" and item.expires_at + GRACE_S <= self.now:
                item.state = "reclaimed"
