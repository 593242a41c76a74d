"""Admissions that may outlive their caller, or have several: by idempotency key, or detached.

A repeat of a key joins what the first request has started. The key is known here from the first
request until the replay window of its generation is over, and from then on by billing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from libs.errors import Internal, MaasError, ResourceExhausted
from libs.process import Background, Cancel
from services.gateway.admission import Asked, reused
from services.gateway.running import Generation

log = structlog.get_logger(__name__)

# Calls that wait for one admission, or read one generation.
READERS_MAX = 64

Key = tuple[str, str]


@dataclass(slots=True, eq=False)
class _Entry:
    """One admission.

    Attributes:
        sha256: of what was asked for.
        lives_on: whether it goes on without a caller; the first one has said so.
        generation: what comes of it.
        waiting: calls that wait for it.
        stop: ends the admission.
    """

    sha256: str
    lives_on: bool
    generation: asyncio.Future[Generation]
    waiting: int = 0
    stop: Cancel | None = None


class Requests:
    """Admissions with a life of their own."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._by_key: dict[Key, _Entry] = {}

    async def join(
        self,
        asked: Asked,
        admit: Callable[[Asked], Awaitable[Generation]],
        leave: Callable[[Generation], None],
    ) -> tuple[Generation, bool]:
        """Starts an admission, or joins the one that has the same key.

        Args:
            asked: the request.
            admit: admits it.
            leave: told of a generation that was admitted when its last caller had gone.

        Returns:
            The generation, and whether another call has started it.

        Raises:
            InvalidArgument: REQUEST_ID_REUSED.
            ResourceExhausted: too many calls wait for it.
            MaasError: the request is refused.
        """
        key = (asked.project, asked.request_id)
        entry = self._by_key.get(key) if asked.request_id else None
        is_repeat = entry is not None
        if entry is None:
            generation: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
            entry = _Entry(asked.request_sha256, asked.lives_on, generation)
            if asked.request_id:
                self._by_key[key] = entry
            entry.stop = self._background.start(self._admit(key, entry, asked, admit), name="admit")
        elif entry.sha256 != asked.request_sha256:
            raise reused(asked.request_id)
        if entry.waiting >= READERS_MAX:
            raise crowded()
        entry.waiting += 1
        try:
            return await asyncio.shield(entry.generation), is_repeat
        except asyncio.CancelledError:
            if entry.waiting == 1 and not entry.lives_on:
                self._abandon(key, entry, leave)
            raise
        finally:
            entry.waiting -= 1

    def forget(self, generation: Generation) -> None:
        """Frees the key of a generation: its replay window is over, or it was not charged."""
        opening = generation.opening
        key = (opening.project, opening.request_id)
        entry = self._by_key.get(key)
        if entry is not None and _result_of(entry) is generation:
            del self._by_key[key]

    async def _admit(
        self,
        key: Key,
        entry: _Entry,
        asked: Asked,
        admit: Callable[[Asked], Awaitable[Generation]],
    ) -> None:
        try:
            entry.generation.set_result(await admit(asked))
        except asyncio.CancelledError:
            self._drop(key, entry)
            entry.generation.cancel()
            raise
        except MaasError as error:
            self._refuse(key, entry, error)
        except Exception:
            log.exception("admission failed")
            self._refuse(key, entry, Internal("internal error"))

    def _refuse(self, key: Key, entry: _Entry, error: MaasError) -> None:
        # A refusal leaves no trace: the key is free for another attempt.
        self._drop(key, entry)
        entry.generation.set_exception(error)
        # Whoever waits hears of it; if nobody does, that is no defect.
        entry.generation.exception()

    def _drop(self, key: Key, entry: _Entry) -> None:
        if self._by_key.get(key) is entry:
            del self._by_key[key]

    def _abandon(self, key: Key, entry: _Entry, leave: Callable[[Generation], None]) -> None:
        """The last caller has gone before it could read."""
        generation = _result_of(entry)
        if generation is not None:
            leave(generation)
        elif entry.stop is not None:
            # At once: whoever comes now must not join what is about to end.
            self._drop(key, entry)
            entry.stop()


def crowded() -> ResourceExhausted:
    """Makes the error for one call too many that wants to read a generation."""
    return ResourceExhausted("too many calls read the generation", retry_after_s=1.0)


def _result_of(entry: _Entry) -> Generation | None:
    future = entry.generation
    if not future.done() or future.cancelled() or future.exception() is not None:
        return None
    return future.result()
