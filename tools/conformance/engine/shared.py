"""One engine that many checks use one after the other, and a new one when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from services.worker.engine.base import Engine, EngineDied, EngineInfo, Tokenizer
from tools.conformance.engine.harness import PATIENCE_S, Harness
from tools.conformance.engine.rows import Row
from tools.conformance.verdict import CannotShow, Mismatch

STOP_S = 30.0
"""Longest time that an engine may take to stop."""


class Shared:
    """Starts an engine when a check needs one, and lends it to one check at a time.

    Starting is what takes time: on a GPU minutes. After a check the engine is empty, or it is
    stopped and the next check gets a new one.

    Args:
        row: where the engine comes from.
        folder: for the files of checks.
    """

    def __init__(self, row: Row, folder: Path) -> None:
        self._row = row
        self._folder = folder
        self._engine: Engine | None = None
        self._info: EngineInfo | None = None
        self._tokenizer: Tokenizer | None = None
        self._numbers = itertools.count(1)

    @property
    def name(self) -> str:
        """Of the engine."""
        return self._row.name

    @asynccontextmanager
    async def lend(self, *, ends_engine: bool = False) -> AsyncIterator[Harness]:
        """Lends the engine until the block is left.

        Args:
            ends_engine: it is stopped afterwards.

        Raises:
            EngineStartError: none can be started.
        """
        harness = await self._harness()
        is_usable = False
        try:
            yield harness
            is_usable = not ends_engine
        except CannotShow:
            is_usable = not ends_engine
            raise
        finally:
            if not (is_usable and await _is_empty(harness)):
                await self.stop()

    async def stop(self) -> None:
        """Stops the engine, within STOP_S.

        Raises:
            Mismatch: it does not stop.
        """
        engine, self._engine = self._engine, None
        if engine is None:
            return
        try:
            async with asyncio.timeout(STOP_S):
                await engine.stop()
        except TimeoutError:
            raise Mismatch(f"the engine did not stop within {STOP_S:g} s") from None

    async def _harness(self) -> Harness:
        if self._tokenizer is None:
            self._tokenizer = await asyncio.to_thread(self._row.tokenizer)
        if self._engine is None or self._info is None:
            engine = self._row.make()
            with environment(self._row.environment):
                self._info = await engine.start()
            self._engine = engine
        number = next(self._numbers)
        folder = self._folder / f"check-{number}"
        await asyncio.to_thread(folder.mkdir)
        return Harness(
            engine=self._engine,
            info=self._info,
            row=self._row,
            tokenizer=self._tokenizer,
            folder=folder,
            salt=b"check %d" % number,
        )


async def _is_empty(harness: Harness) -> bool:
    """Ends what a check has left running; False when that cannot be done."""
    left = [lane for lane, told in harness.told.items() if told.ended is None]
    try:
        for lane in left:
            harness.engine.abort(lane)
        async with asyncio.timeout(PATIENCE_S):
            await harness.until_ended(*left)
    except (EngineDied, Mismatch, TimeoutError):
        return False
    return True


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for the child processes that are started in the block."""
    before = {name: os.environ.get(name) for name in variables}  # noqa: TID251 - for a child
    os.environ.update(variables)  # noqa: TID251 - for a child
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)  # noqa: TID251 - for a child
            else:
                os.environ[name] = value  # noqa: TID251 - for a child
