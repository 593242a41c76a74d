"""Bounds calls of one kind: in all, and of one project, so that none keeps the others out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from libs.errors import ResourceExhausted, unavailable

# Of the places there are, a project may take one out of so many, and one in any case.
PROJECT_SHARE = 4
RETRY_S = 1.0


class Turnstile:
    """Lets calls pass while there is room. Belongs to one event loop."""

    def __init__(self, calls: str, most: int) -> None:
        """Starts empty.

        Args:
            calls: what they are called in a refusal.
            most: of them at the same time.
        """
        self._calls = calls
        self._most = most
        self._most_of_project = max(1, most // PROJECT_SHARE)
        self._inside: Counter[str] = Counter()
        self._is_closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def inside(self) -> int:
        """Calls that have passed and not left."""
        return self._inside.total()

    @contextmanager
    def passing(self, project: str) -> Iterator[None]:
        """Counts a call in for the block.

        Args:
            project: "projects/{project}" that calls.

        Raises:
            ResourceExhausted: there are too many, in all or of the project.
            Unavailable: nobody is let in any more.
        """
        if self._is_closed:
            raise unavailable("gateway", retry_after_s=RETRY_S)
        if self._inside[project] >= self._most_of_project:
            raise ResourceExhausted(
                f"the project has {self._most_of_project} {self._calls} in flight",
                retry_after_s=RETRY_S,
            )
        if self.inside >= self._most:
            raise ResourceExhausted(f"too many {self._calls} are in flight", retry_after_s=RETRY_S)
        self._inside[project] += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside[project] -= 1
            if not self._inside[project]:
                # Projects come and go; their counters must not stay.
                del self._inside[project]
            if not self._inside:
                self._empty.set()

    async def drain(self) -> None:
        """Lets nobody in any more, and waits until those inside have left."""
        self._is_closed = True
        await self._empty.wait()
