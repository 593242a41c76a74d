"""Credit slices: money that billing has set aside, spent here without asking again.

Every generation is held on one slice for its worst case before anything is sent to a worker, so
what can be owed never exceeds what is set aside. The book belongs to one event loop; only
`reserve` suspends, and only when no slice at hand has enough.

    granted = free + held + owed + settled
    held     worst cases of running generations
    owed     charges that have ended and are not yet known to be durable

A slice is as large as the demand of its purse says (demand.py), and the next one is asked for in
the background when half of the last one is set aside. As long as that is not known slices grow with
the burst; and near the end of a purse a slice has what the requests need that wait for it, to the
nano: nothing is kept from others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import structlog

from libs import failpoints
from libs.clock import Clock
from libs.errors import (
    FailedPrecondition,
    MaasError,
    NotFound,
    Reason,
    ResourceExhausted,
    unavailable,
)
from services.gateway.demand import Demand
from services.gateway.refusals import Refusal

log = structlog.get_logger(__name__)

# A lease is not used in its last seconds: the clocks of two machines may run apart a little.
LEASE_MARGIN_S = 2.0
# After a purse had less than was wanted, it is left alone but for what requests need.
NEAR_FLOOR_S = 2.0
# Of two lengths of a lease that are meant to be the same: messages round.
LEASE_ROUNDING_S = 0.001
# Nothing is set aside, and that is sure.
_IS_EMPTY = {Reason.INSUFFICIENT_CREDIT, Reason.SPEND_LIMIT_REACHED}


class Purse(NamedTuple):
    """What requests spend from: an account, or the part of it that a spend limit is of.

    Attributes:
        account: "accounts/{account}".
        project: "projects/{project}", where a spend limit names it or the key; else empty.
        api_key: "apiKeys/{key}", where a spend limit names it; else empty.
        is_limited: a spend limit bounds it: its slices are of a window, and end with it.
    """

    account: str
    project: str = ""
    api_key: str = ""
    is_limited: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """What billing answers to AcquireSlice.

    Attributes:
        granted_nanos: set aside.
        lease_s: counted from when it was asked for.
    """

    granted_nanos: int
    lease_s: float


Acquire = Callable[[str, Purse, int, int], Awaitable[Grant]]
"""Asks billing: slice id, purse, required nanos, wanted nanos. Raises FailedPrecondition, NotFound
or SPEND_LIMIT_REACHED when nothing was set aside for sure."""

Close = Callable[[list[str]], Awaitable[None]]
"""Gives slices back."""

Start = Callable[[Coroutine[None, None, None]], object]
"""Runs something in the background."""


@dataclass(slots=True)
class Slice:
    """One slice at hand. Amounts in nanos; times monotonic seconds.

    Attributes:
        lease_s: length of the lease that it came with: shorter than others where the window of a
            spend limit ends before.
    """

    slice_id: str
    purse: Purse
    free: int
    lease_s: float
    lease_until_s: float
    used_at_s: float
    held: int = 0
    owed: int = 0
    is_lost: bool = False

    @property
    def account(self) -> str:
        """Resource name of who pays."""
        return self.purse.account

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
class _Entry:
    """One purse.

    Attributes:
        waiting_nanos: what requests need that wait for a slice.
        turns: questions to billing so far.
        refusal: the last answer that was no slice.
        exact_until_s: monotonic; until then only what requests need is asked for.
    """

    demand: Demand
    slices: list[Slice] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    waiting_nanos: int = 0
    turns: int = 0
    refusal: Refusal | None = None
    exact_until_s: float = float("-inf")
    is_refilling: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large slices become.

    Attributes:
        nanos_max: most nanos of a slice; a request that needs more gets more.
        refill_s: seconds; a slice is to last for two of these.
        count_max: open slices; one more is refused.
    """

    nanos_max: int
    refill_s: float
    count_max: int


