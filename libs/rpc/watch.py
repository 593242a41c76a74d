"""Watches: one service follows the state of another.

The server side is a Hub: a counter that grows with every change, and a wait for it to grow. The
client side is `follow`: connect, take everything, then changes; when the stream breaks or goes
silent, start again, for ever, with a bounded backoff.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import grpc
import structlog

from libs.errors import MaasError
from libs.limits import WATCH_SILENCE_MAX_S
from libs.rpc.client import Peer

if TYPE_CHECKING:
    from grpc.aio import UnaryStreamMultiCallable

Request = TypeVar("Request")

log = structlog.get_logger(__name__)

BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 1.0


class WatchResponse(Protocol):
    """What every watch of the suite answers with."""

    @property
    def snapshot_complete(self) -> bool:
        """True in the one response that completes the first listing."""
        ...


Response = TypeVar("Response", bound=WatchResponse)


class Hub:
    """Wakes watchers when something has changed. Belongs to one event loop."""

    def __init__(self) -> None:
        self._version = 0
        self._epoch = 0
        self._changed = asyncio.Event()

    @property
    def version(self) -> int:
        """Grows with every poke."""
        return self._version

    @property
    def epoch(self) -> int:
        """Grows with every restart."""
        return self._epoch

    def poke(self) -> None:
        """Says that something has changed."""
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def restart(self) -> None:
        """Says that what was read before may be gone: watchers have to start again."""
        self._epoch += 1
        self.poke()

    async def wait(self, seen: int, timeout_s: float) -> int:
        """Waits until the version is above `seen`, or for the time; returns the version."""
        if self._version == seen:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
        return self._version


async def follow(
    peer: Peer,
    method: UnaryStreamMultiCallable[Request, Response],
    request: Request,
    apply: Callable[[Response, bool], None],
    *,
    on_open: Callable[[], None] = lambda: None,
) -> None:
    """Keeps a watch alive for ever.

    Args:
        peer: where to.
        method: a watch of the suite.
        request: its request.
        apply: takes each response, and whether it belongs to the first listing of a new stream.
            Called for signs of life too: hearing anything means being up to date.
        on_open: told of each new stream before its first response: one that broke inside its first
            listing is followed by one that lists anew.
    """
    backoff_s = BACKOFF_MIN_S
    while True:
        try:
            async with peer.stream(method, request) as stream:
                on_open()
                is_snapshot = True
                while True:
                    async with asyncio.timeout(WATCH_SILENCE_MAX_S):
                        received = await stream.read()
                    if received is grpc.aio.EOF:
                        break
                    response = cast("Response", received)
                    apply(response, is_snapshot)
                    if response.snapshot_complete:
                        is_snapshot = False
                    backoff_s = BACKOFF_MIN_S
        except (MaasError, TimeoutError) as error:
            log.warning("watch lost", endpoint=peer.endpoint, cause=str(error))
        # Chance spreads the watchers of a service that comes back.
        await asyncio.sleep(backoff_s * (0.5 + random.random()))  # noqa: S311 - not a secret
        backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
