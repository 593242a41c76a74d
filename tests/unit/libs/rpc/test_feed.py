"""libs/rpc/feed.py and Hub: the server side of watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import pytest

from libs.errors import Unavailable, unavailable
from libs.limits import WATCH_POLL_S
from libs.process import Background
from libs.rpc import Hub
from libs.rpc.feed import Changes, changes, poll_revision
from libs.testing import FakeClock

NEVER_S = 60.0


@dataclass(frozen=True, slots=True)
class Item:
    """Something watched."""

    name: str
    revision: int


class Store:
    """Items in memory, the newest revision of each."""

    def __init__(self, count: int = 0) -> None:
        self.items: dict[str, int] = {f"item-{n}": n for n in range(1, count + 1)}
        self.revision = count
        self.is_away = False
        self.on_read: Callable[[], None] | None = None

    def change(self, name: str) -> None:
        self.revision += 1
        self.items[name] = self.revision

    async def read_after(self, revision: int, count: int) -> list[Item]:
        if self.is_away:
            raise unavailable("postgresql")
        behind = sorted((at, name) for name, at in self.items.items() if at > revision)
        if self.on_read is not None:
            self.on_read()
        return [Item(name, at) for at, name in behind[:count]]

    async def get_revision(self) -> int:
        if self.is_away:
            raise unavailable("postgresql")
        return self.revision


@pytest.fixture
def hub() -> Hub:
    return Hub()


def following(
    hub: Hub, store: Store, *, bookmark_s: float = NEVER_S, chunk_size: int = 3
) -> aclosing[AsyncGenerator[Changes[Item], None]]:
    return aclosing(changes(hub, store.read_after, bookmark_s=bookmark_s, chunk_size=chunk_size))


async def names_of(item: Awaitable[Changes[Item]]) -> list[str]:
    async with asyncio.timeout(1):
        return [one.name for one in (await item).items]


@pytest.mark.parametrize(
    ("count", "parts"), [(0, [0]), (2, [2]), (3, [3, 0]), (4, [3, 1]), (6, [3, 3, 0])]
)
async def test_snapshot_is_complete_exactly_once(hub: Hub, count: int, parts: list[int]) -> None:
    async with following(hub, Store(count)) as feed:
        got = [await anext(feed) for _ in parts]

    assert [len(item.items) for item in got] == parts
    assert [item.completes_snapshot for item in got] == [False] * (len(parts) - 1) + [True]


async def test_change_during_the_snapshot_comes_with_it(hub: Hub) -> None:
    store = Store(4)
    async with following(hub, store) as feed:
        await anext(feed)
        store.change("item-1")
        hub.poke()

        assert await names_of(anext(feed)) == ["item-4", "item-1"]


async def test_change_wakes_the_watcher(hub: Hub) -> None:
    store = Store()
    async with following(hub, store) as feed:
        await anext(feed)
        waiting = asyncio.ensure_future(names_of(anext(feed)))
        await asyncio.sleep(0)

        store.change("new")
        hub.poke()

        assert await waiting == ["new"]


async def test_change_between_reading_and_waiting_is_not_lost(hub: Hub) -> None:
    store = Store()
    async with following(hub, store) as feed:

        def change_once() -> None:
            store.on_read = None
            store.change("late")
            hub.poke()

        store.on_read = change_once
        assert (await anext(feed)).items == []

        assert await names_of(anext(feed)) == ["late"]


async def test_sign_of_life_comes_when_nothing_changes(hub: Hub) -> None:
    async with following(hub, Store(1), bookmark_s=0.01) as feed:
        await anext(feed)

        assert await anext(feed) == Changes([], completes_snapshot=False)


async def test_store_that_is_away_ends_the_watch(hub: Hub) -> None:
    store = Store()
    async with following(hub, store, bookmark_s=0.001) as feed:
        await anext(feed)
        store.is_away = True

        with pytest.raises(Unavailable):
            await anext(feed)


@pytest.fixture
async def polled(hub: Hub) -> AsyncIterator[tuple[Store, FakeClock]]:
    """A store whose revision is looked at every half second."""
    store, clock = Store(), FakeClock()
    async with Background() as background:
        background.start(poll_revision(hub, store.get_revision, clock), name="poll")
        await asyncio.sleep(0)
        yield store, clock


async def look(clock: FakeClock) -> None:
    clock.advance(WATCH_POLL_S)
    for _ in range(3):
        await asyncio.sleep(0)


async def test_poll_wakes_watchers_only_when_something_changed(
    hub: Hub, polled: tuple[Store, FakeClock]
) -> None:
    store, clock = polled
    version = hub.version

    await look(clock)
    assert hub.version == version
    store.change("by another process")
    await look(clock)
    assert hub.version == version + 1
    await look(clock)
    assert hub.version == version + 1


async def test_watchers_start_again_after_an_outage(
    hub: Hub, polled: tuple[Store, FakeClock]
) -> None:
    store, clock = polled
    async with following(hub, store) as feed:
        await anext(feed)
        store.is_away = True
        await look(clock)
        store.is_away = False

        await look(clock)

        with pytest.raises(Unavailable):
            await anext(feed)
    async with following(hub, store) as feed:
        assert (await anext(feed)).completes_snapshot


async def test_watchers_start_again_when_changes_were_lost(
    hub: Hub, polled: tuple[Store, FakeClock]
) -> None:
    store, clock = polled
    store.change("lost")
    await look(clock)
    async with following(hub, store) as feed:
        await anext(feed)
        store.items.clear()
        store.revision = 0

        await look(clock)

        with pytest.raises(Unavailable):
            await anext(feed)


async def test_outage_does_not_end_the_poll(hub: Hub, polled: tuple[Store, FakeClock]) -> None:
    store, clock = polled
    store.is_away = True
    await look(clock)
    store.is_away = False
    await look(clock)
    version = hub.version

    store.change("by another process")
    await look(clock)

    assert hub.version == version + 1


async def test_hub_tells_at_once_what_was_missed(hub: Hub) -> None:
    hub.poke()

    assert await hub.wait(0, NEVER_S) == 1


async def test_hub_wakes_everybody(hub: Hub) -> None:
    waits = [asyncio.ensure_future(hub.wait(0, NEVER_S)) for _ in range(3)]
    await asyncio.sleep(0)

    hub.poke()

    assert await asyncio.gather(*waits) == [1, 1, 1]


async def test_hub_waits_no_longer_than_told(hub: Hub) -> None:
    assert await hub.wait(0, 0.001) == 0
