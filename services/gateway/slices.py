"""Credit slices: money that billing has set aside for this gateway, spent without asking again.

Every generation is held on one slice for its worst case before anything is sent to a worker, so
what can be owed never exceeds what is set aside. The book belongs to one event loop; only
`reserve` suspends, and only when no slice at hand has enough.

    granted = free + held + owed + settled
    held     worst cases of running generations
    owed     charges that have ended and are not yet known to be durable
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from libs.clock import Clock
from libs.errors import FailedPrecondition, NotFound, Reason, ResourceExhausted

# A lease is not used in its last seconds: the clocks of two machines may run apart a little.
LEASE_MARGIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Grant:
    """What billing answers to AcquireSlice.

    Attributes:
        granted_nanos: set aside.
        lease_s: counted from when it was asked for.
    """

    granted_nanos: int
    lease_s: float


Acquire = Callable[[str, str, int, int], Awaitable[Grant]]
"""Asks billing: slice id, account, required nanos, wanted nanos. Raises FailedPrecondition or
NotFound when nothing was set aside for sure."""

Close = Callable[[list[str]], Awaitable[None]]
"""Gives slices back."""


@dataclass(slots=True)
class Slice:
    """One slice at hand. Amounts in nanos; times monotonic seconds."""

    slice_id: str
    account: str
    free: int
    lease_until_s: float
    used_at_s: float
    held: int = 0
    owed: int = 0
    is_lost: bool = False

    @property
    def is_busy(self) -> bool:
        """Whether something still depends on it."""
        return self.held > 0 or self.owed > 0


@dataclass(slots=True)
class Hold:
    """The worst case of one generation, set aside on one slice.

    Attributes:
        slice: that it is taken from.
        nanos: still held.
    """

    slice: Slice
    nanos: int


@dataclass(slots=True)
class _Account:
    slices: list[Slice] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0


class SliceBook:
    """All slices of this gateway."""

    def __init__(
        self,
        *,
        acquire: Acquire,
        close: Close,
        new_id: Callable[[], str],
        clock: Clock,
        slice_nanos: int,
        slices_max: int,
    ) -> None:
        self._acquire = acquire
        self._close = close
        self._new_id = new_id
        self._clock = clock
        self._slice_nanos = slice_nanos
        self._slices_max = slices_max
        self._accounts: dict[str, _Account] = {}
        self._by_id: dict[str, Slice] = {}
        # Asked for, and the answer never came: they may be held, so they are given back.
        self._orphans: list[str] = []

    async def reserve(self, account: str, nanos: int) -> Hold:
        """Holds an amount, on a slice at hand or on a new one.

        Raises:
            FailedPrecondition: INSUFFICIENT_CREDIT.
            ResourceExhausted: too many slices are open.
            Unavailable: billing is away and no slice at hand has enough.
        """
        entry = self._accounts.setdefault(account, _Account())
        hold = self._take(entry, nanos)
        if hold is not None:
            return hold
        entry.waiting += 1
        try:
            async with entry.lock:
                # Whoever had the lock may have brought a slice that is enough for us too.
                hold = self._take(entry, nanos)
                return hold if hold is not None else await self._reserve_new(account, entry, nanos)
        finally:
            entry.waiting -= 1

    def try_grow(self, hold: Hold, nanos: int) -> bool:
        """Adds to a hold from the rest of its own slice; tells whether there was enough."""
        if hold.slice.free < nanos:
            return False
        hold.slice.free -= nanos
        hold.slice.held += nanos
        hold.nanos += nanos
        return True

    def shrink(self, hold: Hold, nanos: int) -> None:
        """Returns what is held above `nanos`."""
        surplus = hold.nanos - nanos
        assert surplus >= 0
        hold.nanos = nanos
        hold.slice.held -= surplus
        hold.slice.free += surplus

    def release(self, hold: Hold) -> None:
        """Returns all of it: nothing is owed. May be repeated."""
        self.shrink(hold, 0)
        hold.slice.used_at_s = self._clock.monotonic_s()

    def owe(self, hold: Hold, nanos: int) -> None:
        """Turns a hold into a charge that waits for its settlement."""
        self.shrink(hold, nanos)
        hold.nanos = 0
        hold.slice.held -= nanos
        hold.slice.owed += nanos
        hold.slice.used_at_s = self._clock.monotonic_s()

    def settled(self, slice_id: str, nanos: int) -> None:
        """Says that a charge is durable."""
        found = self._by_id.get(slice_id)
        if found is not None:
            found.owed -= nanos

    def renewed(self, slice_ids: list[str], lease_until_s: float) -> None:
        """Says that leases were prolonged."""
        for slice_id in slice_ids:
            found = self._by_id.get(slice_id)
            if found is not None:
                found.lease_until_s = lease_until_s

    def lost(self, slice_ids: list[str]) -> None:
        """Says that slices can no longer be spent from. What is owed on them settles late."""
        for slice_id in slice_ids:
            found = self._by_id.get(slice_id)
            if found is not None:
                found.is_lost = True

    def open_ids(self) -> list[str]:
        """Returns the slices whose lease has to be renewed."""
        return [item.slice_id for item in self._by_id.values() if not item.is_lost]

    async def close_idle(self, idle_s: float) -> int:
        """Gives back slices that nothing depends on; returns how many.

        Args:
            idle_s: how long a slice has to be unused; 0 for all that are not busy.

        Raises:
            Unavailable: billing is away; the slices stay at hand.
        """
        await self._close_orphans()
        before_s = self._clock.monotonic_s() - idle_s
        idle = [
            item for item in self._by_id.values() if not item.is_busy and item.used_at_s <= before_s
        ]
        await self._give_back(idle)
        return len(idle)

    async def _close_orphans(self) -> None:
        orphans = self._orphans[:]
        if orphans:
            await self._close(orphans)
            self._orphans = self._orphans[len(orphans) :]

    async def _reserve_new(self, account: str, entry: _Account, nanos: int) -> Hold:
        if len(self._by_id) >= self._slices_max:
            raise ResourceExhausted("too many credit slices are open", retry_after_s=1.0)
        try:
            return await self._acquire_new(account, entry, nanos)
        except FailedPrecondition as error:
            idle = [item for item in entry.slices if not item.is_busy]
            if error.reason is not Reason.INSUFFICIENT_CREDIT or not idle:
                raise
        # Near the end of a balance the rests of our own slices may be what is missing.
        await self._give_back(idle)
        return await self._acquire_new(account, entry, nanos)

    async def _acquire_new(self, account: str, entry: _Account, nanos: int) -> Hold:
        slice_id = self._new_id()
        asked_at_s = self._clock.monotonic_s()
        try:
            grant = await self._acquire(slice_id, account, nanos, max(nanos, self._slice_nanos))
        except (FailedPrecondition, NotFound):
            raise
        except BaseException:
            self._orphans.append(slice_id)
            raise
        fresh = Slice(
            slice_id=slice_id,
            account=account,
            free=grant.granted_nanos,
            lease_until_s=asked_at_s + grant.lease_s - LEASE_MARGIN_S,
            used_at_s=self._clock.monotonic_s(),
        )
        entry.slices.append(fresh)
        self._by_id[slice_id] = fresh
        return self._hold(fresh, nanos)

    def _take(self, entry: _Account, nanos: int) -> Hold | None:
        now_s = self._clock.monotonic_s()
        for item in entry.slices:
            if item.free >= nanos and not item.is_lost and item.lease_until_s > now_s:
                return self._hold(item, nanos)
        return None

    def _hold(self, item: Slice, nanos: int) -> Hold:
        item.free -= nanos
        item.held += nanos
        item.used_at_s = self._clock.monotonic_s()
        return Hold(item, nanos)

    async def _give_back(self, slices: list[Slice]) -> None:
        if not slices:
            return
        for item in slices:
            # Out of reach before the call: nothing may be taken while it is given back.
            item.is_lost = True
        try:
            await self._close([item.slice_id for item in slices])
        except BaseException:
            for item in slices:
                # Unknown whether it is closed; try again later, and spend nothing from it.
                item.used_at_s = 0.0
            raise
        for item in slices:
            del self._by_id[item.slice_id]
            entry = self._accounts[item.account]
            entry.slices.remove(item)
            if not entry.slices and not entry.waiting:
                del self._accounts[item.account]
