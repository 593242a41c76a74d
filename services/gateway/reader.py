"""One call that reads a generation: where it is, and what keeps it waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from libs.errors import Cancelled, MaasError
from libs.rpc.writer import CallWriter
from services.gateway.ticker import Ticker

if TYPE_CHECKING:
    from services.gateway.frames import Frame

    Write = Callable[[Any], Coroutine[Any, Any, None]]

# Longest wait for the first message of a call that has failed to be on its way.
FIRST_WAIT_S = 5.0


class Reader:
    """A call attached to a generation.

    Attributes:
        key_id: of the caller.
        cursor: sequence of the last frame that was handed to the transport.
        is_idle: whether a frame may be written to it now.
        takes: whether frames are written to it; a unary call only waits for the end.
        is_replay: its request repeats another one's request_id.
        is_collecting: it had a delta a moment ago and waits for more before the next one.
        writing_since_s: since when a write waits for the client; None while none does.
        done: set when the call has all it can get; or the error to end it with.
    """

    __slots__ = (
        "_first",
        "_has_written",
        "_interval_s",
        "_loop",
        "_on_ready",
        "_ticker",
        "_writer",
        "cursor",
        "done",
        "is_collecting",
        "is_idle",
        "is_replay",
        "key_id",
        "takes",
        "writing_since_s",
    )

    def __init__(
        self,
        key_id: str,
        *,
        write: Write | None = None,
        ticker: Ticker | None = None,
        interval_s: float = 0.0,
        after_sequence: int = 0,
        is_replay: bool = False,
    ) -> None:
        """Makes a reader on the running loop.

        Args:
            key_id: of the caller.
            write: of the call's context; None for a unary call.
            ticker: wakes it after the interval.
            interval_s: time in which output is collected; 0 sends at once.
            after_sequence: last frame that the caller has.
            is_replay: its request repeats another one's request_id.
        """
        self._loop = asyncio.get_running_loop()
        self.key_id = key_id
        self.cursor = after_sequence
        self.takes = write is not None
        self.is_replay = is_replay
        self.is_collecting = False
        self.is_idle = self.takes
        self.writing_since_s: float | None = None
        self.done: asyncio.Future[None] = self._loop.create_future()
        self._writer = CallWriter(write, self._written) if write is not None else None
        self._ticker = ticker
        self._interval_s = interval_s
        self._on_ready: Callable[[Reader], None] | None = None
        self._has_written = False
        self._first: asyncio.Future[None] | None = None

    def attach(self, on_ready: Callable[[Reader], None]) -> None:
        """Has `on_ready` called whenever it has become idle or has collected long enough."""
        self._on_ready = on_ready

    def write(self, frame: Frame, now_s: float) -> None:
        """Hands a frame to the transport. On the token path.

        Args:
            frame: the next one.
            now_s: the event loop's time.
        """
        assert self._writer is not None
        self.is_idle = False
        self.cursor = frame.sequence
        self.writing_since_s = now_s
        if self._interval_s and frame.is_delta and self._ticker is not None:
            self.is_collecting = True
            self._ticker.wait(self._interval_s, self._collected)
        self._writer.write(frame.response)

    def complete(self) -> None:
        """Says that it has all that there is."""
        self.is_idle = False
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, error: MaasError) -> None:
        """Ends the call with an error. May be repeated; the first one stays."""
        self.is_idle = False
        if not self.done.done():
            self.done.set_exception(error)
            # A handler that was cancelled does not ask any more; that is no defect.
            self.done.exception()

    async def can_end(self) -> None:
        """Waits until the call takes a status, at most FIRST_WAIT_S.

        The headers travel with the first message. A status would bring them once more, which grpc
        refuses while they are on their way; the client would then wait for its deadline.
        """
        if self._writer is None or self._has_written or not self._writer.is_busy:
            return
        self._first = self._loop.create_future()
        await asyncio.wait((self._first,), timeout=FIRST_WAIT_S)

    def detach(self) -> None:
        """Forgets the generation."""
        self._on_ready = None

    def _collected(self) -> None:
        self.is_collecting = False
        if self._on_ready is not None:
            self._on_ready(self)

    def _written(self, error: BaseException | None) -> None:
        self.writing_since_s = None
        self._has_written = True
        self.is_idle = not self.done.done()
        if self._first is not None and not self._first.done():
            self._first.set_result(None)
        if error is not None:
            # The call is over on the other side; its handler is told by the library.
            self.fail(Cancelled("the caller went away"))
        elif self._on_ready is not None:
            self._on_ready(self)