class SliceBook:
    """All slices of this gateway."""

    def __init__(
        self,
        *,
        acquire: Acquire,
        close: Close,
        new_id: Callable[[], str],
        clock: Clock,
        sizes: Sizes,
        start: Start,
    ) -> None:
        self._acquire = acquire
        self._close = close
        self._new_id = new_id
        self._clock = clock
        self._sizes = sizes
        self._start = start
        self._entries: dict[Purse, _Entry] = {}
        self._by_id: dict[str, Slice] = {}
        # Asked for, and the answer never came: they may be held, so they are given back. At most
        # `sizes.count_max` of them: while billing is away each request would add one.
        self._orphans: list[str] = []
        self._is_closing = False

    async def reserve(self, purse: Purse, nanos: int) -> Hold:
        """Holds an amount, on a slice at hand or on a new one.

        Raises:
            FailedPrecondition: INSUFFICIENT_CREDIT.
            ResourceExhausted: SPEND_LIMIT_REACHED, or too many slices are open.
            Unavailable: billing is away and no slice at hand has enough.
        """
        entry = self._entries.get(purse)
        if entry is None:
            entry = self._entries[purse] = _Entry(Demand(self._sizes.refill_s))
        hold = self._take(purse, entry, nanos)
        if hold is not None:
            return hold
        turn = entry.turns
        entry.waiting += 1
        entry.waiting_nanos += nanos
        try:
            async with entry.lock:
                # Whoever had the lock may have brought a slice that is enough for us too.
                hold = self._take(purse, entry, nanos)
                if hold is not None:
                    return hold
                if entry.refusal is not None:
                    entry.refusal.repeat(turn, nanos)
                return await self._reserve_new(purse, entry, nanos)
        finally:
            entry.waiting -= 1
            entry.waiting_nanos -= nanos
            self._drop(purse)

    def try_grow(self, hold: Hold, nanos: int) -> bool:
        """Adds to a hold from the rest of its own slice; tells whether there was enough.

        A slice that is lost has no rest: billing has it back, or will soon.
        """
        if hold.slice.is_lost or hold.slice.free < nanos:
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

    def renewed(self, slice_ids: list[str], asked_at_s: float, lease_s: float) -> None:
        """Says that leases were prolonged.

        Slices of a window keep the lease that they came with: it does not outlast the window, and
        what is said here is of all leases together. The next slice is at hand once it is asked for.

        Args:
            slice_ids: of these.
            asked_at_s: monotonic; when.
            lease_s: seconds from then on.
        """
        for slice_id in slice_ids:
            found = self._by_id.get(slice_id)
            if found is None or found.purse.is_limited:
                continue
            # One with a shorter lease is of a window too, of a limit that is not known here yet.
            if found.lease_s >= lease_s - LEASE_ROUNDING_S:
                found.lease_until_s = asked_at_s + lease_s - LEASE_MARGIN_S

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

    async def close_all(self) -> bool:
        """Gives back all that is not busy, and asks for nothing ahead any more.

        Returns:
            whether no slice can come any more that nobody has asked for.

        Raises:
            Unavailable: billing is away; the slices stay at hand.
        """
        self._is_closing = True
        await self.close_idle(0.0)
        return not any(entry.is_refilling for entry in self._entries.values())

    async def _close_orphans(self) -> None:
        orphans = self._orphans[:]
        if orphans:
            await self._close(orphans)
            # By name: others may have given the same ones back meanwhile, and more have come.
            given = set(orphans)
            self._orphans = [name for name in self._orphans if name not in given]

    async def _reserve_new(self, purse: Purse, entry: _Entry, nanos: int) -> Hold:
        wanted = self._wanted(entry, nanos)
        try:
            try:
                fresh = await self._acquire_new(purse, entry, nanos, wanted)
            except MaasError as error:
                idle = self._idle_of(purse.account)
                if error.reason not in _IS_EMPTY or not idle:
                    raise
                # Near the end of a balance the rests of our own slices may be what is missing.
                await self._give_back(idle)
                fresh = await self._acquire_new(purse, entry, nanos, nanos)
        except MaasError as error:
            entry.refusal = Refusal(entry.turns, nanos, error)
            entry.exact_until_s = self._clock.monotonic_s() + NEAR_FLOOR_S
            raise
        entry.demand.note(nanos, self._clock.monotonic_s())
        return self._hold(fresh, nanos)

    def _wanted(self, entry: _Entry, nanos: int) -> int:
        """Returns the size of the next slice: what is waited for, or more if that is known."""
        most = self._sizes.nanos_max
        needed = entry.waiting_nanos
        if needed > most:
            # Cut behind a whole hold: what is left of a slice is out of reach of all others.
            needed = max(nanos, most - most % max(nanos, 1))
        size = self._size(entry)
        now_s = self._clock.monotonic_s()
        if not size and now_s >= entry.exact_until_s:
            # A burst begins: as much again as it has taken so far, so that questions stay few.
            size = min(entry.demand.so_far(now_s), most)
        if size <= needed:
            return needed
        # In whole holds: of equal ones nothing is left over.
        return -(-size // nanos) * nanos if nanos else size

    def _size(self, entry: _Entry) -> int:
        """Returns how much is worth having in advance, nanos; 0 near the end and in the dark."""
        now_s = self._clock.monotonic_s()
        if self._is_closing or now_s < entry.exact_until_s:
            return 0
        return entry.demand.size(self._sizes.nanos_max, now_s)

    async def _acquire_new(self, purse: Purse, entry: _Entry, required: int, wanted: int) -> Slice:
        if len(self._by_id) >= self._sizes.count_max:
            raise ResourceExhausted("too many credit slices are open", retry_after_s=1.0)
        if len(self._orphans) >= self._sizes.count_max:
            raise unavailable("billing")
        slice_id = self._new_id()
        asked_at_s = self._clock.monotonic_s()
        entry.turns += 1
        try:
            grant = await self._acquire(slice_id, purse, required, wanted)
            failpoints.hit(failpoints.Point.SLICE_ANSWERED)
        except (FailedPrecondition, NotFound):
            raise
        except BaseException as error:
            if not (isinstance(error, MaasError) and error.reason in _IS_EMPTY):
                self._orphans.append(slice_id)
            raise
        now_s = self._clock.monotonic_s()
        if grant.granted_nanos < wanted:
            entry.exact_until_s = now_s + NEAR_FLOOR_S
        fresh = Slice(
            slice_id=slice_id,
            purse=purse,
            free=grant.granted_nanos,
            lease_s=grant.lease_s,
            lease_until_s=asked_at_s + grant.lease_s - LEASE_MARGIN_S,
            used_at_s=now_s,
        )
        entry.slices.append(fresh)
        self._by_id[slice_id] = fresh
        return fresh

    def _take(self, purse: Purse, entry: _Entry, nanos: int) -> Hold | None:
        now_s = self._clock.monotonic_s()
        for item in entry.slices:
            if item.free >= nanos and not item.is_lost and item.lease_until_s > now_s:
                entry.demand.note(nanos, now_s)
                hold = self._hold(item, nanos)
                if item is entry.slices[-1] and not entry.is_refilling:
                    # Those before it have less than such requests need.
                    self._refill(purse, entry, item, nanos)
                return hold
        return None

    def _refill(self, purse: Purse, entry: _Entry, last: Slice, nanos: int) -> None:
        """Has the next slice brought when half of what is worth having is left in the last one."""
        size = self._size(entry)
        if last.free >= size // 2 or entry.lock.locked():
            return
        entry.is_refilling = True
        wanted = max(size, nanos)
        self._start(self._bring(purse, entry, -(-wanted // nanos) * nanos if nanos else wanted))

    async def _bring(self, purse: Purse, entry: _Entry, wanted: int) -> None:
        """Brings a slice that nobody waits for: all of it or nothing, as others may need it."""
        try:
            async with entry.lock:
                await self._acquire_new(purse, entry, wanted, wanted)
        except MaasError as error:
            entry.exact_until_s = self._clock.monotonic_s() + NEAR_FLOOR_S
            log.info("no slice in advance", cause=error.reason.value)
        finally:
            entry.is_refilling = False
            self._drop(purse)

    def _hold(self, item: Slice, nanos: int) -> Hold:
        item.free -= nanos
        item.held += nanos
        item.used_at_s = self._clock.monotonic_s()
        return Hold(item, nanos)

    def _idle_of(self, account: str) -> list[Slice]:
        """Lists what can be given back of all purses of an account: they share its credit."""
        return [
            item
            for purse, entry in self._entries.items()
            if purse.account == account
            for item in entry.slices
            if not item.is_busy
        ]

    async def _give_back(self, slices: Iterable[Slice]) -> None:
        given = list(slices)
        if not given:
            return
        for item in given:
            # Out of reach before the call: nothing may be taken while it is given back.
            item.is_lost = True
        try:
            failpoints.hit(failpoints.Point.SLICES_CLOSING)
            await self._close([item.slice_id for item in given])
        except BaseException:
            for item in given:
                # Unknown whether it is closed; try again later, and spend nothing from it.
                item.used_at_s = 0.0
            raise
        for item in given:
            # Another purse of the account may have given it back meanwhile.
            if self._by_id.pop(item.slice_id, None) is not None:
                self._entries[item.purse].slices.remove(item)
                self._drop(item.purse)

    def _drop(self, purse: Purse) -> None:
        """Forgets a purse that has nothing, and for which nobody waits."""
        entry = self._entries.get(purse)
        if entry is not None and not (entry.slices or entry.waiting or entry.is_refilling):
            del self._entries[purse]
