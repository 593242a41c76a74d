"""Release: from what workers have made to what clients are sent, once per turn of the event loop.

    pushed -> ready -> | frames made, counts noted | journal: one write | frames to the transport |

One message of a worker brings tokens for many generations. All of them are released together, so
the journal is written once for all, and always before the first of them leaves.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from libs import failpoints
from libs.errors import Internal, MaasError
from services.gateway.domain import EndCause
from services.gateway.journal import Journal

if TYPE_CHECKING:
    from services.gateway.frames import Frame
    from services.gateway.reader import Reader
    from services.gateway.running import Generation

log = structlog.get_logger(__name__)


# Generations that release in one turn of the event loop: about a millisecond.
TURN_MAX = 32


class Batch:
    """What one turn releases.

    Attributes:
        progress: ordinal and output tokens of each generation whose count has grown.
        cached: ordinal and cached input tokens of each whose first output is among it, if any.
        frames: with the reader of each.
        ended: generations whose last output is in this batch.
    """

    __slots__ = ("cached", "ended", "frames", "progress")

    def __init__(self) -> None:
        self.progress: list[tuple[int, int]] = []
        self.cached: list[tuple[int, int]] = []
        self.frames: list[tuple[Reader, Frame]] = []
        self.ended: list[Generation] = []


class Releaser:
    """Releases for all generations of a gateway."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._ready: list[Generation] = []
        self._is_due = False

    def add(self, generation: Generation) -> None:
        """Has a generation release what it can, soon. Once until it did."""
        self._ready.append(generation)
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        ready = self._ready[:TURN_MAX]
        del self._ready[:TURN_MAX]
        self._is_due = bool(self._ready)
        if self._is_due:
            # The rest behind whatever else is due: new requests must not wait for all of it.
            asyncio.get_running_loop().call_soon(self._run)
        batch = Batch()
        for generation in ready:
            try:
                generation.release_into(batch)
            except Exception:
                # One generation's defect must not hold up all others.
                log.exception("release failed", generation_id=generation.opening.generation_id)
                generation.retract(defect := Internal("internal error"))
                generation.end(defect, EndCause.GATEWAY_LOST)
        if batch.progress:
            self._count(batch, ready)
        now_s = asyncio.get_running_loop().time()
        for reader, frame in batch.frames:
            if reader.is_idle:
                reader.write(frame, now_s)
        for generation in batch.ended:
            try:
                generation.complete()
            except Exception:
                log.exception("end failed", generation_id=generation.opening.generation_id)
                generation.end(Internal("internal error"), EndCause.GATEWAY_LOST)

    def _count(self, batch: Batch, ready: list[Generation]) -> None:
        try:
            if batch.cached:
                self._journal.prefilled(batch.cached)
            self._journal.progress(batch.progress)
            failpoints.hit(failpoints.Point.RELEASE_COUNTED)
        except MaasError as error:
            # What is not known to be counted may not be sent: their readers have ended with this.
            for generation in ready:
                generation.retract(error)
