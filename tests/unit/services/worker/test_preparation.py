"""services/worker/preparation.py: who goes first in the one thread that makes prompts."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

import pytest
from typing_extensions import override

from libs.errors import Internal, ResourceExhausted
from services.worker.preparation import PATIENCE, PREPARING_MAX, Preparation

PATIENCE_S = 10.0

P = ParamSpec("P")
T = TypeVar("T")


class Busy:
    """A thread that is held up until `go_on` is set, and what it made after that.

    Attributes:
        go_on: lets it go on.
        made: names of what was made, in order.
    """

    def __init__(self, preparation: Preparation) -> None:
        self.go_on = threading.Event()
        self.made: list[str] = []
        self._preparation = preparation

    def make(self, name: str, size: int) -> asyncio.Task[None]:
        return asyncio.create_task(self._preparation.run(name, size, self.made.append, name))


@asynccontextmanager
async def busy_thread() -> AsyncIterator[Busy]:
    with ThreadPoolExecutor(1) as threads:
        preparation = Preparation(threads)
        busy = Busy(preparation)
        began = threading.Event()

        def hold_up() -> None:
            began.set()
            assert busy.go_on.wait(PATIENCE_S)

        blocker = asyncio.create_task(preparation.run("blocker", 0, hold_up))
        await asyncio.sleep(0)
        assert await asyncio.to_thread(began.wait, PATIENCE_S)
        try:
            yield busy
        finally:
            busy.go_on.set()
            await blocker


async def all_of(busy: Busy, *tasks: asyncio.Task[None]) -> list[str]:
    await asyncio.sleep(0)
    busy.go_on.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    return busy.made


async def test_what_is_small_passes_by_what_is_large() -> None:
    async with busy_thread() as busy:
        large = [busy.make(f"large {number}", 1_000_000) for number in range(3)]
        small = busy.make("small", 5_000)

        assert await all_of(busy, *large, small) == ["small", "large 0", "large 1", "large 2"]


async def test_equals_are_made_in_the_order_of_coming() -> None:
    async with busy_thread() as busy:
        tasks = [busy.make(str(number), 10) for number in range(20)]

        assert await all_of(busy, *tasks) == [str(number) for number in range(20)]


class Stepped(Executor):
    """Does one thing each time that it is told to."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()

    @override
    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        self._waiting.append(lambda: fn(*args, **kwargs))
        return Future()

    def step(self) -> None:
        self._waiting.popleft()()


async def test_nothing_waits_for_ever() -> None:
    size, small = 100, 10
    made: list[str] = []
    threads = Stepped()
    preparation = Preparation(threads)
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(preparation.run("", size, made.append, "large"))
        await asyncio.sleep(0)
        # Something small is always there too.
        while "large" not in made:
            tasks.create_task(preparation.run("", small, made.append, "small"))
            await asyncio.sleep(0)
            threads.step()
        threads.step()

    assert made.index("large") == PATIENCE * (size - small) // small


async def test_what_nobody_waits_for_is_not_made() -> None:
    async with busy_thread() as busy:
        dead = [busy.make("dead", 10) for _ in range(PREPARING_MAX - 1)]
        await asyncio.sleep(0)
        for task in dead:
            task.cancel()
        await asyncio.gather(*dead, return_exceptions=True)
        alive = busy.make("alive", 10)

        assert await all_of(busy, alive) == ["alive"], "and there was room for it"


async def test_what_is_too_much_is_refused_and_a_defect_is_told_without_its_text() -> None:
    def fail() -> None:
        raise ValueError("what somebody typed")

    async with busy_thread() as busy:
        preparation = busy._preparation
        tasks = [busy.make(str(number), 1) for number in range(PREPARING_MAX - 1)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted):
            preparation.require_room()
        await all_of(busy, *tasks)

        preparation.require_room()
        with pytest.raises(Internal) as caught:
            await preparation.run("x", 1, fail)
        assert "typed" not in str(caught.value)
