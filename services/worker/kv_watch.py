"""What the engine's prefix cache holds, and who is told of its changes.

    engine --events--> index (what is there now) --listing--> watcher
                          '---- changes ------------pending--> watcher

A watcher first gets what is there, then each change. A message of a listing says what is there at
the moment it is made, behind all changes until then: so whoever has read a whole listing knows what
was there at its end, however long it took.

A watcher that reads too slowly, and every watcher when the engine says that it has lost track, or
when there are more blocks than are remembered, is told to forget everything and gets a new listing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from libs.clock import Clock
from libs.errors import MaasError, NotImplementedHere, ResourceExhausted
from libs.limits import WATCH_BOOKMARK_S
from libs.rpc.watch import Hub
from services.worker import metrics
from services.worker.engine.kv_events import KvCleared, KvEvent, KvRemoved, KvStored, KvTier

# How long changes are gathered: an engine tells some with each step.
GATHER_S = 0.01
RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLimits:
    """What bounds memory and messages.

    Attributes:
        blocks: that are remembered, 100 bytes each: several times what fits into the GPUs of one
            engine.
        watchers: at the same time.
        pending: blocks of changes that may wait for one watcher.
        message: blocks in one message: 32 KiB at most, made in a millisecond.
    """

    blocks: int = 1 << 18
    watchers: int = 16
    pending: int = 1 << 16
    message: int = 1024


LIMITS = KvLimits()


@dataclass(frozen=True, slots=True)
class KvChanges:
    """What one message says.

    Attributes:
        sequence: 1 for a watcher's first message, and one more for each.
        events: in order; none in a sign of life.
        completes_listing: all that is there has been listed.
    """

    sequence: int
    events: Sequence[KvEvent]
    completes_listing: bool


class KvLog:
    """The blocks of one engine's prefix cache. Belongs to one event loop."""

    def __init__(
        self,
        block_tokens: int,
        *,
        clock: Clock,
        worker: str,
        limits: KvLimits = LIMITS,
        bookmark_s: float = WATCH_BOOKMARK_S,
    ) -> None:
        """Knows of nothing.

        Args:
            block_tokens: in a block; 0 for an engine that tells nothing.
            clock: for gathering.
            worker: "workers/{name}".
            limits: what bounds it.
            bookmark_s: longest time between two messages to a watcher.
        """
        self._block_tokens = block_tokens
        self._clock = clock
        self._worker = worker
        self._limits = limits
        self._bookmark_s = bookmark_s
        self._index = _Index()
        self._watchers: set[_Watcher] = set()
        self._hub = Hub()
        self._closing: Callable[[str], MaasError] | None = None

    @property
    def blocks(self) -> int:
        """How many are there."""
        return len(self._index)

    @property
    def watchers(self) -> int:
        """How many watch."""
        return len(self._watchers)

    def add(self, events: Iterable[KvEvent]) -> None:
        """Takes what the engine tells: 1.5 us a block."""
        for event in events:
            if isinstance(event, KvStored):
                self._store(event)
            elif isinstance(event, KvRemoved):
                self._remove(event)
            else:
                self._start_anew("engine")
        if self._watchers:
            self._hub.poke()

    def close(self, error: Callable[[str], MaasError]) -> None:
        """Ends all watches, those that come later too. May be repeated; the first error stays.

        Args:
            error: makes it, from the worker's name.
        """
        self._closing = self._closing or error
        self._hub.poke()

    async def watch(self) -> AsyncGenerator[KvChanges, None]:
        """Yields for ever what a watcher has to hear. Close it with `contextlib.aclosing`.

        Raises:
            NotImplementedHere: the engine tells nothing.
            ResourceExhausted: too many watch.
            Unavailable: the worker is draining, or its engine is gone.
        """
        watcher = self._enter()
        try:
            while True:
                if self._closing is not None:
                    raise self._closing(self._worker)
                # Before the message is written: what changes meanwhile ends the wait.
                version = self._hub.version
                changes = watcher.take()
                has_more = watcher.has_more
                yield changes
                if has_more:
                    continue
                if await self._hub.wait(version, self._bookmark_s) != version:
                    await self._clock.sleep_s(GATHER_S)
        finally:
            self._watchers.discard(watcher)

    def _enter(self) -> _Watcher:
        if not self._block_tokens:
            raise NotImplementedHere("the engine does not tell what its prefix cache holds")
        most = self._limits.watchers
        if len(self._watchers) >= most:
            raise ResourceExhausted(
                f"{most} watchers follow the prefix cache of this worker, which is the most;"
                " let one of them pass on what it hears",
                retry_after_s=RETRY_AFTER_S,
            )
        watcher = _Watcher(self._index, self._limits)
        self._watchers.add(watcher)
        return watcher

    def _store(self, event: KvStored) -> None:
        if not event.hashes:
            return
        self._index.store(event)
        if len(self._index) > self._limits.blocks:
            self._start_anew("full")
            if len(event.hashes) > self._limits.blocks:
                return
            self._index.store(event)
        self._tell(event)

    def _remove(self, event: KvRemoved) -> None:
        known = self._index.remove(event.hashes)
        if known:
            self._tell(KvRemoved(known))

    def _tell(self, event: KvStored | KvRemoved) -> None:
        if not self._watchers:
            return
        for piece in _pieces(event, self._limits.message):
            for watcher in self._watchers:
                watcher.push(piece)

    def _start_anew(self, cause: str) -> None:
        """Forgets everything, and has all watchers do so."""
        self._index.clear()
        for watcher in self._watchers:
            watcher.start_anew()
        metrics.KV_RESTARTS.labels(cause).inc()


