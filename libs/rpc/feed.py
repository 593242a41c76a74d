"""The server side of watches: everything first, then changes, then signs of life.

What is watched carries a revision: a counter of the service's database, raised in the transaction
that makes the change. It is the row of a table and no sequence, because the row stays locked until
the change is committed: revisions become visible in their order, and a reader that has seen one has
seen all before it. With a sequence a lower revision could be committed after a higher one was
read, and that change would be lost.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from libs.clock import Clock
from libs.errors import Unavailable
from libs.limits import WATCH_BOOKMARK_S, WATCH_POLL_S
from libs.rpc.watch import Hub

# Most items in one message: 500 offerings or keys are below 1 MiB.
CHUNK_SIZE = 500


class Revised(Protocol):
    """Something that is watched."""

    @property
    def revision(self) -> int:
        """Grows with every change; no two changes have the same."""
        ...


ItemT = TypeVar("ItemT", bound=Revised)
ItemT_co = TypeVar("ItemT_co", bound=Revised, covariant=True)


@dataclass(frozen=True, slots=True)
class Changes(Generic[ItemT_co]):
    """What one response of a watch says.

    Attributes:
        items: new or changed, by revision; empty in a sign of life.
        completes_snapshot: True once, when everything that was there has been listed.
    """

    items: Sequence[ItemT_co]
    completes_snapshot: bool


async def changes(
    hub: Hub,
    read_after: Callable[[int, int], Awaitable[Sequence[ItemT]]],
    *,
    bookmark_s: float = WATCH_BOOKMARK_S,
    chunk_size: int = CHUNK_SIZE,
) -> AsyncGenerator[Changes[ItemT], None]:
    """Yields for ever what a watcher has to hear. Close it with `contextlib.aclosing`.

    A sign of life is sent only after the store has been read, so it says "this is all there is".

    Args:
        hub: poked after each change of this process and by `poll_revision`.
        read_after: takes a revision and a count; returns at most that many items with higher
            revisions, lowest first.
        bookmark_s: longest time between two responses.
        chunk_size: most items of a response.

    Raises:
        Unavailable: the store is or was away; the watcher has to start again.
    """
    epoch = hub.epoch
    seen = 0
    is_complete = False
    while True:
        if hub.epoch != epoch:
            raise Unavailable("the watch has to start again")
        # Before the reading: a change that comes while it runs ends the wait below at once.
        version = hub.version
        items = await read_after(seen, chunk_size)
        is_last = len(items) < chunk_size
        yield Changes(items, completes_snapshot=is_last and not is_complete)
        is_complete = is_complete or is_last
        seen = items[-1].revision if items else seen
        if is_last:
            await hub.wait(version, bookmark_s)


async def poll_revision(
    hub: Hub,
    read_revision: Callable[[], Awaitable[int]],
    clock: Clock,
    *,
    interval_s: float = WATCH_POLL_S,
) -> None:
    """Pokes the hub for ever when another process of the service has changed something.

    A database that comes back, or whose revision went back, may have lost changes that watchers
    have seen (a failover, a restored backup): then all of them have to start again.
    """
    known = 0
    was_away = False
    while True:
        try:
            revision = await read_revision()
        except Unavailable:
            was_away = True
        else:
            if was_away or revision < known:
                hub.restart()
            elif revision != known:
                hub.poke()
            known = revision
            was_away = False
        await clock.sleep_s(interval_s)