class _Index:
    """The blocks that are there.

    Numbers in dictionaries, and nothing else: a hundred thousand objects of ours would cost each
    collection of garbage, which stops all streams, milliseconds.
    """

    __slots__ = ("_parents", "_tiers")

    def __init__(self) -> None:
        self._parents: dict[int, int | None] = {}
        # Of those that are not on the device.
        self._tiers: dict[int, KvTier] = {}

    def __len__(self) -> int:
        return len(self._parents)

    def names(self) -> list[int]:
        """All of them; what follows each other was mostly stored so."""
        return list(self._parents)

    def store(self, event: KvStored) -> None:
        """Adds blocks, or moves them to another tier."""
        names = event.hashes
        self._parents.update(zip(names, (event.parent, *names), strict=False))
        if event.tier is not KvTier.DEVICE:
            self._tiers.update(dict.fromkeys(names, event.tier))
        elif self._tiers:
            self._leave_tiers(names)

    def remove(self, names: Sequence[int]) -> tuple[int, ...]:
        """Removes blocks; returns those that were there."""
        known = tuple(name for name in names if name in self._parents)
        for name in known:
            self._parents.pop(name, None)
        if self._tiers:
            self._leave_tiers(known)
        return known

    def clear(self) -> None:
        """Removes everything."""
        self._parents.clear()
        self._tiers.clear()

    def chains(self, names: Iterable[int]) -> Iterator[KvStored]:
        """Says which of some blocks are there; those that follow each other share an event."""
        chain: list[int] = []
        parent: int | None = None
        tier = KvTier.DEVICE
        for name in names:
            if name not in self._parents:
                continue
            before, place = self._parents[name], self._tiers.get(name, KvTier.DEVICE)
            if chain and before == chain[-1] and place is tier:
                chain.append(name)
                continue
            if chain:
                yield KvStored(tuple(chain), parent, tier)
            chain, parent, tier = [name], before, place
        if chain:
            yield KvStored(tuple(chain), parent, tier)

    def _leave_tiers(self, names: Sequence[int]) -> None:
        for name in names:
            self._tiers.pop(name, None)


class _Watcher:
    """What one watcher has not been told yet."""

    __slots__ = (
        "_index",
        "_limits",
        "_listing",
        "_must_clear",
        "_must_list",
        "_pending",
        "_pending_blocks",
        "_place",
        "_sequence",
    )

    def __init__(self, index: _Index, limits: KvLimits) -> None:
        self._index = index
        self._limits = limits
        self._sequence = 0
        self._must_list = True
        self._must_clear = False
        # Names of the blocks that were there when the listing began, and how many are listed.
        self._listing: list[int] | None = None
        self._place = 0
        self._pending: deque[KvStored | KvRemoved] = deque()
        self._pending_blocks = 0

    @property
    def has_more(self) -> bool:
        """Whether there is something to say at once."""
        return self._must_list or self._listing is not None or bool(self._pending)

    def push(self, event: KvStored | KvRemoved) -> None:
        """Has a change told, no longer than a message."""
        if self._must_list:
            # The listing will say it.
            return
        self._pending.append(event)
        self._pending_blocks += len(event.hashes)
        if self._pending_blocks > self._limits.pending:
            self.start_anew()
            metrics.KV_RESTARTS.labels("slow_watcher").inc()

    def start_anew(self) -> None:
        """Has it forget everything and get a new listing."""
        self._must_list = self._must_clear = True
        self._pending.clear()
        self._pending_blocks = 0

    def take(self) -> KvChanges:
        """Makes the next message: what has changed, then the next part of a listing."""
        self._sequence += 1
        events: list[KvEvent] = []
        if self._must_list:
            if self._must_clear:
                events.append(KvCleared())
            self._must_list = self._must_clear = False
            self._listing, self._place = self._index.names(), 0
        room = self._take_changes(events)
        completes = False
        if self._listing is not None and not self._pending:
            names = self._listing[self._place : self._place + room]
            events += self._index.chains(names)
            self._place += len(names)
            completes = self._place >= len(self._listing)
            if completes:
                self._listing = None
        return KvChanges(self._sequence, events, completes)

    def _take_changes(self, events: list[KvEvent]) -> int:
        """Moves changes to a message; returns how many blocks it has room for behind them."""
        room = self._limits.message
        while self._pending and len(self._pending[0].hashes) <= room:
            event = self._pending.popleft()
            events.append(event)
            room -= len(event.hashes)
        self._pending_blocks -= self._limits.message - room
        return room


def _pieces(event: KvStored | KvRemoved, most: int) -> Iterator[KvStored | KvRemoved]:
    """Cuts an event that has too many blocks for one message."""
    names = event.hashes
    if len(names) <= most:
        yield event
        return
    for start in range(0, len(names), most):
        part = names[start : start + most]
        if isinstance(event, KvStored):
            yield KvStored(part, names[start - 1] if start else event.parent, event.tier)
        else:
            yield KvRemoved(part)
